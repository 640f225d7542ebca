"""The index of one layer that has no table of contents of its own: its entries, its chunks' digests, and for gzip the
points from which each chunk inflates. Made by whoever has streamed the layer once; `ckptfs index` publishes it.

    magic | u32 length of the JSON | JSON | table of contents | columns, zstd | windows

Entries are a toc_document of their own, in which each run of a file's bytes is a chunk at its place in the decoded
stream; the real chunks are a grid over that stream. Every window is a zstd frame, unpacked when it is needed. The
document comes from this node's disk or from outside: every number is checked here, names by the caller.

Bytes in, values out.
"""

import json
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, cast

import zstandard

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.model.oci import parse_json
from ckptfs.model.toc import Chunk, Entry, Extent, derived_key
from ckptfs.model.toc_document import decode_toc, encode_toc
from ckptfs.settings import GiB, KiB, Limits

_MAGIC = b"CKPTLAY1"
_HEAD = len(_MAGIC) + 4
_HASH = 32
_WINDOW = 32 * KiB
_LEVEL = 9
_COLUMNS = (("offset", "Q"), ("position", "Q"), ("bits", "B"), ("window", "I"), ("end", "Q"))
_RUN = GiB  # a toc_document counts a chunk's bytes in 32 bits

# File bytes [start, start + length) lie at `position` of the decoded stream.
Segments = Sequence[tuple[int, int, int]]
Compression = Literal["none", "gzip", "zstd"]


class AccessPoint(NamedTuple):
    """Where a deflate block begins.

    offset    of the byte in the blob that holds its first bit
    bits      how many high bits of that byte are the block's; 0: all of them
    position  decoded bytes before it
    window    the last 32 KiB of them, or fewer; in a document compressed
    """

    offset: int
    bits: int
    position: int
    window: bytes


class GzipAccess(NamedTuple):
    """`points` by position, `ends[i]`: the blob's bytes up to there are enough for chunk i of the grid."""

    points: Sequence[AccessPoint]
    ends: Sequence[int]

    def point(self, position: int) -> AccessPoint:
        """The last point at or before a position of the decoded stream."""
        return self.points[bisect_right(self.points, position, key=_position) - 1]


class LayerIndex(NamedTuple):
    """Chunk i are decoded bytes [i * unit, (i + 1) * unit), up to `length`; `digests` has a sha256 for each.

    Entries' extents are runs: see `segments`. `size` is the blob's.
    """

    digest: str
    size: int
    compression: Compression
    unit: int
    length: int
    digests: bytes
    entries: Sequence[Entry]
    gzip: GzipAccess | None = None

    def chunk_digest(self, index: int) -> bytes:
        return self.digests[_HASH * index : _HASH * (index + 1)]


def runs(segments: Segments, layer_digest: str) -> tuple[Extent, ...]:
    """Extents that say nothing but where the bytes lie in the decoded stream."""
    found = []
    for start, length, position in segments:
        for low in range(0, length, _RUN):
            piece = min(_RUN, length - low)
            at = position + low
            found.append(Extent(start + low, piece, Chunk(derived_key(layer_digest, at), 0, at, piece, piece)))
    return tuple(found)


def segments(extents: Iterable[Extent]) -> Segments:
    """What `runs` was made from; runs that follow one another are one again."""
    found: list[tuple[int, int, int]] = []
    for extent in extents:
        start, length, position = extent.start, extent.length, extent.chunk.offset + extent.skip
        if found and found[-1][0] + found[-1][1] == start and found[-1][2] + found[-1][1] == position:
            found[-1] = (found[-1][0], found[-1][1] + length, found[-1][2])
        else:
            found.append((start, length, position))
    return found


