"""Two processes share one cache, are killed at any system call, meet disks that refuse, and files that are damaged.

Whatever comes in whichever order: what is read is right, what is put while the disk is well is there, the bound holds,
and everything can be given back. A killed process is one whose system calls have stopped: nothing of it runs any more,
and the kernel closes its files.
"""

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.disk import DiskOps
from ckptfs.engine.errands import Errands
from ckptfs.errors import CacheError
from ckptfs.settings import KiB
from tests.support.cache_load import chunk, item, key, segment_files, used
from tests.support.disk_faults import FakeClock, FaultyDisk

SIZE, SEGMENT = 256 * KiB, 32 * KiB
CODES = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)

Fault = tuple[int, int | None, bool] | None  # after how many calls; errno, or None to be killed; whether it goes on

nodes = st.integers(0, 1)
numbers = st.integers(0, 39)
faults = st.none() | st.tuples(st.integers(1, 60), st.none() | st.sampled_from(CODES), st.booleans())


def length(number: int) -> int:
    return number * 7919 % 9000 + 1


_SURE = ("close", "flock", "lock_range")  # what no disk refuses


class Killed(BaseException):
    """What a process that is killed does not see."""


class Doomed(FaultyDisk):
    """Does what the fault says, from the call on that it names; and what the kernel does for who is killed."""

    def __init__(self) -> None:
        self.fault: Fault = None
        self.killed = False
        self.files: set[int] = set()
        super().__init__(self._judge)
        whole, opened, closed = self.pwritev, self.open, self.close

        def keep(*args: Any) -> int:
            self.files.add(fd := opened(*args))
            return fd

        def forget(fd: int) -> None:
            if fd in self.files:
                self.files.remove(fd)
                closed(fd)

        self.open, self.close = keep, forget  # type: ignore[method-assign,assignment]

        def half(fd: int, buffers: list[memoryview], offset: int) -> int:
            if self.fault is not None and self.fault[0] == 1:
                data = b"".join(buffers)
                DiskOps.pwritev(fd, [data[: len(data) // 2]], offset)
            return whole(fd, buffers, offset)

        self.pwritev = half  # type: ignore[misc]

    def close_all(self) -> None:
        while self.files:
            os.close(self.files.pop())

    def _judge(self, name: str) -> int | None:
        if self.killed and name != "close":
            raise Killed
        if self.fault is None or self.killed or (name in _SURE and self.fault[1] is not None):
            return None
        left, code, lasting = self.fault
        if left > 1:
            self.fault = (left - 1, code, lasting)
            return None
        if code is None and name != "close":
            self.killed = True
            raise Killed
        if not lasting:
            self.fault = None
        return code


class Process:
    """One that has the cache open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = FakeClock()
        self.begin()

    def begin(self) -> None:
        self.disk = Doomed()
        self.cache = ChunkCache.open(self.path, size=SIZE, segment=SEGMENT, ops=self.disk, clock=self.clock)

    @contextmanager
    def under(self, fault: Fault) -> Iterator[None]:
        """Inside, the fault; behind it, a disk that is well, and the process, or another in its place."""
        self.disk.fault = fault
        try:
            with suppress(CacheError):
                yield
        except Killed:
            pass
        finally:
            self.disk.fault = None
            self.clock.advance(61)  # a gate that was shut opens, a disk that was full has room again
        if self.disk.killed:
            self.disk.close_all()
            self.begin()


class SharedCache(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "cache"
        self.processes = [Process(self.path), Process(self.path)]

    def teardown(self) -> None:
        try:
            for process in self.processes:
                process.cache.close()
            with ChunkCache.open(self.path, size=SIZE, segment=SEGMENT) as cache:
                for number in range(40):
                    assert cache.get(key(number)) in (None, chunk(number, length(number)))
                cache.verify()
                assert cache.verify()[1] == 0
                cache.clear()
            assert [file for file in self.path.rglob("*") if file.is_file() and file.parent.name != "locks"] == []
        finally:
            shutil.rmtree(self.folder)

    @rule(node=nodes, wanted=st.lists(numbers, min_size=1, max_size=6), fault=faults)
    def put(self, node: int, wanted: list[int], fault: Fault) -> None:
        process = self.processes[node]
        with process.under(fault):
            for number in wanted:
                process.cache.get(key(number))  # as who fetches does: only reading tells what is damaged
            process.cache.put_many([item(number, length(number)) for number in wanted])
        if fault is None:
            for number in wanted[-1:]:
                assert process.cache.get(key(number)) == chunk(number, length(number))

    @rule(node=nodes, number=numbers, fault=faults)
    def read(self, node: int, number: int, fault: Fault) -> None:
        process = self.processes[node]
        with process.under(fault):
            assert process.cache.get(key(number)) in (None, chunk(number, length(number)))

    @rule(node=nodes, number=numbers, at=st.integers(0, 9000), count=st.integers(1, 9000), fault=faults)
    def read_part(self, node: int, number: int, at: int, count: int, fault: Fault) -> None:
        process = self.processes[node]
        buffer = memoryview(bytearray(count))
        with process.under(fault):
            if process.cache.read_into(key(number), at, buffer):
                assert buffer == chunk(number, length(number))[at : at + count]

    @rule(node=nodes, number=numbers, fault=faults)
    def drop(self, node: int, number: int, fault: Fault) -> None:
        process = self.processes[node]
        with process.under(fault):
            process.cache.refresh()
            process.cache.drop(key(number))
            assert not process.cache.contains(key(number)) or fault is not None

    @rule(node=nodes, number=st.integers(0, 5), fault=faults)
    def document(self, node: int, number: int, fault: Fault) -> None:
        process = self.processes[node]
        with process.under(fault):
            process.cache.put_document(str(number), chunk(number, 5000))
            found = process.cache.get_document(str(number))
            assert found == chunk(number, 5000) or (found is None and fault is not None)

    @rule(node=nodes, size=st.integers(0, SIZE) | st.just(0), fault=faults)
    def prune(self, node: int, size: int, fault: Fault) -> None:
        process = self.processes[node]
        with process.under(fault):
            process.cache.prune(size)
            if fault is None and not size:
                assert len(segment_files(self.path)) <= 1, "but what the other one writes"

    @rule(node=nodes, fault=faults)
    def clear(self, node: int, fault: Fault) -> None:
        process = self.processes[node]
        with process.under(fault):
            process.cache.clear(force=True)

    @rule(node=nodes, fault=faults)
    def look(self, node: int, fault: Fault) -> None:
        process = self.processes[node]
        with process.under(fault):
            process.cache.refresh()

    @rule(node=nodes, fault=faults)
    def end(self, node: int, fault: Fault) -> None:
        process = self.processes[node]
        with process.under(fault):
            process.cache.close()
        if not process.disk.killed:
            process.cache.close()
            process.begin()

    @rule(seed=st.integers(0, 1 << 30), kind=st.sampled_from(("flip", "truncate", "zero")))
    def damage(self, seed: int, kind: str) -> None:
        """While nobody has it open: who has checked bytes trusts them."""
        for process in self.processes:
            process.cache.close()
        rng = random.Random(seed)
        files = sorted(file for file in self.path.rglob("*") if file.suffix in (".seg", ".idx", ".doc"))
        whole = [file for file in files if file.stat().st_size]
        if whole:
            file = rng.choice(whole)
            data = bytearray(file.read_bytes())
            at = rng.randrange(len(data))
            if kind == "flip":
                data[at] ^= 1 << rng.randrange(8)
            elif kind == "truncate":
                del data[at:]
            else:
                data[at : at + 4096] = bytes(len(data[at : at + 4096]))
            file.write_bytes(data)
        for process in self.processes:
            process.begin()

    @invariant()
    def bounded(self) -> None:
        assert used(self.path) <= SIZE + 2 * SEGMENT


@pytest.mark.row("C1")
@pytest.mark.row("C4")
@pytest.mark.row("C5")
def test_two_processes_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, which dies in the middle of whatever it does: errands are done by it as well."""
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setattr(Errands, "do", lambda _, errand: errand())
    run_state_machine_as_test(SharedCache, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
