"""Layers of plain tar, gzip or zstd for which somebody has made an index: known at once, and checked chunk by chunk.

gzip is read from access points and plain tar by ranges; zstd in one frame still comes as a stream, but each of its
chunks is checked before anybody sees it. Owns the judgement of indexes that come from elsewhere; who is asked for them
is image/'s matter.
"""

import hashlib
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ckptfs.errors import FormatError, IntegrityError
from ckptfs.layers.compression import DECOMPRESS, MAGIC_BYTES, Bytes, sniff
from ckptfs.layers.deflate import inflate_from
from ckptfs.layers.grid import Grid
from ckptfs.layers.protocols import Emit, Verification
from ckptfs.model.blob import Blob
from ckptfs.model.layer_index import LayerIndex, decode_layer_index, segments, unpack_window
from ckptfs.model.oci import Descriptor
from ckptfs.model.paths import MOST_DEVICE, check_xattr, plain, show, symlink_target
from ckptfs.model.times import MOST
from ckptfs.model.toc import Chunk, Entry, Inode
from ckptfs.settings import Limits, Settings

_TYPES = frozenset((stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO))


class Indexed:
    """A layer's index as a side document.

    own   made on this node from a stream that had the layer's digest: its chunks are those of the stream, by the same
          keys. Of an index from elsewhere the chunks are named by their digests, so that it can spoil nothing but the
          image that it was found with.
    """

    def __init__(self, index: LayerIndex, own: bool, settings: Settings) -> None:
        self.index = index
        self.own = own
        self.settings = settings

    @classmethod
    def parse(cls, document: bytes, descriptor: Descriptor, settings: Settings, *, own: bool) -> "Indexed":
        """FormatError or LimitExceeded for whatever is not a sound index of this layer."""
        index = decode_layer_index(document, str(descriptor.digest), descriptor.size, settings.limits)
        if not own:
            for entry in index.entries:
                _judge(entry, settings.limits)
        return cls(index, own, settings)

    def open(self, blob: Blob, layer: int) -> "IndexedLayer":
        kind = {"none": IndexedLayer, "gzip": IndexedGzipLayer, "zstd": IndexedStream}[self.index.compression]
        return kind(self, blob, layer)


class IndexedLayer:
    """Plain tar; the base of the others. Chunk offsets are positions in the blob."""

    sequential = False

    def __init__(self, document: Indexed, blob: Blob, layer: int) -> None:
        index = document.index
        names = {"none": "tar", "gzip": "gzip", "zstd": "zstd"}
        self.format = f"{names[index.compression]}+index"
        # The digest of a local file or of a file inside an image names it and was never checked.
        self.verification: Verification = "transport" if blob.descriptor.synthetic else "chunk"
        self._blob = blob
        self._index = index
        self._limits = document.settings.limits
        self._grid = _IndexGrid(index, layer, document.own)
        self.entries: Sequence[Entry] | None = [self._placed(entry) for entry in index.entries]

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        yield from self.entries or ()

    def decode(self, chunk: Chunk, data: memoryview) -> Bytes:
        decoded = self._unpack(chunk, data)
        if hashlib.sha256(decoded).digest() != chunk.digest:
            raise IntegrityError(f"the chunk at byte {chunk.offset} of {self._blob.descriptor.digest} is damaged")
        return decoded

    def _unpack(self, chunk: Chunk, data: memoryview) -> Bytes:
        return data

    def _placed(self, entry: Entry) -> Entry:
        inode = entry.inode
        if inode is None:
            return entry
        return Entry(entry.path, replace(inode, extents=self._grid.extents(segments(inode.extents))))


