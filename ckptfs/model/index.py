"""The inline index: all that a reader needs before the first page, in one document that the manifest's digest covers.

    zstd( magic | u32 length of the JSON | JSON | columns of chunks | contents of small files )

The JSON lists the files of every layer, and says which digests its chunks have. A file whose content is in the
document needs none. The columns of a very large file can be left to its layer, in a skippable frame that the document
names by place and digest (`Table`), and of which parts can be read by themselves; so are always those of cells, the
smaller pieces that two dumps of a process share: only who has an earlier dump needs them.

Bytes in, values out; written by push/, read by image/. The document comes from whoever pushed the image: everything in
it is bounded and checked here, once.
"""

import base64
import json
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import zstandard

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.index_columns import ColumnReader, ColumnWriter, Row
from ckptfs.model.index_table import Table as Table
from ckptfs.model.index_table import decompress
from ckptfs.model.index_table import encode_table as encode_table
from ckptfs.model.oci import Digest, Manifest, parse_json
from ckptfs.model.paths import MOST_DEVICE, check_xattr, plain, symlink_target
from ckptfs.model.times import MOST
from ckptfs.model.toc import Entry, Extent, Inode
from ckptfs.settings import Limits, MiB

ANNOTATION_INDEX = "dev.ckptfs.index"
INLINE_BYTES = 1 * MiB  # of base64 in an annotation: registries take manifests of 4 MiB

_MAGIC = b"CKPTIDX3"  # layers name the digest of their chunks: readers of before would take any for SHA-256
_MAGICS = (b"CKPTIDX1", b"CKPTIDX2", _MAGIC)  # 2: tables have parts; otherwise each is read as the next one
_LEVEL = 9
_TYPES = frozenset((stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO))
_HEAD = len(_MAGIC) + 4


class IndexedFile(NamedTuple):
    """One entry of a layer.

    offset, rows  of a file with bytes: its chunks, frames that follow one another in the blob from `offset` on.
    content       its bytes, for small files that are read first.
    table         where the rows are instead.
    cells         where the rows of its cells are: the same frames, in smaller pieces.
    eager         (start, length) of the parts of a pages file that no lazy restore can do without; None: not told.
    """

    entry: Entry
    offset: int = 0
    rows: Sequence[Row] = ()
    content: bytes | None = None
    table: Table | None = None
    cells: Table | None = None
    eager: Sequence[tuple[int, int]] | None = None


class IndexedLayer(NamedTuple):
    """Digest and size of the blob, as the manifest has them, and its files in archive order.

    chunk_digest  what the digests in rows and tables are.
    """

    digest: Digest
    size: int
    files: Sequence[IndexedFile]
    chunk_digest: ChunkDigest = ChunkDigest.SHA256

    @property
    def entries(self) -> list[Entry]:
        return [file.entry for file in self.files]


class ImageIndex(NamedTuple):
    """`contents`: chunks that came along, by key."""

    layers: Sequence[IndexedLayer]
    contents: Mapping[bytes, bytes] = {}


def encode_index(layers: Iterable[IndexedLayer]) -> bytes:
    """The document, compressed; the same bytes for the same layers."""
    columns = ColumnWriter()
    contents: list[bytes] = []
    described = []
    for layer in layers:
        files = []
        for file in layer.files:
            files.append(_describe(file))
            if file.table is None:
                columns.add(file.rows, digests=file.content is None)
            if file.content is not None:
                contents.append(file.content)
        told = {} if layer.chunk_digest is ChunkDigest.SHA256 else {"chunks": layer.chunk_digest.value}
        described.append({"digest": str(layer.digest), "size": layer.size, **told, "files": files})
    text = json.dumps({"layers": described}, separators=(",", ":")).encode()
    body = b"".join((_MAGIC, struct.pack("<I", len(text)), text, columns.encode(), *contents))
    return zstandard.ZstdCompressor(level=_LEVEL).compress(body)


def decode_index(
    data: bytes, *, first_layer: int = 0, limits: Limits | None = None, with_rows: bool = False
) -> ImageIndex:
    """The index out of its document. Layer n of it has the number `first_layer` + n in its chunks.

    Files whose rows are in a table have no extents yet: `load_table`. FormatError for whatever is not as it should be.
    with_rows: keep the rows as they were written, to write the layers into another image's index.
    """
    limits = limits or Limits()
    body = decompress(data, limits.toc_bytes)
    if body[: len(_MAGIC)] not in _MAGICS or len(body) < _HEAD:
        raise FormatError("the index is of no known version", hint="install a newer ckptfs")
    (length,) = struct.unpack_from("<I", body, len(_MAGIC))
    document = parse_json(body[_HEAD : _HEAD + length], "index")
    described = document.get("layers") if isinstance(document, dict) else None
    if not isinstance(described, list) or len(described) > limits.layers:
        raise FormatError("the index has no list of layers, or too many")
    reader = _Reader(body, _HEAD + length, [_layer(value, limits) for value in described], limits, with_rows)
    return reader.read(first_layer)


