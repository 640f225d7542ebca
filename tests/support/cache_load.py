"""Chunks whose bytes follow from their number, and a child process that fills or shares a cache with them.

`python -m tests.support.cache_load fill DIR SIZE LENGTH` appends chunks 0, 1, 2 ... for ever and prints each number
once it is kept. `... share DIR SIZE LENGTH COUNT SEED LOG` reads COUNT chunks in random order, fetching what is missing
under a claim and appending the numbers fetched to LOG.
"""

import hashlib
import os
import random
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from ckptfs.engine.cache import ChunkCache

ROOT = Path(__file__).parents[2]


def key(number: int) -> bytes:
    return hashlib.sha256(b"chunk %d" % number).digest()


def chunk(number: int, length: int) -> bytes:
    """Bytes that no other number has in any place."""
    block = hashlib.sha256(b"bytes %d" % number).digest()
    return (block * (length // len(block) + 1))[:length]


def item(number: int, length: int) -> tuple[bytes, bytes]:
    return key(number), chunk(number, length)


def right(cache: ChunkCache, numbers: range, length: int) -> list[int]:
    """The numbers of the chunks that are there; fails if one has wrong bytes."""
    found = []
    for number in numbers:
        data = cache.get(key(number))
        if data is not None:
            assert data == chunk(number, length), f"wrong bytes in chunk {number}"
            found.append(number)
    return found


def used(path: Path) -> int:
    """Bytes that the files under `path` take up on disk; evicted ones may vanish meanwhile."""
    total = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            status = file.lstat()
            total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return total


def segment_files(path: Path, suffix: str = ".seg") -> list[Path]:
    return sorted((path / "v1" / "segments").glob(f"*{suffix}"))


def start(*args: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.support.cache_load", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)


def _fill(path: Path, size: int, length: int) -> None:
    with ChunkCache.open(path, size=size) as cache:
        number = 0
        while True:
            cache.put_many([item(number, length), item(number + 1, length)])
            cache.put_document("newest", str(number + 1).encode() * 1000)
            number += 2
            print(number - 1, flush=True)


def _share(path: Path, size: int, length: int, count: int, seed: int, log: str) -> None:
    fetched = os.open(log, os.O_WRONLY | os.O_APPEND)
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    with ChunkCache.open(path, size=size) as cache:
        for done, number in enumerate(numbers):
            while (data := cache.get(key(number))) is None:
                if cache.try_claim([key(number)]):
                    cache.refresh()
                    if not cache.contains(key(number)):
                        os.write(fetched, b"%d\n" % number)
                        time.sleep(0.0005)  # the network
                        cache.put_many([item(number, length)])
                    cache.release([key(number)])
                else:
                    time.sleep(0.003)
                    cache.refresh()
            if data != chunk(number, length):
                raise SystemExit(f"wrong bytes in chunk {number}")
            print(done, flush=True)


if __name__ == "__main__":
    kind, directory, *numbers = sys.argv[1:]
    if kind == "fill":
        _fill(Path(directory), int(numbers[0]), int(numbers[1]))
    else:
        size, length, count, seed = map(int, numbers[:4])
        _share(Path(directory), size, length, count, seed, numbers[4])
