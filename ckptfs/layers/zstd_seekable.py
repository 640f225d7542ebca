"""zstd layers with a seek table: many frames, and behind them a list of their sizes.

facebook/zstd contrib/seekable_format 0.1.0. Nothing in the manifest tells such a layer from one that is a single frame,
so its last bytes have to be asked for (`read_seek_table`). The table is covered by no digest of its own, and its XXH64
is for accidents, not for forgers: the label is `transport`.
"""

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import xxhash

from ckptfs.errors import FormatError, IntegrityError, LimitExceeded
from ckptfs.layers.compression import Bytes, unzstd_chunk
from ckptfs.layers.grid import Cuts
from ckptfs.layers.protocols import Emit, Verification
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.model.blob import Blob
from ckptfs.model.toc import Chunk, Entry, derived_key
from ckptfs.settings import Settings

KIND = "frame"
_SKIPPABLE = struct.Struct("<II")  # magic number, bytes that follow
_FOOTER = struct.Struct("<IBI")  # frames, descriptor, magic number
_SKIPPABLE_MAGIC, _FOOTER_MAGIC = 0x184D2A5E, 0x8F92EAB1
_HAS_CHECKSUM, _RESERVED = 0x80, 0x7C


@dataclass(frozen=True, slots=True)
class SeekTable:
    """Frame i are the blob's bytes [offsets[i], offsets[i+1]) and decoded [positions[i], positions[i+1]).

    Frames that decode to nothing are left out of it. `checksums`: low halves of XXH64, or nothing. `raw`: the table as
    it stands at the blob's end.
    """

    offsets: Sequence[int]
    sizes: Sequence[int]
    positions: Sequence[int]
    checksums: Sequence[int]
    raw: bytes
    settings: Settings

    def open(self, blob: Blob, layer: int) -> "ZstdSeekableLayer":
        return ZstdSeekableLayer(self, blob, layer)


def read_seek_table(blob: Blob, settings: Settings) -> SeekTable | None:
    """The table at a blob's end, None where there is none: one request for the footer, one more for a table.

    FormatError for a table that contradicts itself or the blob; LimitExceeded for frames that are too large to be had
    one by one.
    """
    tail = blob.read_at(max(0, blob.size - _FOOTER.size), min(_FOOTER.size, blob.size)) if blob.size else b""
    size = _table_size(tail, blob.size, settings)
    if size > len(tail):
        tail = blob.read_at(blob.size - size, size - len(tail)) + tail
    return parse_seek_table(tail[-size:], blob.size, settings) if size else None


def parse_seek_table(table: bytes, blob_size: int, settings: Settings) -> SeekTable:
    """From `SeekTable.raw` of a blob of that size. Raises as `read_seek_table`."""
    size = _table_size(table, blob_size, settings)
    if size != len(table) or _SKIPPABLE.unpack_from(table) != (_SKIPPABLE_MAGIC, size - _SKIPPABLE.size):
        raise FormatError("the zstd seek table does not begin where it should")
    _, descriptor, _ = _FOOTER.unpack_from(table, size - _FOOTER.size)
    return _parsed(table, 3 if descriptor & _HAS_CHECKSUM else 2, blob_size - size, settings)


def _table_size(tail: bytes, blob_size: int, settings: Settings) -> int:
    """How many of a blob's last bytes are a seek table; 0 where there is none."""
    if len(tail) < _FOOTER.size:
        return 0
    frames, descriptor, magic = _FOOTER.unpack_from(tail, len(tail) - _FOOTER.size)
    if magic != _FOOTER_MAGIC:
        return 0
    if descriptor & _RESERVED:
        raise FormatError("the zstd seek table has reserved bits")
    if frames > settings.limits.toc_entries:
        raise LimitExceeded(f"the zstd seek table has {frames} frames")
    width = 3 if descriptor & _HAS_CHECKSUM else 2
    size = int(_SKIPPABLE.size + 4 * width * frames + _FOOTER.size)
    if size > blob_size:
        raise FormatError("the zstd seek table is larger than its layer")
    return size


