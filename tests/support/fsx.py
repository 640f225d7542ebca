"""Random reads of a mount, in every way that Linux has, compared with the same bytes on a disk.

    python -m tests.support.fsx MOUNT EXPECTED SEED COUNT

EXPECTED holds the regular files that MOUNT has to show. Offsets and lengths favour pages, chunks and the ends of files.
The first difference is told and ends it with 1; otherwise a line of JSON: how many reads of each kind, bytes compared.
Called by the test of row F2 and by the soak.
"""

import fcntl
import json
import mmap
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

PAGE = 4096
LONGEST = 1 << 20
_EDGES = (512, PAGE, 64 << 10, 128 << 10, 256 << 10, 1 << 20)

ADVICE = (os.POSIX_FADV_NORMAL, os.POSIX_FADV_WILLNEED, os.POSIX_FADV_RANDOM, os.POSIX_FADV_SEQUENTIAL)

Read = Callable[[int, int, int], bytes]  # (descriptor, offset, length)


def _read(file: int, offset: int, length: int) -> bytes:
    os.lseek(file, offset, os.SEEK_SET)
    return _whole(lambda done: os.read(file, length - done), length)


def _pread(file: int, offset: int, length: int) -> bytes:
    return _whole(lambda done: os.pread(file, length - done, offset + done), length)


def _preadv(file: int, offset: int, length: int) -> bytes:
    buffers = [bytearray(length // 3), bytearray(1), bytearray(length - length // 3)]
    got = os.preadv(file, buffers, offset)
    return b"".join(buffers)[: min(got, length)] + (
        _pread(file, offset + got, length - got) if 0 < got < length else b""
    )


def _readv(file: int, offset: int, length: int) -> bytes:
    os.lseek(file, offset, os.SEEK_SET)
    buffer = bytearray(length)
    got = os.readv(file, [buffer]) if length else 0
    return bytes(buffer[:got]) + (_pread(file, offset + got, length - got) if 0 < got < length else b"")


def _mmap(file: int, offset: int, length: int) -> bytes:
    size = os.fstat(file).st_size
    end = min(offset + length, size)
    if end <= offset:
        return b""
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(file, end - start, prot=mmap.PROT_READ, offset=start) as view:
        return view[offset - start : end - start]


def _mmap_private(file: int, offset: int, length: int) -> bytes:
    """Written to, which nobody else may see."""
    size = os.fstat(file).st_size
    start = min(offset, size - 1) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY if size else 0
    end = min(offset + length, size)
    if end <= offset:
        return b""
    with mmap.mmap(
        file, end - start, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start
    ) as view:
        found = view[offset - start : end - start]
        view[offset - start] ^= 0xFF
        return found


def _direct(file: int, offset: int, length: int) -> bytes:
    other = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT)
    start = offset // PAGE * PAGE
    try:
        with mmap.mmap(-1, max(PAGE, (offset + length - start + PAGE - 1) // PAGE * PAGE)) as buffer:
            got = 0
            while start + got < offset + length:
                count = os.preadv(other, [memoryview(buffer)[got:]], start + got)
                got += count
                if not count:
                    break
            return buffer[offset - start : min(got, offset - start + length)]
    finally:
        os.close(other)


def _sendfile(file: int, offset: int, length: int) -> bytes:
    target = os.memfd_create("fsx")
    try:
        done = 0
        while done < length and (count := os.sendfile(target, file, offset + done, length - done)):
            done += count
        return os.pread(target, done, 0)
    finally:
        os.close(target)


def _splice(file: int, offset: int, length: int) -> bytes:
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, LONGEST)
        return _whole(lambda done: _through(reader, file, writer, offset + done, length - done), length)
    finally:
        os.close(reader)
        os.close(writer)


def _through(reader: int, file: int, writer: int, offset: int, length: int) -> bytes:
    count = os.splice(file, writer, min(length, 1 << 16), offset_src=offset)
    return os.read(reader, count) if count else b""


def _copy(file: int, offset: int, length: int) -> bytes:
    """copy_file_range(2) between file systems, where the kernel does it by splicing."""
    target = os.memfd_create("fsx")
    try:
        done = 0
        while done < length and (count := os.copy_file_range(file, target, length - done, offset + done)):
            done += count
        return os.pread(target, done, 0)
    except OSError:
        return _pread(file, offset, length)
    finally:
        os.close(target)


KINDS: dict[str, Read] = {
    "read": _read,
    "pread": _pread,
    "preadv": _preadv,
    "readv": _readv,
    "mmap": _mmap,
    "mmap private": _mmap_private,
    "O_DIRECT": _direct,
    "sendfile": _sendfile,
    "splice": _splice,
    "copy_file_range": _copy,
}


def _whole(step: Callable[[int], bytes], length: int) -> bytes:
    parts, done = [], 0
    while done < length and (part := step(done)):
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def _place(rng: Random, size: int) -> tuple[int, int]:
    """An offset and a length, often at an edge; now and then past the end."""
    offset = rng.randrange(size + 1)
    if rng.random() < 0.4:
        edge = rng.choice(_EDGES)
        offset = max(0, offset // edge * edge + rng.choice((-1, 0, 0, 1)))
    elif rng.random() < 0.1:
        offset = max(0, size + rng.choice((-PAGE, -1, 0, 1, PAGE)))
    length = rng.choice((1, 2, 511, PAGE, PAGE + 1, rng.randrange(1, 1 << 16), rng.randrange(1, LONGEST)))
    return offset, length


def main(mount: Path, expected: Path, seed: int, count: int) -> int:
    rng = Random(seed)
    names = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    weights = [1 + (expected / name).stat().st_size ** 0.5 for name in names]
    opened = {name: (os.open(mount / name, os.O_RDONLY), os.open(expected / name, os.O_RDONLY)) for name in names}
    done: Counter[str] = Counter()
    compared = 0
    for number in range(count):
        (name,) = rng.choices(names, weights)
        file, truth = opened[name]
        size = os.fstat(truth).st_size
        if os.fstat(file).st_size != size:
            print(f"{name}: {os.fstat(file).st_size} bytes in place of {size}")
            return 1
        kind = rng.choice(list(KINDS))
        offset, length = _place(rng, size)
        if rng.random() < 0.3:  # much of what the kernel keeps is forgotten, so that the mount is asked
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file, offset, length, rng.choice(ADVICE))
        got, right = KINDS[kind](file, offset, length), os.pread(truth, length, offset)
        if got != right:
            at = next(
                (i for i, (a, b) in enumerate(zip(got, right, strict=False)) if a != b), min(len(got), len(right))
            )
            what = f"read {number} ({kind}) of {name} at {offset}+{length}"
            print(f"{what}: {len(got)} of {len(right)} bytes, wrong at {at}")
            return 1
        done[kind] += 1
        compared += len(got)
        if rng.random() < 0.01:  # a handle of its own, closed again
            os.close(file)
            opened[name] = (os.open(mount / name, os.O_RDONLY), truth)
    print(json.dumps({"reads": done, "bytes": compared}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