class IndexedGzipLayer(IndexedLayer):
    """Chunks are inflated from the access point before them."""

    def __init__(self, document: Indexed, blob: Blob, layer: int) -> None:
        super().__init__(document, blob, layer)
        access = document.index.gzip
        self._points = {point.offset: point for point in access.points} if access is not None else {}

    def _unpack(self, chunk: Chunk, data: memoryview) -> Bytes:
        point = self._points.get(chunk.offset)
        if point is None:
            raise IntegrityError(f"no access point for byte {chunk.offset} of {self._blob.descriptor.digest}")
        window = unpack_window(point.window)
        return inflate_from(window, point.bits, data, chunk.inner, chunk.length, self._limits)


class IndexedStream(IndexedLayer):
    """zstd: a stream as in stream.py, whose entries are known and whose chunks are checked as they pass."""

    sequential = True

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        blob, grid = self._blob, self._grid
        yield from self.entries or ()
        pieces = blob.stream(0, blob.size, attempt=attempt)
        try:
            for number, data in enumerate(DECOMPRESS["zstd"](_zstd_only(pieces), grid.unit, self._limits)):
                chunk = grid.chunk(number)
                super().decode(chunk, memoryview(data))
                emit(chunk, data)
        except FormatError as error:
            raise IntegrityError(f"layer {blob.descriptor.digest}: {error.message}") from None

    def decode(self, chunk: Chunk, data: memoryview) -> Bytes:
        raise FormatError(f"a chunk of a {self.format} layer cannot be decoded by itself")


class _IndexGrid(Grid):
    """A grid whose chunks have digests, and a place in the blob."""

    def __init__(self, index: LayerIndex, layer: int, own: bool) -> None:
        super().__init__(index.digest, layer, index.unit, index.length, compression=index.compression)
        self._index = index
        self._own = own

    def _made(self, index: int) -> Chunk:
        at = self._index
        start = index * at.unit
        length = min(at.unit, at.length - start)
        digest = at.chunk_digest(index)
        key = self.key(index) if self._own else digest
        if at.gzip is None:
            return Chunk(key, self._layer, start, length, length, digest)
        point = at.gzip.point(start)
        size = at.gzip.ends[index] - point.offset
        return Chunk(key, self._layer, point.offset, size, length, digest, start - point.position)


def _zstd_only(pieces: Iterator[Bytes]) -> Iterator[Bytes]:
    first = True
    for piece in pieces:
        if first and sniff(piece[:MAGIC_BYTES]) != "zstd":
            raise FormatError("the layer is not zstd, as its index says")
        first = False
        yield piece


def _judge(entry: Entry, limits: Limits) -> None:
    """FormatError unless this is an entry that a scan of a tar could have given."""
    inode = entry.inode
    plain(entry.path, limits)
    if inode is None:
        if entry.link is None:
            raise FormatError(f"the index has a link from {show(entry.path)} to no path")
        plain(entry.link, limits)
        return
    _judge_inode(inode, entry.path, limits)


def _judge_inode(inode: Inode, path: bytes, limits: Limits) -> None:
    kind = stat.S_IFMT(inode.mode)
    if kind not in _TYPES or inode.mode >> 16 or (not path and kind != stat.S_IFDIR):
        raise FormatError(f"the index has the mode {inode.mode:o} for {show(path)}")
    if kind == stat.S_IFLNK:
        symlink_target(inode.target, path, limits)
        if inode.size != len(inode.target):
            raise FormatError(f"the index has the size {inode.size} for the symbolic link {show(path)}")
    elif inode.size > limits.file_bytes or (kind != stat.S_IFREG and inode.size):
        raise FormatError(f"the index has the size {inode.size} for {show(path)}")
    if inode.extents and kind != stat.S_IFREG:
        raise FormatError(f"the index has bytes for {show(path)}, which is no file")
    if abs(inode.mtime_ns) > MOST:
        raise FormatError(f"the index has a time for {show(path)} that no clock shows")
    if inode.rdev > MOST_DEVICE:
        raise FormatError(f"the index has no device numbers for {show(path)}")
    for name, value in inode.xattrs.items():
        check_xattr(name, value, limits)
