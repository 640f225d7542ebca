"""Who opens a file: CRIU is known by its command line; nobody can make the mount wait for that."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from ckptfs.fuse import callers
from ckptfs.fuse.callers import Access, access_of


@contextmanager
def started(*arguments: str) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "input()", *arguments], stdin=subprocess.PIPE)
    try:
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes():  # execve(2) closes the pipe before
            time.sleep(0.001)
        yield process.pid
    finally:
        process.communicate(b"\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lazy-pages", "-D", "/mnt"], Access.LAZILY),
        (["-D", "/mnt", "lazy-pages"], Access.LAZILY),
        (["criu", "restore", "--lazy-pages"], Access.LAZILY),
        (["/usr/sbin/criu", "restore", "-D", "/mnt/lazy-pages"], Access.ONCE),
        (["criu", "swrk", "3"], Access.ONCE),
        (["restore", "-D", "/mnt/criu/dump"], Access.CACHED),
        (["cp", "/mnt/criu", "there"], Access.CACHED),
        ([], Access.CACHED),
    ],
)
def test_criu_is_known_by_its_command_line(arguments: list[str], expected: Access) -> None:
    with started(*arguments) as pid:
        assert trio.run(access_of, pid) is expected


def test_a_process_that_cannot_be_seen_is_not_criu() -> None:
    assert trio.run(access_of, 0) is Access.CACHED
    with started() as pid:
        pass
    assert trio.run(access_of, pid) is Access.CACHED


def test_a_process_whose_memory_does_not_answer_costs_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one whose arguments were mapped from a file of the mount itself."""
    answered = threading.Event()
    monkeypatch.setattr(callers, "_by_command_line", lambda _: answered.wait(10))

    async def ask() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(access_of, 1)

    began = time.monotonic()
    trio.run(ask)
    assert time.monotonic() - began < 3.0
    answered.set()
