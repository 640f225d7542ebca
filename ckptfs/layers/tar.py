"""Plain tar layers: every byte can be fetched by itself, only the headers have to be found first.

Owns the walk from header to header over the blob. Nothing vouches for a piece of such a layer but the transport, until
all of it has been hashed (image/whole.py): from then on each piece has a digest.
"""

from collections.abc import Iterator

from ckptfs.errors import IntegrityError
from ckptfs.layers.compression import sniff
from ckptfs.layers.grid import Grid
from ckptfs.layers.media_types import compression_of
from ckptfs.layers.protocols import Emit, OtherFormat, Verification
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.model.blob import Blob
from ckptfs.model.chunk_digest import DIGEST_BYTES, ChunkDigest
from ckptfs.model.oci import Descriptor
from ckptfs.model.toc import Chunk, Entry
from ckptfs.settings import Settings


class TarFormat:
    name = "tar"

    def matches(self, descriptor: Descriptor) -> bool:
        return compression_of(descriptor.media_type) == "none"

    def open(self, blob: Blob, layer: int, settings: Settings) -> "TarLayer":
        return TarLayer(blob, layer, settings)


class TarLayer:
    format = "tar"
    verification: Verification = "transport"
    sequential = False

    def __init__(self, blob: Blob, layer: int, settings: Settings) -> None:
        self._blob = blob
        self._settings = settings
        self._grid = Grid(str(blob.descriptor.digest), layer, settings.sizes.grid, blob.size)
        self.digests = b""  # BLAKE3 of each chunk, one after another, once all together had the layer's digest

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        """Reads whole grid chunks only, so that whatever was read for a header is also kept for a reader.

        One chunk first and after each jump; while the files are smaller than the window it doubles, up to the size
        of one random extent. A payload that reaches more than a window ahead is jumped over.
        """
        grid, blob = self._grid, self._blob
        scanner = TarScanner(grid, self._settings.limits, blob.size)
        largest = max(grid.unit, self._settings.sizes.random_extent // grid.unit * grid.unit)
        window = grid.unit
        while scanner.at < blob.size and not scanner.finished:
            at = scanner.at
            data = blob.read_at(at, min(window, blob.size - at), attempt=attempt)
            if at == 0 and (compression := sniff(data)) != "none":
                from ckptfs.layers.stream import StreamFormat  # rare, and some ms of a mount otherwise

                said = f"layer {blob.descriptor.digest} is called {blob.descriptor.media_type} and is {compression}"
                raise OtherFormat(said, StreamFormat(compression))
            yield from scanner.feed(data)
            for low in range(0, len(data), grid.unit):
                emit(grid.chunk((at + low) // grid.unit), data[low : low + grid.unit])
            if scanner.wanted - scanner.at > window:
                scanner.skip_to(min(scanner.wanted, blob.size) // grid.unit * grid.unit)
                window = grid.unit
            else:
                window = min(2 * window, largest)
        scanner.close()

    def decode(self, chunk: Chunk, data: memoryview) -> memoryview:
        known, digest = self.digests, ChunkDigest.BLAKE3
        if known and not known.startswith(digest.of(data), DIGEST_BYTES * self._grid.index(chunk.offset)):
            raise IntegrityError(f"the chunk at byte {chunk.offset} of {self._blob.descriptor.digest} is damaged")
        return data

    def chunks(self) -> Iterator[Chunk]:
        """All of the blob, in order: headers and padding too."""
        for index in range(-(-self._blob.size // self._grid.unit)):
            yield self._grid.chunk(index)