def encode_layer_index(index: LayerIndex) -> bytes:
    """The document; the same bytes for the same index."""
    toc = encode_toc(index.entries, layer_digest=index.digest, format="index", verification="chunk")
    points = index.gzip.points if index.gzip is not None else ()
    windows = [point.window for point in points]
    values: dict[str, Iterable[int]] = {
        "offset": _steps(point.offset for point in points),
        "position": _steps(point.position for point in points),
        "bits": (point.bits for point in points),
        "window": map(len, windows),
        "end": _steps(index.gzip.ends if index.gzip is not None else ()),
    }
    columns = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(
        b"".join(_packed(code, values[name]) for name, code in _COLUMNS) + index.digests
    )
    head = {
        "version": 1,
        "layer": index.digest,
        "size": index.size,
        "compression": index.compression,
        "unit": index.unit,
        "length": index.length,
        "points": len(points),
        "parts": [len(toc), len(columns), sum(map(len, windows))],
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    return b"".join((_MAGIC, struct.pack("<I", len(text)), text, toc, columns, *windows))


def pack_window(window: bytes) -> bytes:
    """A window as a document keeps it."""
    return zstandard.ZstdCompressor(level=3).compress(window) if window else b""


def unpack_window(packed: bytes) -> bytes:
    """FormatError unless it is a window of at most 32 KiB."""
    if not packed:
        return b""
    try:
        if not 0 < zstandard.frame_content_size(packed) <= _WINDOW:
            raise FormatError("the index has a window of the wrong size")
        return bytes(zstandard.ZstdDecompressor().decompress(packed))
    except zstandard.ZstdError as error:
        raise _damaged(f"a window, {error}") from None


def decode_layer_index(data: bytes, layer_digest: str, size: int, limits: Limits | None = None) -> LayerIndex:
    """The index of the layer with this digest and size. FormatError or LimitExceeded for whatever is not one.

    Paths, names and modes in the entries are as somebody wrote them.
    """
    limits = limits or Limits()
    if data[: len(_MAGIC)] != _MAGIC or len(data) < _HEAD:
        raise FormatError("the index of the layer is of no known version")
    (head_length,) = struct.unpack_from("<I", data, len(_MAGIC))
    head = parse_json(data[_HEAD : _HEAD + head_length], "index of the layer")
    if not isinstance(head, dict) or head.get("version") != 1:
        raise _damaged("no head")
    if head.get("layer") != layer_digest or head.get("size") != size:
        raise FormatError("the index belongs to another layer")
    unit = _number(head, "unit", 4 * KiB, limits.chunk_bytes)
    length = _number(head, "length", 0, limits.file_bytes)
    compression = head.get("compression")
    chunks, count = -(-length // unit), _number(head, "points", 0, limits.toc_entries)
    if compression not in ("none", "gzip", "zstd") or chunks > limits.toc_entries:
        raise _damaged("a compression or a number of chunks that no layer has")
    toc, packed, windows = _parts(data, head, _HEAD + head_length)
    columns, digests = _columns(packed, count, chunks if compression == "gzip" else 0, chunks)
    entries = decode_toc(toc, layer=0, layer_digest=layer_digest, limits=limits).entries
    if any(
        e.chunk.offset + e.skip + e.length > length for entry in entries if entry.inode for e in entry.inode.extents
    ):
        raise _damaged("a file outside its layer")
    access = _access(columns, windows, unit, length, size, limits) if compression == "gzip" else None
    if compression == "none" and length != size:
        raise _damaged("a length that is not the layer's")
    return LayerIndex(layer_digest, size, cast("Compression", compression), unit, length, digests, entries, access)


def _access(
    columns: Mapping[str, Sequence[int]], windows: memoryview, unit: int, length: int, size: int, limits: Limits
) -> GzipAccess:
    offsets, positions = list(accumulate(columns["offset"])), list(accumulate(columns["position"]))
    ends = list(accumulate(columns["end"]))
    cuts = list(accumulate(columns["window"], initial=0))
    if cuts[-1] != len(windows):
        raise _damaged("windows of the wrong size")
    if (ends and (ends[0] == 0 or ends[-1] > size)) or (offsets and offsets[-1] >= size):
        raise _damaged("points outside the layer")
    if any(high <= low for low, high in pairwise(positions)) or (ends and (not positions or positions[0])):
        raise _damaged("points out of order")
    if any(bits > 7 for bits in columns["bits"]):
        raise _damaged("a point with more bits than a byte has")
    rows = zip(offsets, columns["bits"], positions, pairwise(cuts), strict=True)
    access = GzipAccess(
        tuple(AccessPoint(offset, bits, at, bytes(windows[low:high])) for offset, bits, at, (low, high) in rows),
        tuple(ends),
    )
    for index, end in enumerate(ends):
        point, decoded = access.point(index * unit), min((index + 1) * unit, length)
        if not point.offset < end <= point.offset + limits.chunk_bytes:
            raise _damaged("a chunk without bytes, or with too many")
        if decoded - point.position > limits.chunk_bytes:
            raise LimitExceeded("the index has a chunk that is too far from its point")
    return access


def _parts(data: bytes, head: Mapping[str, Any], start: int) -> tuple[bytes, bytes, memoryview]:
    sizes = head.get("parts")
    if not isinstance(sizes, list) or len(sizes) != 3 or not all(type(n) is int and n >= 0 for n in sizes):
        raise _damaged("no parts")
    if start + sum(sizes) != len(data):
        raise _damaged("parts that do not add up")
    first, second, third, end = accumulate(sizes, initial=start)
    return data[first:second], data[second:third], memoryview(data)[third:end]


def _columns(packed: bytes, points: int, ends: int, chunks: int) -> tuple[dict[str, "array[int]"], bytes]:
    counts = {name: ends if name == "end" else points for name, _ in _COLUMNS}
    sizes = [counts[name] * array(code).itemsize for name, code in _COLUMNS]
    try:
        if zstandard.frame_content_size(packed) != sum(sizes) + _HASH * chunks:
            raise _damaged("columns of the wrong size")
        body = zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise _damaged(str(error)) from None
    found: dict[str, array[int]] = {}
    at = 0
    for (name, code), size in zip(_COLUMNS, sizes, strict=True):
        column = array(code, body[at : at + size])
        if sys.byteorder == "big":
            column.byteswap()
        found[name] = column
        at += size
    return found, body[at:]


def _number(head: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = head.get(key)
    if type(value) is not int or not low <= value <= high:
        raise _damaged(f"{str(value)[:40]} for a {key}")
    return value


def _steps(values: Iterable[int]) -> Iterator[int]:
    last = 0
    for value in values:
        yield value - last
        last = value


def _packed(code: str, values: Iterable[int]) -> bytes:
    column = array(code, values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def _position(point: AccessPoint) -> int:
    return point.position


def _damaged(what: str) -> FormatError:
    return FormatError(f"the index of the layer is damaged ({what})")
