"""Threads that read one file at random and compare every byte, in a process of their own.

    python -m tests.soak.reader FILE THREADS SECONDS SEED

FILE holds what tests.support.readers.content says. Pages are dropped from the kernel's cache again, so that the mount
goes on being asked. A line of JSON at the end: reads, bytes, wrong, errors by name.
"""

import errno
import json
import os
import sys
import threading
import time
from collections import Counter
from random import Random

from tests.support.readers import content

LENGTHS = (1, 100, 4096, 16 * 1024, 64 * 1024, 200_000)


def main(path: str, threads: int, seconds: float, seed: int) -> None:
    file = os.open(path, os.O_RDONLY)
    expected = content(os.fstat(file).st_size)
    end = time.monotonic() + seconds
    totals: Counter[str] = Counter()
    lock = threading.Lock()

    def read(number: int) -> None:
        random, found = Random(seed * 1000 + number), Counter[str]()
        while time.monotonic() < end:
            length = random.choice(LENGTHS)
            offset = random.randrange(len(expected) - length)
            try:
                data = os.pread(file, length, offset)
            except OSError as error:
                found[errno.errorcode.get(error.errno or 0, "?")] += 1
                continue
            found["reads"] += 1
            found["bytes"] += len(data)
            found["wrong"] += data != expected[offset : offset + length]
            os.posix_fadvise(file, offset, length, os.POSIX_FADV_DONTNEED)
        with lock:
            totals.update(found)

    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    threading.stack_size(256 * 1024)
    running = [threading.Thread(target=read, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    print(json.dumps(totals))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
