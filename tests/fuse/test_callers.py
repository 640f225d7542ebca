"""Who opens a file: CRIU with lazy pages is known by its command line; nobody can make the mount wait for that."""

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
from ckptfs.fuse.callers import pages_lazily


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
        (["lazy-pages", "-D", "/mnt"], True),
        (["-D", "/mnt", "lazy-pages"], True),
        (["restore", "--lazy-pages"], True),
        (["restore", "-D", "/mnt/lazy-pages"], False),
        ([], False),
    ],
)
def test_criu_is_known_by_its_command_line(arguments: list[str], expected: bool) -> None:
    with started(*arguments) as pid:
        assert trio.run(pages_lazily, pid) is expected


def test_a_process_that_cannot_be_seen_is_not_criu() -> None:
    assert not trio.run(pages_lazily, 0)
    with started() as pid:
        pass
    assert not trio.run(pages_lazily, pid)


def test_a_process_whose_memory_does_not_answer_costs_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one whose arguments were mapped from a file of the mount itself."""
    answered = threading.Event()
    monkeypatch.setattr(callers, "_has_argument", lambda _: answered.wait(10))

    async def ask() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(pages_lazily, 1)

    began = time.monotonic()
    trio.run(ask)
    assert time.monotonic() - began < 3.0
    answered.set()
