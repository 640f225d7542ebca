"""A layer's complete table of contents as one small document, and back.

    zstd( magic | u32 length of the JSON | JSON | columns )

Numbers are little-endian columns, so that each compresses with its like; names are joined by NULs, which no name
contains. The node's cache keeps this for each layer it has read: the next mount needs neither network nor scan.
Disks lie, so the frame has a checksum, and no number that is read back is believed. Bytes in, values out.
"""

import base64
import json
import stat
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeVar

import zstandard

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.model.oci import parse_json
from ckptfs.model.packed import PackedExtents
from ckptfs.model.toc import Chunk, Entry, Extent, Inode, derived_key
from ckptfs.settings import Limits

_MAGIC = b"CKPTTOC1"
_LEVEL = 3
_PACK = 64  # a file of more whole chunks keeps them as columns in memory, too
_KINDS = ("raw", "grid", "frame")  # of derived keys; a chunk's flag is the index, or one of:
_HAS_DIGEST = 254
_HAS_KEY = 255
_HASH = 32
_BILLION = 1_000_000_000

# Columns of the document, in order: name and type code (array module; q and Q 8 bytes, I 4, B 1). Offsets and indices
# are kept as differences, modulo 2**64.
_ENTRY_COLUMNS = (("mode", "I"), ("uid", "I"), ("gid", "I"), ("size", "Q"), ("seconds", "q"), ("nanos", "I"))
_EXTENT_COLUMNS = (("count", "I"), ("chunk", "Q"), ("gap", "Q"), ("length", "I"), ("skip", "I"))
_CHUNK_COLUMNS = (("offset", "Q"), ("encoded", "I"), ("decoded", "I"), ("inner", "I"), ("flag", "B"))
_COLUMNS = _ENTRY_COLUMNS + _EXTENT_COLUMNS + _CHUNK_COLUMNS
_BYTES = ("paths", "links", "hashes")
_MODULO = 1 << 64
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TOC:
    """A layer's table of contents; `format` and `verification` are those of the layer that it was read from."""

    format: str
    verification: Literal["chunk", "transport"]
    entries: tuple[Entry, ...]


