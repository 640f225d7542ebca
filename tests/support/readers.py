"""Many readers of one file in a process of their own, so that a test can end them when they hang.

    python -m tests.support.readers FILE COUNT [--direct]

Each thread reads one page, all over the file. "started" on a line of its own when all of them ask, then a line of JSON
for each as it ends: [number, errno or 0, seconds, right]; `right` compares with what `content` says. Called by fault
tests.
"""

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.support.tools import ROOT

PAGE = 4096


def content(size: int) -> bytes:
    """What the file has to hold, for `right`."""
    return Random(5).randbytes(size)


class Ended(NamedTuple):
    number: int
    errno: int
    seconds: float
    right: bool


class Readers:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def results(self, patience: float) -> list[Ended]:
        """How each reader ended; TimeoutExpired when one is still stuck after `patience` seconds."""
        self.process.wait(patience)  # what a thousand of them say fits into the pipe
        assert self.process.stdout is not None
        return [Ended(*json.loads(line)) for line in self.process.stdout]


@contextmanager
def reading(file: Path, count: int, *, direct: bool = False) -> Iterator[Readers]:
    """`count` readers that have all asked; whoever is left is killed."""
    command = [sys.executable, "-m", "tests.support.readers", str(file), str(count)]
    process = subprocess.Popen(
        [*command, *(["--direct"] if direct else [])],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        yield Readers(process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def _main(path: str, count: int, flags: int) -> None:
    expected = content(os.stat(path).st_size)
    spacing = len(expected) // max(count, 1) // PAGE * PAGE
    asked = threading.Semaphore(0)
    lock = threading.Lock()  # held until all have asked: nobody prints before
    lock.acquire()
    began = time.monotonic()

    def read(number: int) -> None:
        error, right = 0, False
        offset = number * spacing
        file = os.open(path, os.O_RDONLY | flags)
        if not flags:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        buffer = mmap.mmap(-1, PAGE)
        asked.release()
        try:
            got = os.preadv(file, [buffer], offset)
            right = buffer[:got] == expected[offset : offset + PAGE]
        except OSError as failed:
            error = failed.errno or -1
        with lock:
            print(json.dumps([number, error, round(time.monotonic() - began, 3), right]), flush=True)

    threading.stack_size(256 * 1024)
    threads = [threading.Thread(target=read, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for _ in threads:
        asked.acquire()
    time.sleep(0.2)
    print("started", flush=True)
    lock.release()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), os.O_DIRECT if "--direct" in sys.argv else 0)
