"""zstd layers with a seek table: many frames, and behind them a list of their sizes.

facebook/zstd contrib/seekable_format 0.1.0. Nothing in the manifest tells such a layer from one that is a single frame,
so its last bytes have to be asked for (`read_seek_table`). The table is covered by no digest of its own, and its XXH64
is for accidents, not for forgers: the label is `transport`.
"""

import struct
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import xxhash
import zstandard

from ckptfs.errors import FormatError, IntegrityError, LimitExceeded
from ckptfs.layers.compression import Bytes
from ckptfs.layers.grid import Cuts
from ckptfs.layers.protocols import Emit, Verification
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.model.blob import Blob
from ckptfs.model.toc import Chunk, Entry, derived_key
from ckptfs.settings import KiB, Limits, Settings

KIND = "frame"
_SKIPPABLE = struct.Struct("<II")  # magic number, bytes that follow
_FOOTER = struct.Struct("<IBI")  # frames, descriptor, magic number
_SKIPPABLE_MAGIC, _FOOTER_MAGIC = 0x184D2A5E, 0x8F92EAB1
_HAS_CHECKSUM, _RESERVED = 0x80, 0x7C
_EMPTY_FRAMES, _EMPTY_BYTES = 16, 64 * KiB  # each is read before the layer is; writers end with one
_UNDECLARED = -1  # zstandard.frame_content_size


@dataclass(frozen=True, slots=True)
class SeekTable:
    """Frame i are the blob's bytes [offsets[i], offsets[i+1]) and decoded [positions[i], positions[i+1]).

    Frames that decode to nothing, as the table says, are left out: `empty` are their offsets and sizes. `checksums`:
    low halves of XXH64, or nothing. `raw`: the table as it stands at the blob's end.
    """

    offsets: Sequence[int]
    sizes: Sequence[int]
    positions: Sequence[int]
    checksums: Sequence[int]
    empty: Sequence[tuple[int, int]]
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
    empty = [i for i, length in enumerate(decoded) if not length]
    if len(empty) > _EMPTY_FRAMES or any(encoded[i] > _EMPTY_BYTES for i in empty):
        raise LimitExceeded(f"the zstd seek table has {len(empty)} frames without contents")
    full = [i for i, length in enumerate(decoded) if length]
    offsets = list(accumulate(encoded, initial=0))
    checksums = numbers[2::width] if width == 3 else ()
    return SeekTable(
        array("Q", (offsets[i] for i in full)),
        array("I", (encoded[i] for i in full)),
        array("Q", accumulate((decoded[i] for i in full), initial=0)),
        array("I", (checksums[i] for i in full)) if checksums else (),
        [(offsets[i], encoded[i]) for i in empty],
        raw,
        settings,
    )


class _Frames(threading.local):
    """A context of decompression for each thread."""

    def __init__(self, limits: Limits) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=limits.zstd_window_bytes)

    def decompress(self, data: Bytes, length: int) -> bytes:
        """The `length` bytes of the one frame that `data` is. IntegrityError for any other.

        Nothing vouches for the table: with fewer bytes than the frames have it would make another tar of them.
        """
        try:
            # zstandard allocates what a frame declares, whatever is asked for: only after comparing.
            if zstandard.frame_content_size(data) in (length, _UNDECLARED):
                found = self._decompressor.decompress(data, max_output_size=length, allow_extra_data=False)
                if len(found) == length:
                    return found
        except zstandard.ZstdError as error:
            raise IntegrityError(f"a frame of a zstd seek table does not decompress ({error})") from None
        raise IntegrityError(f"a frame does not have the {length} bytes that the zstd seek table says")

    def require_nothing(self, data: Bytes) -> None:
        """IntegrityError where `data`, frames of any kind, holds a byte."""
        try:
            with self._decompressor.stream_reader(data, read_across_frames=True) as reader:
                found = reader.read(1)
        except zstandard.ZstdError as error:
            raise IntegrityError(f"a frame of a zstd seek table does not decompress ({error})") from None
        if found:
            raise IntegrityError("a frame has contents, and the zstd seek table says that it has none")


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
        self._frames = _Frames(table.settings.limits)
        self._checksums = dict(zip(table.offsets, table.checksums, strict=False))

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        """Reads whole frames, so that nothing is fetched twice: one first and after each jump, then more at a time."""
        table, cuts = self._table, self._cuts
        for offset, size in table.empty:
            self._frames.require_nothing(self._blob.read_at(offset, size, attempt=attempt))
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
        decoded = self._frames.decompress(data, chunk.length)
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