def _parsed(raw: bytes, width: int, end: int, settings: Settings) -> SeekTable:
    rows = raw[_SKIPPABLE.size : -_FOOTER.size]
    numbers = struct.unpack(f"<{len(rows) // 4}I", rows)
    encoded, decoded = numbers[0::width], numbers[1::width]
    if sum(encoded) != end or 0 in encoded:
        raise FormatError(f"the zstd seek table has frames of {sum(encoded)} bytes in a layer of {end}")
    largest = max(max(decoded, default=0), max(encoded, default=0))
    if largest > settings.limits.chunk_bytes:
        raise LimitExceeded(f"the zstd seek table has a frame of {largest} bytes")
    full = [i for i, length in enumerate(decoded) if length]
    offsets = list(accumulate(encoded, initial=0))
    checksums = numbers[2::width] if width == 3 else ()
    return SeekTable(
        array("Q", (offsets[i] for i in full)),
        array("I", (encoded[i] for i in full)),
        array("Q", accumulate((decoded[i] for i in full), initial=0)),
        array("I", (checksums[i] for i in full)) if checksums else (),
        raw,
        settings,
    )


class ZstdSeekableLayer:
    """Every frame is a chunk. Entries are found by jumping from header to header, as in a plain tar."""

    format = "zstd:seekable"
    verification: Verification = "transport"
    sequential = False

    def __init__(self, table: SeekTable, blob: Blob, layer: int) -> None:
        self.entries: Sequence[Entry] | None = None
        self._table = table
        self._blob = blob
        self._layer = layer
        self._settings = table.settings
        self._cuts = Cuts(table.positions, self._chunk)
        self._checksums = dict(zip(table.offsets, table.checksums, strict=False))

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        """Reads whole frames, so that nothing is fetched twice: one first and after each jump, then more at a time."""
        table, cuts = self._table, self._cuts
        end = table.positions[-1]
        scanner = TarScanner(cuts, self._settings.limits, end)
        number, window = 0, 1
        while scanner.at < end and not scanner.finished:
            chunks = self._run(number, window)
            start = chunks[0].offset
            data = memoryview(self._blob.read_at(start, _end(chunks[-1]) - start, attempt=attempt))
            for chunk in chunks:
                decoded = bytes(self.decode(chunk, data[chunk.offset - start : _end(chunk) - start]))
                yield from scanner.feed(decoded)
                emit(chunk, decoded)
            number += len(chunks)
            window *= 2
            wanted = cuts.index(min(scanner.wanted, end - 1))
            if wanted > number:
                scanner.skip_to(cuts.start(wanted))
                number, window = wanted, 1
        scanner.close()

    def decode(self, chunk: Chunk, data: memoryview) -> Bytes:
        decoded = unzstd_chunk(data, chunk.length, self._settings.limits)
        checksum = self._checksums.get(chunk.offset)
        if checksum is not None and xxhash.xxh64_intdigest(decoded) & 0xFFFFFFFF != checksum:
            raise IntegrityError(f"the frame at byte {chunk.offset} of {self._blob.descriptor.digest} is damaged")
        return decoded

    def chunks(self) -> Iterator[Chunk]:
        """All frames that hold something, in order."""
        return map(self._cuts.chunk, range(len(self._table.offsets)))

    def _run(self, number: int, window: int) -> list[Chunk]:
        """At most `window` frames from `number` on that are worth one request."""
        chunks = [self._cuts.chunk(number)]
        limit = chunks[0].offset + self._settings.sizes.random_extent
        for following in range(number + 1, min(number + window, len(self._table.offsets))):
            chunk = self._cuts.chunk(following)
            if _end(chunk) > limit:
                break
            chunks.append(chunk)
        return chunks

    def _chunk(self, index: int) -> Chunk:
        table = self._table
        offset = table.offsets[index]
        key = derived_key(str(self._blob.descriptor.digest), offset, kind=KIND)
        length = table.positions[index + 1] - table.positions[index]
        return Chunk(key, self._layer, offset, table.sizes[index], length)


def _end(chunk: Chunk) -> int:
    return chunk.offset + chunk.size