def manifest_index(
    manifest: Manifest, *, first_layer: int = 0, limits: Limits | None = None, with_rows: bool = False
) -> ImageIndex | None:
    """The index that a manifest brings along, as `decode_index` gives it; None without one.

    FormatError also for one that describes other layers than the manifest has.
    """
    text = manifest.annotations.get(ANNOTATION_INDEX)
    if text is None:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise FormatError("the index is not base64") from None
    index = decode_index(data, first_layer=first_layer, limits=limits, with_rows=with_rows)
    if [(layer.digest, layer.size) for layer in index.layers] != [(d.digest, d.size) for d in manifest.layers]:
        raise FormatError("the index describes other layers")
    return index


def load_table(file: IndexedFile, data: bytes, layer: int, layer_size: int, limits: Limits | None = None) -> None:
    """Give `file` the extents that `data`, the bytes its table points to, describes. IntegrityError, FormatError."""
    if file.entry.inode is not None and file.table is not None:
        file.entry.inode.extents = _table_extents(file, file.table, data, layer, layer_size, limits)


def read_cells(
    file: IndexedFile, data: bytes, layer: int, layer_size: int, limits: Limits | None = None
) -> Sequence[Extent]:
    """The cells of `file` as extents, out of the bytes that its table of cells points to; zeros are gaps."""
    return _table_extents(file, file.cells, data, layer, layer_size, limits) if file.cells is not None else ()


def _table_extents(
    file: IndexedFile, table: Table, data: bytes, layer: int, layer_size: int, limits: Limits | None
) -> Sequence[Extent]:
    size = file.entry.inode.size if file.entry.inode is not None else 0
    return table.extents(data, size, layer, file.offset, layer_size, limits or Limits())


def _describe(file: IndexedFile) -> dict[str, Any]:
    entry = file.entry
    out: dict[str, Any] = {"path": _text(entry.path)}
    if entry.link is not None:
        return {**out, "link": _text(entry.link)}
    inode = entry.inode or Inode(stat.S_IFREG)
    out |= {"mode": inode.mode, "uid": inode.uid, "gid": inode.gid, "mtime": inode.mtime_ns}
    if inode.target:
        out["target"] = _text(inode.target)
    if inode.rdev:
        out["rdev"] = inode.rdev
    if inode.xattrs:
        out["xattrs"] = {_text(k): base64.b64encode(inode.xattrs[k]).decode() for k in sorted(inode.xattrs)}
    if inode.size and inode.is_file:
        out |= {"size": inode.size, "offset": file.offset}
        if file.table is not None:
            out["table"] = file.table.to_json()
            if file.table.parts:
                out["parts"] = file.table.parts_to_json()
        else:
            out["rows"] = len(file.rows)
        if file.cells is not None:
            out["cells"] = file.cells.to_json()
        if file.content is not None:
            out["content"] = True
    if file.eager is not None:
        out["eager"] = [number for pair in file.eager for number in pair]
    return out


class _Described(NamedTuple):
    """A layer as the JSON has it, judged but for its files."""

    digest: Digest
    size: int
    files: list[dict[str, Any]]
    chunk_digest: ChunkDigest


