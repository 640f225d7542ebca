"""heap.py OUT MEGABYTES: a Python process with a heap of strings, numbers and dictionaries, that works on it.

Says what tests/support/workload.py expects: "heap tick K REALTIME_NS" every 10 ms and, on SIGUSR1, "heap hash H
REALTIME_NS" over the keys of its heap. Each tick replaces a few of its objects, so memory changes where the allocator
pleases.
"""

import os
import random
import signal
import sys
import time
import zlib

_RECORD_BYTES = 1500  # of one entry, all its objects together; measured with 64 MB


def main() -> None:
    out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    count = int(sys.argv[2]) * 1_000_000 // _RECORD_BYTES
    chance = random.Random(1)
    heap = {f"session-{i}": _record(chance, i) for i in range(count)}
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))

    def say(what: str, number: int) -> None:
        os.write(out, f"heap {what} {number} {time.time_ns()}\n".encode())

    for tick in range(60_000):
        say("tick", tick)
        if asked:
            asked.clear()
            say("hash", zlib.crc32("".join(heap).encode()))
        for _ in range(5):
            number = chance.randrange(count)
            heap[f"session-{number}"] = _record(chance, tick)
        time.sleep(0.01)


def _record(chance: random.Random, number: int) -> dict[str, object]:
    return {
        "id": number,
        "user": f"user-{chance.randrange(100_000):06d}",
        "seen": [chance.random() for _ in range(8)],
        "token": chance.randbytes(300).hex(),
        "path": ["/v2/", str(number), "/checkpoints/", str(chance.randrange(1000))],
    }


if __name__ == "__main__":
    main()
