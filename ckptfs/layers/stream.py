"""Layers that can only be read from the front: one pass over the blob feeds every reader.

Owns the machinery that gzip.py and zstd.py share: hash, decompress, cut to the grid, scan. Judges the compression by
the bytes, because media types are often wrong about it.
"""

import hashlib
from collections.abc import Iterator
from itertools import chain

from ckptfs.errors import FormatError, IntegrityError
from ckptfs.layers.compression import DECOMPRESS, MAGIC_BYTES, Bytes, sniff
from ckptfs.layers.grid import Grid
from ckptfs.layers.protocols import Emit, Verification
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor
from ckptfs.model.toc import Chunk, Entry
from ckptfs.settings import Settings


class StreamLayer:
    """Chunk offsets and sizes are positions in the decoded stream."""

    verification: Verification = "transport"
    sequential = True

    def __init__(self, format_: str, blob: Blob, layer: int, settings: Settings) -> None:
        self.format = format_
        self._blob = blob
        self._settings = settings
        self._grid = Grid(str(blob.descriptor.digest), layer, settings.sizes.grid)

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        blob, grid, limits = self._blob, self._grid, self._settings.limits
        source = _Hashed(blob.stream(0, blob.size, attempt=attempt), blob.descriptor)
        scanner = TarScanner(grid, limits)
        try:
            compression, pieces = _sniffed(iter(source))
            # Behind the tar's end there may be padding and more: it is emitted as well, so that positions stay right.
            for index, data in enumerate(DECOMPRESS[compression](pieces, grid.unit, limits)):
                yield from scanner.feed(data)
                emit(grid.chunk(index), data)
            scanner.close()
        except FormatError:
            source.check()  # the wrong bytes from the wire are another matter than a wrong image
            raise
        source.check()

    def decode(self, chunk: Chunk, data: memoryview) -> bytes:
        raise FormatError(f"a chunk of a {self.format} layer cannot be decoded by itself")


class _Hashed:
    """Pieces of a blob, hashed as they pass."""

    def __init__(self, pieces: Iterator[Bytes], descriptor: Descriptor) -> None:
        self._pieces = pieces
        self._descriptor = descriptor
        self._hash = hashlib.new(descriptor.digest.algorithm)

    def __iter__(self) -> Iterator[Bytes]:
        for piece in self._pieces:
            self._hash.update(piece)
            yield piece

    def check(self) -> None:
        """Hash what nobody asked for, then compare: IntegrityError unless this is the blob."""
        for piece in self._pieces:
            self._hash.update(piece)
        digest, actual = self._descriptor.digest, self._hash.hexdigest()
        if actual != digest.hex and not self._descriptor.synthetic:
            raise IntegrityError(f"layer {digest} arrived with digest {digest.algorithm}:{actual}")


def _sniffed(pieces: Iterator[Bytes]) -> tuple[str, Iterator[Bytes]]:
    """What the pieces are compressed with, and all of them."""
    head = b""
    while len(head) < MAGIC_BYTES and (piece := next(pieces, b"")):
        head += bytes(piece)
    return sniff(head), chain((head,), pieces)