class _Reader:
    """Reads the files of one document; the JSON of its layers has been judged already."""

    def __init__(
        self,
        body: bytes,
        position: int,
        layers: list[_Described],
        limits: Limits,
        with_rows: bool,
    ) -> None:
        self._body = body
        self._with_rows = with_rows
        self._limits = limits
        self._layers = layers
        rows = inline = without = 0
        for layer in layers:
            for file in layer.files:
                count = _integer(file, "rows", 0, limits.toc_entries)
                rows += count
                if file.get("content") is True:
                    inline += _integer(file, "size", 0, limits.toc_bytes)
                    without += count
        if rows > limits.toc_entries:
            raise LimitExceeded(f"the index has {rows} chunks, more than {limits.toc_entries}")
        self._columns = ColumnReader(body, position, rows, limits)
        self._contents_at = len(body) - inline
        self._position = self._contents_at
        self.contents: dict[bytes, bytes] = {}

    def read(self, first_layer: int) -> ImageIndex:
        layers = [
            IndexedLayer(it.digest, it.size, [self._file(value, number, it) for value in it.files], it.chunk_digest)
            for number, it in enumerate(self._layers, start=first_layer)
        ]
        self._columns.finished()
        if self._columns.position != self._contents_at:
            raise FormatError("the index has more or fewer digests than chunks")
        return ImageIndex(layers, self.contents)

    def _file(self, value: dict[str, Any], layer: int, of: _Described) -> IndexedFile:
        limits, end = self._limits, of.size
        path = _path(value.get("path"), limits)
        if "link" in value:
            return IndexedFile(Entry(path, None, _path(value["link"], limits)))
        inode = Inode(
            mode=_integer(value, "mode", 0, 0o177777),
            uid=_integer(value, "uid", 0, (1 << 32) - 1),
            gid=_integer(value, "gid", 0, (1 << 32) - 1),
            size=_integer(value, "size", 0, limits.file_bytes),
            mtime_ns=_integer(value, "mtime", -MOST, MOST),
            rdev=_integer(value, "rdev", 0, MOST_DEVICE),
            target=_target(value.get("target", ""), path, limits),
            xattrs=_xattrs(value.get("xattrs"), limits),
        )
        if stat.S_IFMT(inode.mode) not in _TYPES or (inode.size and not inode.is_file):
            raise FormatError(f"the index has a file of type {stat.S_IFMT(inode.mode):#o} and {inode.size} bytes")
        if stat.S_ISLNK(inode.mode) != bool(inode.target):
            raise FormatError("the index has a symbolic link without a target, or a target without a link")
        if inode.target:
            inode.size = len(inode.target)
            return IndexedFile(Entry(path, inode))
        offset = _integer(value, "offset", 0, end)
        rows = _integer(value, "rows", 0, limits.toc_entries)
        kept = self._columns.coming(rows, offset) if self._with_rows else ()
        content, table = None, None
        cells = Table.from_json(value["cells"], None, end, inode.size, limits) if "cells" in value else None
        if "table" in value:
            table = Table.from_json(value["table"], value.get("parts"), end, inode.size, limits)
        elif value.get("content") is True:
            content = self._body[self._position : self._position + inode.size]
            self._position += inode.size
            inode.extents = self._columns.extents_of(content, rows, layer, offset, end, of.chunk_digest)
            for extent in inode.extents:
                self.contents[extent.chunk.key] = content[extent.start : extent.start + extent.length]
        else:
            inode.extents = self._columns.extents(rows, inode.size, layer, offset, end)
        eager = _eager(value.get("eager"), inode.size)
        return IndexedFile(Entry(path, inode), offset, kept, content, table, cells, eager)


def _layer(value: object, limits: Limits) -> _Described:
    if not isinstance(value, dict) or not isinstance(value.get("digest"), str):
        raise FormatError("the index has a layer without a digest")
    files = value.get("files")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise FormatError("the index has a layer without a list of files")
    if len(files) > limits.toc_entries:
        raise LimitExceeded(f"the index has {len(files)} files, more than {limits.toc_entries}")
    chunk_digest = ChunkDigest.named(value.get("chunks", ChunkDigest.SHA256.value))
    return _Described(Digest.parse(value["digest"]), _integer(value, "size", 0, 1 << 62), files, chunk_digest)


def _integer(value: dict[str, Any], key: str, low: int, high: int) -> int:
    """The number at `key`, 0 where there is none; FormatError unless it lies in [low, high]."""
    number = value.get(key, 0)
    if type(number) is not int or not low <= number <= high:
        raise FormatError(f"the index has {str(number)[:40]} for a {key}")
    return number


def _eager(value: object, size: int) -> list[tuple[int, int]] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) % 2 or not all(type(n) is int for n in value):
        raise FormatError("the index has eager pages that are no ranges")
    ranges = list(zip(value[::2], value[1::2], strict=True))
    at = 0
    for start, length in ranges:
        if start < at or length <= 0 or start + length > size:
            raise FormatError("the index has eager pages out of order or outside their file")
        at = start + length
    return ranges


def _path(value: object, limits: Limits) -> bytes:
    if not isinstance(value, str):
        raise FormatError("the index has a file without a path")
    return plain(_bytes(value), limits)


def _target(value: object, path: bytes, limits: Limits) -> bytes:
    """b"" for what is no symbolic link."""
    if not isinstance(value, str):
        raise FormatError("the index has a symbolic link to no path")
    return symlink_target(_bytes(value), path, limits) if value else b""


def _xattrs(value: object, limits: Limits) -> dict[bytes, bytes]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormatError("the index has extended attributes that are no object")
    out: dict[bytes, bytes] = {}
    for key, text in value.items():
        try:
            data = base64.b64decode(text, validate=True)
        except (ValueError, TypeError):
            raise FormatError("the index has an extended attribute that is not base64") from None
        name = _bytes(key)
        check_xattr(name, data, limits)
        out[name] = data
    return out


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _bytes(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise FormatError("the index has a name that is no text") from None
