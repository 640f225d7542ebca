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
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeVar

import zstandard

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.model.oci import parse_json
from ckptfs.model.packed import OnlyExtent, PackedExtents, packed
from ckptfs.model.toc import Chunk, Entry, Extent, Inode, derived_key
from ckptfs.settings import Limits

_MAGIC = b"CKPTTOC1"
_LEVEL = 3
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


class TOC(NamedTuple):
    """A layer's table of contents; `format` and `verification` are those of the layer that it was read from."""

    format: str
    verification: Literal["chunk", "transport"]
    entries: tuple[Entry, ...]


def encode_toc(
    entries: Iterable[Entry], *, layer_digest: str, format: str, verification: Literal["chunk", "transport"]
) -> bytes:
    """The document. Entries keep their order, links stay links, paths and xattrs are any bytes."""
    columns = {name: array(code) for name, code in _COLUMNS}
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
    parts: dict[str, memoryview] = {name: _packed(columns[name]) for name, _ in _COLUMNS}
    parts |= {name: memoryview(b"\0".join(found)) for name, found in (("paths", paths), ("links", links))}
    parts["hashes"] = memoryview(chunks.hashes)
    head = {
        "version": 1,
        "format": format,
        "verification": verification,
        "layer": layer_digest,
        "entries": len(paths),
        "links": len(links),
        "devices": devices,
        "xattrs": xattrs,
        "sizes": {name: part.nbytes for name, part in parts.items()},
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    pieces: list[bytes | memoryview] = [_MAGIC, struct.pack("<I", len(text)), text, *parts.values()]
    total = sum(map(len, pieces))
    # Piece by piece: in one piece it would be there three times, which is 30 MB for 100 000 files.
    stream = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compressobj(size=total)
    return b"".join([*map(stream.compress, pieces), stream.flush()])


class _ChunkColumns:
    """Numbers the chunks as they appear; a chunk that several extents share has one row."""

    def __init__(self, columns: "Mapping[str, array[int]]", layer_digest: str) -> None:
        self.hashes = bytearray()
        self._columns = columns
        self._layer_digest = layer_digest
        self._rows: dict[int, int] = {}
        self._told = array("q")  # hashes of the rows' keys, which alone would be 7 MB for 100 000 files
        self._last_row = 0
        self._last_offset = 0

    def add(self, extents: Sequence[Extent]) -> None:
        columns = self._columns
        columns["count"].append(len(extents))
        rows, end = self._rows, 0
        for extent in extents:
            chunk = extent.chunk
            key = (chunk.inner << 64 | chunk.offset) << 32 | chunk.length  # 40 bytes; a tuple of three has 150
            row, told = rows.get(key, -1), hash(chunk.key)
            if row < 0 or self._told[row] != told:  # a table may contradict itself: each file keeps what it was told
                row = rows[key] = len(self._told)
                self._told.append(told)
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
            self.hashes += chunk.digest
            return
        for flag, kind in enumerate(_KINDS):
            if derived_key(self._layer_digest, chunk.offset, chunk.inner, kind) == chunk.key:
                columns["flag"].append(flag)
                return
        columns["flag"].append(_HAS_KEY)
        self.hashes += chunk.key


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
    entries = _entries(head, parts, columns, _Chunks(columns, parts["hashes"], layer, layer_digest))
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


def _entries(
    head: Mapping[str, Any],
    parts: Mapping[str, memoryview],
    columns: Mapping[str, Sequence[int]],
    chunks: "_Chunks",
) -> tuple[Entry, ...]:
    paths = bytes(parts["paths"]).split(b"\0") if head["entries"] else []
    links = iter(bytes(parts["links"]).split(b"\0") if head.get("links") else [])
    if len(paths) != head["entries"]:
        raise _damaged("too few names")
    devices, xattrs = _indexed(head, "devices", _device), _indexed(head, "xattrs", _xattrs)
    take = _ExtentColumns(columns, chunks).take
    entries = []
    known: dict[int, int] = {}  # modes and times: a number is an object of 32 bytes, files share theirs
    rows = zip(*(columns[name] for name, _ in _ENTRY_COLUMNS), columns["count"], strict=True)
    for index, (mode, uid, gid, size, seconds, nanos, count) in enumerate(rows):
        if not mode:
            entries.append(Entry(paths[index], None, next(links, b"")))
            continue
        time = seconds * _BILLION + nanos
        inode = Inode(known.setdefault(mode, mode), uid, gid, size, known.setdefault(time, time))
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


class _Chunks:
    """The chunks by row, each made when it is first asked for; most files have one, which stays in columns."""

    def __init__(self, columns: "Mapping[str, array[int]]", hashes: memoryview, layer: int, layer_digest: str) -> None:
        steps, encoded, decoded, inner, flags = (columns[name] for name, _ in _CHUNK_COLUMNS)
        if len({len(steps), len(encoded), len(decoded), len(inner), len(flags)}) != 1:
            raise _damaged("columns of different lengths")
        self.layer = layer
        self._layer_digest = layer_digest
        self._hashes = hashes
        self._offsets = array("Q", accumulate(steps, lambda a, b: (a + b) % _MODULO))
        self._numbers = (encoded, decoded, inner, flags)
        self._hash_at = array("Q", accumulate((_HASH * (flag >= len(_KINDS)) for flag in flags), initial=0))
        self._made: dict[int, Chunk] = {}
        if self._hash_at[-1] > len(hashes) or any(len(_KINDS) <= flag < _HAS_DIGEST for flag in set(flags)):
            raise _damaged("a chunk without a key")

    def __len__(self) -> int:
        return len(self._offsets)

    def plain(self, row: int) -> tuple[int, int, int, bytes] | None:
        """(length, offset, size, digest) of a chunk that has a digest and is all that its frame holds."""
        encoded, decoded, inner, flags = self._numbers
        if flags[row] != _HAS_DIGEST or inner[row]:
            return None
        at = self._hash_at[row]
        return decoded[row], self._offsets[row], encoded[row], bytes(self._hashes[at : at + _HASH])

    def __getitem__(self, row: int) -> Chunk:
        chunk = self._made.get(row)
        if chunk is None:
            encoded, decoded, inner, flags = (column[row] for column in self._numbers)
            offset, at = self._offsets[row], self._hash_at[row]
            if flags < len(_KINDS):
                key = derived_key(self._layer_digest, offset, inner, _KINDS[flags])
            else:
                key = bytes(self._hashes[at : at + _HASH])
            digest = key if flags == _HAS_DIGEST else None
            chunk = self._made[row] = Chunk(key, self.layer, offset, encoded, decoded, digest, inner)
        return chunk


class _ExtentColumns:
    """Hands out the extents of one file after another."""

    def __init__(self, columns: Mapping[str, Sequence[int]], chunks: _Chunks) -> None:
        rows = [columns[name] for name in ("chunk", "gap", "length", "skip")]
        if len({len(row) for row in rows}) != 1:
            raise _damaged("columns of different lengths")
        self._columns = rows
        self._at = 0
        self._chunks = chunks
        self._small = PackedExtents(chunks.layer)
        self._row = 0

    def take(self, count: int, size: int) -> Sequence[Extent]:
        chunks, row, end = self._chunks, self._row, 0
        first, self._at = self._at, self._at + count
        steps, gaps, lengths, skips = self._columns
        if self._at > len(steps):
            raise _damaged("too few extents")
        if count == 1 and (only := self._only(first, size)) is not None:
            return only
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
        return packed(found) if whole else tuple(found)

    def _only(self, i: int, size: int) -> OnlyExtent | None:
        """Row `i` of a file of `size` bytes that is all in one chunk; None when it is anything else."""
        steps, gaps, lengths, skips = self._columns
        row = (self._row + steps[i]) % _MODULO
        if gaps[i] or skips[i] or row >= len(self._chunks) or not 0 < lengths[i] <= size:
            return None
        plain = self._chunks.plain(row)
        if plain is None or plain[0] != lengths[i]:
            return None
        self._row = row
        return OnlyExtent(self._small, *plain)


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


def _packed(column: "array[int]") -> memoryview:
    if sys.byteorder == "big":
        column.byteswap()
    return memoryview(column).cast("B")


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
