"""What the layers with a table of contents share: read it once, check every chunk.

Subclasses (zstd_chunked.py, estargz.py) know where the table is and how a chunk is compressed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

from ckptfs.errors import FormatError, IntegrityError
from ckptfs.layers.compression import Bytes
from ckptfs.layers.protocols import Emit, OtherFormat, Verification
from ckptfs.model.blob import Blob
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.toc import Chunk, Entry
from ckptfs.settings import Settings

# The stargz snapshotter's annotation, on eStargz layers and on its own kind of zstd:chunked: of the JSON, uncompressed.
ANNOTATION_TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"


class TocLayer(ABC):
    """Random access, every chunk with a digest.

    stream        what a layer is to who does not look at its table.
    table         the digest of the table, as the manifest has it: of one layer, two images may name two tables.
    chunk_digest  which one: another than the table's where the chunks are told by an image's index.
    """

    format: str
    stream: Literal["gzip", "zstd"]
    table: str
    verification: Verification = "chunk"
    chunk_digest = ChunkDigest.SHA256
    sequential = False

    def __init__(self, blob: Blob, layer: int, settings: Settings) -> None:
        self._blob = blob
        self._layer = layer
        self._settings = settings

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        try:
            text, end, more = self._table(attempt)
        except (FormatError, IntegrityError):
            # Nothing vouches for the bytes until the digest fits: ask elsewhere before blaming the image.
            text, end, more = self._table(attempt + 1)
        from ckptfs.layers.toc_json import parse_toc  # not for layers whose chunks an index tells

        try:
            document = text.decode()
        except UnicodeDecodeError:
            raise FormatError("the table of contents is not JSON, which is UTF-8") from None
        del text  # 31 MB for 100 000 files, and as much decoded
        if "\\ufffd" in document:  # what Go's JSON makes of a byte that is not UTF-8; it writes a real U+FFFD as it is
            from ckptfs.layers.stream import StreamFormat

            said = f"the table of contents of layer {self._blob.descriptor.digest} has lost names that are not UTF-8"
            raise OtherFormat(said, StreamFormat(self.stream))
        entries = parse_toc(document, end=end, layer=self._layer, limits=self._settings.limits)
        del document
        yield from entries
        yield from more

    def decode(self, chunk: Chunk, data: memoryview) -> Bytes:
        decoded = self._unpack(chunk, data)
        if self.chunk_digest.of(decoded) != chunk.digest:
            raise IntegrityError(f"the chunk at byte {chunk.offset} of {self._blob.descriptor.digest} is damaged")
        return decoded

    @abstractmethod
    def _table(self, attempt: int) -> tuple[bytes, int, list[Entry]]:
        """The JSON, its digest checked; where the payload ends; entries that the JSON does not list."""

    @abstractmethod
    def _unpack(self, chunk: Chunk, data: memoryview) -> Bytes:
        """`chunk.length` bytes, unchecked. IntegrityError if there are not so many."""