def encode_toc(
    entries: Iterable[Entry], *, layer_digest: str, format: str, verification: Literal["chunk", "transport"]
) -> bytes:
    """The document. Entries keep their order, links stay links, paths and xattrs are any bytes."""
    columns: dict[str, list[int]] = {name: [] for name, _ in _COLUMNS}
    mode, uid, gid, size, seconds, nanos = (columns[name].append for name, _ in _ENTRY_COLUMNS)
    paths: list[bytes] = []
    links: list[bytes] = []
    devices: dict[str, int] = {}
    xattrs: dict[str, dict[str, str]] = {}
    chunks = _ChunkColumns(columns, layer_digest)
    for index, entry in enumerate(entries):
        paths.append(entry.path)
        inode = entry.inode
        if inode is None:
            links.append(entry.link or b"")
            inode = Inode(0)
        elif inode.target:
            links.append(inode.target)
        if inode.rdev:
            devices[str(index)] = inode.rdev
        if inode.xattrs:
            xattrs[str(index)] = {_text(k): _text(v) for k, v in inode.xattrs.items()}
        mode(inode.mode)
        uid(inode.uid)
        gid(inode.gid)
        size(inode.size)
        seconds(inode.mtime_ns // _BILLION)
        nanos(inode.mtime_ns % _BILLION)
        chunks.add(inode.extents)
    parts = {name: _packed(code, columns[name]) for name, code in _COLUMNS}
    parts |= {"paths": b"\0".join(paths), "links": b"\0".join(links), "hashes": b"".join(chunks.hashes)}
    head = {
        "version": 1,
        "format": format,
        "verification": verification,
        "layer": layer_digest,
        "entries": len(paths),
        "links": len(links),
        "devices": devices,
        "xattrs": xattrs,
        "sizes": {name: len(part) for name, part in parts.items()},
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    document = b"".join((_MAGIC, struct.pack("<I", len(text)), text, *parts.values()))
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(document)


class _ChunkColumns:
    """Numbers the chunks as they appear; a chunk that several extents share has one row."""

    def __init__(self, columns: Mapping[str, list[int]], layer_digest: str) -> None:
        self.hashes: list[bytes] = []
        self._columns = columns
        self._layer_digest = layer_digest
        self._rows: dict[tuple[int, int, int], int] = {}
        self._last_row = 0
        self._last_offset = 0

    def add(self, extents: Sequence[Extent]) -> None:
        columns = self._columns
        columns["count"].append(len(extents))
        rows, end = self._rows, 0
        for extent in extents:
            chunk = extent.chunk
            row = rows.setdefault((chunk.offset, chunk.inner, chunk.length), len(rows))
            if row == len(columns["flag"]):
                self._add_chunk(chunk)
            columns["chunk"].append((row - self._last_row) % _MODULO)
            columns["gap"].append(extent.start - end)
            columns["length"].append(extent.length)
            columns["skip"].append(extent.skip)
            self._last_row = row
            end = extent.start + extent.length

    def _add_chunk(self, chunk: Chunk) -> None:
        columns = self._columns
        columns["offset"].append((chunk.offset - self._last_offset) % _MODULO)
        columns["encoded"].append(chunk.size)
        columns["decoded"].append(chunk.length)
        columns["inner"].append(chunk.inner)
        self._last_offset = chunk.offset
        if chunk.digest is not None and chunk.digest == chunk.key:
            columns["flag"].append(_HAS_DIGEST)
            self.hashes.append(chunk.digest)
            return
        for flag, kind in enumerate(_KINDS):
            if derived_key(self._layer_digest, chunk.offset, chunk.inner, kind) == chunk.key:
                columns["flag"].append(flag)
                return
        columns["flag"].append(_HAS_KEY)
        self.hashes.append(chunk.key)


def decode_toc(data: bytes, *, layer: int, layer_digest: str, limits: Limits | None = None) -> TOC:
    """The table of contents of the layer with this digest; `layer` is what its chunks will say.

    FormatError or LimitExceeded for a document that is damaged, belongs to another layer, or is of another version.
    """
    limits = limits or Limits()
    head, body = _opened(data, limits)
    if head.get("version") != 1 or head.get("layer") != layer_digest:
        raise FormatError("the table of contents is of another version or another layer")
    parts = _parts(head, body)
    columns = {name: _unpacked(code, parts[name]) for name, code in _COLUMNS}
    count = head.get("entries")
    if type(count) is not int or any(len(columns[name]) != count for name in ("count", *dict(_ENTRY_COLUMNS))):
        raise _damaged("columns of different lengths")
    if count > limits.toc_entries:
        raise LimitExceeded(f"the table of contents has {count} entries, more than {limits.toc_entries}")
    verification = head.get("verification")
    if verification not in ("chunk", "transport") or not isinstance(head.get("format"), str):
        raise _damaged("no format")
    entries = _entries(head, parts, columns, _chunks(columns, parts["hashes"], layer, layer_digest))
    return TOC(head["format"], verification, entries)


def _opened(data: bytes, limits: Limits) -> tuple[dict[str, Any], memoryview]:
    try:
        size = zstandard.frame_content_size(data)
        if size > limits.toc_bytes:
            raise LimitExceeded(f"the table of contents has {size} bytes, more than {limits.toc_bytes}")
        if size < len(_MAGIC) + 4:
            raise _damaged("no size")
        whole = memoryview(zstandard.ZstdDecompressor().decompress(data))
    except zstandard.ZstdError as error:
        raise _damaged(str(error)) from None
    behind = len(_MAGIC) + 4
    (length,) = struct.unpack("<I", whole[len(_MAGIC) : behind])
    if whole[: len(_MAGIC)] != _MAGIC or length > len(whole) - behind:
        raise _damaged("no magic number")
    head = parse_json(bytes(whole[behind : behind + length]), "table of contents")
    if not isinstance(head, dict):
        raise _damaged("no head")
    return head, whole[behind + length :]


def _parts(head: Mapping[str, Any], body: memoryview) -> dict[str, memoryview]:
    names = [*(name for name, _ in _COLUMNS), *_BYTES]
    sizes = head.get("sizes")
    if not isinstance(sizes, dict) or not all(type(sizes.get(name)) is int and sizes[name] >= 0 for name in names):
        raise _damaged("no sizes")
    if sum(sizes[name] for name in names) != len(body):
        raise _damaged("sizes that do not add up")
    ends = list(accumulate((sizes[name] for name in names), initial=0))
    return {name: body[low:high] for name, low, high in zip(names, ends, ends[1:], strict=False)}


def _chunks(columns: Mapping[str, Sequence[int]], hashes: memoryview, layer: int, layer_digest: str) -> list[Chunk]:
    rows = [columns[name] for name, _ in _CHUNK_COLUMNS]
    if len({len(row) for row in rows}) != 1:
        raise _damaged("columns of different lengths")
    used = offset = 0
    chunks = []
    for step, encoded, decoded, inner, flag in zip(*rows, strict=True):
        offset = (offset + step) % _MODULO
        digest = None
        if flag < len(_KINDS):
            key = derived_key(layer_digest, offset, inner, _KINDS[flag])
        else:
            key = bytes(hashes[used : used + _HASH])
            used += _HASH
            if len(key) != _HASH or flag < _HAS_DIGEST:
                raise _damaged("a chunk without a key")
            digest = key if flag == _HAS_DIGEST else None
        chunks.append(Chunk(key, layer, offset, encoded, decoded, digest, inner))
    return chunks


def _entries(
    head: Mapping[str, Any],
    parts: Mapping[str, memoryview],
    columns: Mapping[str, Sequence[int]],
    chunks: Sequence[Chunk],
) -> tuple[Entry, ...]:
    paths = bytes(parts["paths"]).split(b"\0") if head["entries"] else []
    links = iter(bytes(parts["links"]).split(b"\0") if head.get("links") else [])
    if len(paths) != head["entries"]:
        raise _damaged("too few names")
    devices, xattrs = _indexed(head, "devices", _device), _indexed(head, "xattrs", _xattrs)
    take = _ExtentColumns(columns, chunks).take
    entries = []
    rows = zip(*(columns[name] for name, _ in _ENTRY_COLUMNS), columns["count"], strict=True)
    for index, (mode, uid, gid, size, seconds, nanos, count) in enumerate(rows):
        if not mode:
            entries.append(Entry(paths[index], None, next(links, b"")))
            continue
        inode = Inode(mode, uid, gid, size, seconds * _BILLION + nanos)
        if count:
            inode.extents = take(count, size)
        if stat.S_ISLNK(mode):
            inode.target = next(links, b"")
        if index in devices:
            inode.rdev = devices[index]
        if index in xattrs:
            inode.xattrs = xattrs[index]
        entries.append(Entry(paths[index], inode))
    return tuple(entries)


class _ExtentColumns:
    """Hands out the extents of one file after another."""

    def __init__(self, columns: Mapping[str, Sequence[int]], chunks: Sequence[Chunk]) -> None:
        rows = [columns[name] for name in ("chunk", "gap", "length", "skip")]
        if len({len(row) for row in rows}) != 1:
            raise _damaged("columns of different lengths")
        self._columns = rows
        self._at = 0
        self._chunks = chunks
        self._row = 0

    def take(self, count: int, size: int) -> Sequence[Extent]:
        chunks, row, end = self._chunks, self._row, 0
        first, self._at = self._at, self._at + count
        steps, gaps, lengths, skips = self._columns
        if self._at > len(steps):
            raise _damaged("too few extents")
        found = []
        whole = True
        for i in range(first, self._at):
            row = (row + steps[i]) % _MODULO
            gap, length, skip = gaps[i], lengths[i], skips[i]
            if row >= len(chunks):
                raise _damaged("an extent without a chunk")
            chunk = chunks[row]
            if not length or skip + length > chunk.length:
                raise _damaged("an extent outside its chunk")
            found.append(Extent(end + gap, length, chunk, skip))
            end += gap + length
            whole = whole and length == chunk.length and chunk.digest is not None and not chunk.inner
        self._row = row
        if end > size:
            raise _damaged("extents that reach beyond their file")
        if not whole or count <= _PACK:
            return tuple(found)
        packed = PackedExtents(found[0].chunk.layer)
        for extent in found:
            packed.append(extent.start, extent.length, extent.chunk.offset, extent.chunk.size, extent.chunk.key)
        return packed


def _indexed(head: Mapping[str, Any], key: str, convert: Callable[[object], _T]) -> dict[int, _T]:
    value = head.get(key)
    try:
        if isinstance(value, dict):
            return {int(index): convert(item) for index, item in value.items()}
    except ValueError:
        pass
    raise _damaged(key)


def _device(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _xattrs(value: object) -> dict[bytes, bytes]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(value)
    return {base64.b64decode(k): base64.b64decode(v) for k, v in value.items()}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _packed(code: str, values: Sequence[int]) -> bytes:
    column = array(code, values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def _unpacked(code: str, data: memoryview) -> "array[int]":
    column = array(code)
    if len(data) % column.itemsize:
        raise _damaged("half a number")
    column.frombytes(data)
    if sys.byteorder == "big":
        column.byteswap()
    return column


def _damaged(what: str) -> FormatError:
    return FormatError(f"the kept table of contents is damaged ({what})")
