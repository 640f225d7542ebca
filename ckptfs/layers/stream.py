"""gzip and zstd layers without an index of their own, which can only be read from the front.

One pass over the blob feeds every reader: hash, decompress, cut to the grid, scan. Judges the compression by
the bytes, because media types are often wrong about it. What one pass has learnt can be kept, as a `LayerIndex`.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Literal, NamedTuple

from ckptfs.errors import FormatError, IntegrityError
from ckptfs.layers.compression import DECOMPRESS, MAGIC_BYTES, Bytes, sniff
from ckptfs.layers.grid import Grid, segments_of, stream_unit
from ckptfs.layers.gzip_index import PointFinder, can_find_points
from ckptfs.layers.media_types import compression_of
from ckptfs.layers.protocols import Emit, Verification
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.model.blob import Blob, HashedStream
from ckptfs.model.layer_index import Compression, GzipAccess, LayerIndex, runs
from ckptfs.model.oci import Descriptor
from ckptfs.model.toc import Chunk, Entry
from ckptfs.settings import Settings

_FORMATS: dict[Compression, str] = {"none": "tar", "gzip": "gzip", "zstd": "zstd"}


class StreamFormat:
    """Layers of one compression; podman and buildah write zstd as one frame."""

    def __init__(self, name: Literal["gzip", "zstd"]) -> None:
        self.name = name

    def matches(self, descriptor: Descriptor) -> bool:
        return compression_of(descriptor.media_type) == self.name

    def open(self, blob: Blob, layer: int, settings: Settings) -> "StreamLayer":
        return StreamLayer(self.name, blob, layer, settings)


class StreamLayer:
    """Chunk offsets and sizes are positions in the decoded stream."""

    verification: Verification = "transport"
    sequential = True

    def __init__(self, format_: str, blob: Blob, layer: int, settings: Settings, *, sparse: bool = False) -> None:
        """`sparse`: what a scan learns is for others, and to be small; see `PointFinder`."""
        self.format = format_
        self._blob = blob
        self._settings = settings
        unit = stream_unit(blob.size, settings.sizes) if format_ == "gzip" else settings.sizes.grid
        self._grid = Grid(str(blob.descriptor.digest), layer, unit, compression=format_)
        self._sparse = sparse
        self._learnt: _Learnt | None = None
        self.learning = True  # False: no index is wanted, and a pass costs a third less

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        blob, grid, limits = self._blob, self._grid, self._settings.limits
        source = HashedStream(blob, attempt=attempt)
        scanner = TarScanner(grid, limits)
        digests, length = bytearray(), 0
        finder = PointFinder(sparse=self._sparse)
        try:
            compression, pieces = _sniffed(iter(source))
            finding = self.learning and compression == "gzip" and can_find_points()
            decompress = finder.inflated if finding else DECOMPRESS[compression]
            # Behind the tar's end there may be padding and more: it is emitted as well, so that positions stay right.
            for index, data in enumerate(decompress(pieces, grid.unit, limits)):
                if self.learning:
                    digests += self._checked(index, hashlib.sha256(data).digest())
                yield from scanner.feed(data)
                length += len(data)
                emit(grid.chunk(index), data)
            scanner.close()
        except FormatError:
            source.check()  # the wrong bytes from the wire are another matter than a wrong image
            raise
        source.check()
        if self.learning:
            self._learnt = _Learnt(compression, length, bytes(digests), finder.access)

    def _checked(self, index: int, digest: bytes) -> bytes:
        """The digest of a chunk, of which a complete scan has learnt what it is."""
        learnt = self._learnt
        if learnt is not None and not learnt.digests.startswith(digest, index * len(digest)):
            raise IntegrityError(
                f"chunk {index} of {self._blob.descriptor.digest} arrived with other bytes than before"
            )
        return digest

    @property
    def found(self) -> str | None:
        """The format that the bytes were of when all of them had passed; media types are often wrong about it."""
        return _FORMATS[self._learnt.compression] if self._learnt is not None else None

    def index(self, entries: Iterable[Entry]) -> LayerIndex | None:
        """What a complete scan has learnt, `entries` being what it gave.

        None where no index can be made: the media type is wrong about the compression, or gzip without access points.
        """
        learnt, blob, digest = self._learnt, self._blob, str(self._blob.descriptor.digest)
        if learnt is None or self.found != self.format:
            return None
        if learnt.compression == "gzip" and learnt.access is None and learnt.length:
            return None
        return LayerIndex(
            digest,
            blob.size,
            learnt.compression,
            self._grid.unit,
            learnt.length,
            learnt.digests,
            tuple(_as_run(entry, digest) for entry in entries),
            learnt.access or (GzipAccess((), ()) if learnt.compression == "gzip" else None),
        )

    def decode(self, chunk: Chunk, data: memoryview) -> bytes:
        raise FormatError(f"a chunk of a {self.format} layer cannot be decoded by itself")


class _Learnt(NamedTuple):
    compression: Compression
    length: int
    digests: bytes
    access: GzipAccess | None


def _as_run(entry: Entry, layer_digest: str) -> Entry:
    inode = entry.inode
    if inode is None or not inode.extents:
        return entry
    return Entry(entry.path, replace(inode, extents=runs(segments_of(inode.extents), layer_digest)), entry.link)


def _sniffed(pieces: Iterator[Bytes]) -> tuple[Compression, Iterator[Bytes]]:
    """What the pieces are compressed with, and all of them."""
    head = b""
    while len(head) < MAGIC_BYTES and (piece := next(pieces, b"")):
        head += bytes(piece)
    return sniff(head), chain((head,), pieces)
