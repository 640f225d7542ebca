"""A segment: chunks appended one after another to a data file, and one record for each in an index file.

Owns the format of both files. Never looks at a directory, never evicts. Called by chunk_log.py and chunk_index.py.

A record is 48 bytes, little-endian: key 32, offset u32, length u32, checksum u64. The checksum is xxh3-64 of the data,
seeded with the first 8 bytes of the key: one check covers data, offset, length and key, so a record whose bytes were
torn or mixed with another's can only be a miss. A record of zeros was erased; a key of zeros with SEAL as checksum says
that nothing will be appended any more.
"""

import itertools
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

import xxhash

from ckptfs.engine.disk import Buffer, DiskOps, Handle, read_all, write_all
from ckptfs.settings import MiB

KEY_BYTES = 32
RECORD = struct.Struct("<32sIIQ")
MAX_RECORDS = 1 << 20  # in one segment: 64 MiB of 64-byte chunks
NO_KEY = bytes(KEY_BYTES)
ERASED = bytes(RECORD.size)
SEAL = RECORD.pack(NO_KEY, 0, 0, 0x6465_6C61_6573)  # "sealed"

_AHEAD = 8 * MiB  # a segment that has so much already gets up to twice that behind its end
_FEW = 32  # keys that are looked for one by one: 8 ns a record and key, where going through all keys takes 500
_KEYS = struct.Struct(f"<{KEY_BYTES}s{RECORD.size - KEY_BYTES}x")


def checksum(key: bytes, data: Buffer) -> int:
    """What a record says about the bytes of its chunk; 4 us for 256 KiB."""
    return xxhash.xxh3_64_intdigest(data, int.from_bytes(key[:8], "little"))


class Segment:
    """What this process knows of one segment. Changed under the log's lock, read without.

    records  the index file as far as it was read.
    used     used[i] is 1 when chunk i was read since it was written: it gets a second chance at eviction.
    handle   the data file, open for reading, or None.
    index    the index file while others may append to it, or None.
    """

    __slots__ = ("damaged", "handle", "index", "name", "records", "sealed", "slot", "touched", "used")

    def __init__(self, slot: int, name: str) -> None:
        self.slot = slot
        self.name = name
        self.records = bytearray()
        self.used = bytearray()
        self.handle: Handle | None = None
        self.index: Handle | None = None
        self.sealed = False
        self.damaged = False
        self.touched = float("-inf")

    def __len__(self) -> int:
        return len(self.used)

    def record(self, i: int) -> tuple[bytes, int, int, int]:
        """key, offset, length, checksum"""
        return RECORD.unpack_from(self.records, i * RECORD.size)

    def chunk_keys(self, start: int = 0) -> Iterator[bytes]:
        """Keys of the records from `start` on, erased ones as NO_KEY."""
        view = memoryview(self.records)[start * RECORD.size :]
        return itertools.chain.from_iterable(list(_KEYS.iter_unpack(view)))

    def extend(self, data: Buffer) -> int:
        """Take over the whole records in `data`; returns the number of the first."""
        first = len(self)
        count = min(len(data) // RECORD.size, MAX_RECORDS - first)
        self.records += data[: count * RECORD.size]
        self.used += bytes(count)
        if self.handle is not None:
            self.handle.verified += bytes(count)
        self.sealed = self.sealed or self.records.endswith(SEAL) or len(self) >= MAX_RECORDS
        return first

    def find(self, keys: Collection[bytes]) -> Iterator[int]:
        """The numbers of all records with one of these keys; the index's dict knows only the newest one of the node."""
        if len(keys) > _FEW:
            yield from (i for i, key in enumerate(self.chunk_keys()) if key in keys)
            return
        for key in keys:
            at = self.records.find(key)
            while at >= 0:
                if at % RECORD.size == 0:
                    yield at // RECORD.size
                at = self.records.find(key, at + 1)

    def end(self) -> int:
        """Where the data ends according to the records."""
        return max((offset + length for _, offset, length, _ in RECORD.iter_unpack(bytes(self.records))), default=0)


def tail(ops: DiskOps, segment: Segment) -> bytes:
    """The whole records that the index file has and `segment` has not."""
    if segment.index is None:
        return b""
    start = len(segment) * RECORD.size
    data = read_all(ops, segment.index.fd, start, MAX_RECORDS * RECORD.size - start)
    return data[: len(data) // RECORD.size * RECORD.size]


class SegmentWriter:
    """The one appender of a segment. Holds the lock on the data file that says so.

    Bytes that a record may refer to are never written again, not even after a failure: a reader who checked them
    once trusts them. So an OSError is the end of a writer; the segment can be continued behind what it holds.
    """

    def __init__(self, ops: DiskOps, segment: Segment, data: Handle, index: Handle | None, size: int) -> None:
        self._ops = ops
        self.segment = segment
        self.data = data
        self.size = size
        self._index = index
        self._index_size = len(segment) * RECORD.size
        self._allocated = 0  # up to here, once blocks are allocated ahead

    def reserve(self, cap: int) -> None:
        """Have the next blocks allocated at once, of a segment that may grow to `cap` bytes.

        Writing into them takes 0.21 s/GB on ext4, where it takes 0.27 to 0.32 to find a place for each block.
        """
        if self.size < _AHEAD or self.size + _AHEAD // 2 <= self._allocated:
            return
        start = max(self.size, self._allocated)
        self._allocated = min(self.size + 2 * _AHEAD, cap)
        if start < self._allocated:
            with suppress(OSError):  # not every file system can; a full disk is the next write's matter
                self._ops.allocate(self.data.fd, start, self._allocated - start)

    def append(self, chunks: Sequence[tuple[bytes, Buffer, int]]) -> bytes:
        """Write (key, data, checksum) of each chunk, data first; returns the records. OSError: none was added."""
        records, offset = bytearray(), self.size
        for key, data, total in chunks:
            records += RECORD.pack(key, offset, len(data), total)
            offset += len(data)
        try:
            write_all(self._ops, self.data.fd, [data for _, data, _ in chunks], self.size)
        except OSError:
            self._give_back()
            raise
        self.size = offset
        self._append_records(records)
        return bytes(records)

    def seal(self) -> None:
        """Tell everybody that no more is coming."""
        if not self.segment.sealed:
            self._append_records(SEAL)
            self.segment.sealed = True

    def _append_records(self, records: Buffer) -> None:
        if self._index is not None:
            write_all(self._ops, self._index.fd, [records], self._index_size)
            self._index_size += len(records)

    def trim(self) -> None:
        """Nothing more is appended by this process: give back what was reserved in vain."""
        if self._allocated > self.size:
            self._give_back()

    def _give_back(self) -> None:
        """The room of data that was written in part, or not at all; no record refers to it."""
        with suppress(OSError):  # it will be written over, or evicted with the rest
            self._ops.ftruncate(self.data.fd, self.size)
