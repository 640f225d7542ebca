"""Blobs from memory and from OCI layouts on disk, and a layer read the slow and obvious way."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ckptfs.layers import Layer, LayerFormat, select_format
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor, Digest
from ckptfs.model.toc import Chunk, Entry, Extent, Inode
from ckptfs.settings import Settings

TAR = "application/vnd.oci.image.layer.v1.tar"


@dataclass
class BytesBlob:
    """A blob in memory that notes the ranges it was asked for."""

    data: bytes
    descriptor: Descriptor
    piece: int = 64 * 1024
    ranges: list[tuple[int, int]] = field(default_factory=list)
    ranges_at_once: int = 1

    stream_ranges = Blob.stream_ranges

    @property
    def size(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        assert offset >= 0 and length > 0 and offset + length <= len(self.data)
        self.ranges.append((offset, length))
        return self.data[offset : offset + length]

    def stream(
        self, offset: int, length: int, *, attempt: int = 0, patient: bool = False
    ) -> Iterator[bytes | memoryview]:
        self.ranges.append((offset, length))
        for low in range(offset, offset + length, self.piece):
            yield memoryview(self.data)[low : min(low + self.piece, offset + length)]


def blob_of(data: bytes, media_type: str = TAR, annotations: dict[str, str] | None = None) -> BytesBlob:
    return BytesBlob(data, Descriptor(media_type, Digest.of(data), len(data), annotations or {}))


def layout_layer(layout: Path, index: int = 0) -> BytesBlob:
    """The layer at `index` of the only image of an OCI layout."""
    document = json.loads((layout / "index.json").read_bytes())
    (manifest,) = document["manifests"]
    layer = json.loads(layout_bytes(layout, manifest["digest"]))["layers"][index]
    return BytesBlob(layout_bytes(layout, layer["digest"]), Descriptor.from_json(layer))


def layout_bytes(layout: Path, digest: str) -> bytes:
    return (layout / "blobs" / digest.replace(":", "/")).read_bytes()


@dataclass
class ScannedLayer:
    """A layer after its scan: entries, and the chunks that came along."""

    layer: Layer
    blob: BytesBlob
    entries: list[Entry] = field(default_factory=list)
    emitted: dict[bytes, bytes] = field(default_factory=dict)

    @classmethod
    def of(
        cls, blob: BytesBlob, layer_format: LayerFormat | None = None, settings: Settings | None = None
    ) -> "ScannedLayer":
        layer = (layer_format or select_format(blob.descriptor)).open(blob, 0, settings or Settings())
        scanned = cls(layer, blob)
        scanned.entries.extend(layer.scan(scanned._emit))
        return scanned

    def _emit(self, chunk: Chunk, data: bytes) -> None:
        assert type(data) is bytes and len(data) <= chunk.length
        assert self.emitted.get(chunk.key, data) == data
        self.emitted[chunk.key] = data

    def chunk(self, chunk: Chunk) -> bytes:
        if self.layer.sequential:
            return self.emitted[chunk.key]
        encoded = self.blob.read_at(chunk.offset, chunk.size)
        decoded = bytes(self.layer.decode(chunk, memoryview(encoded)))
        assert len(decoded) == chunk.length
        assert self.emitted.get(chunk.key, decoded) == decoded
        return decoded

    def read(self, inode: Inode) -> bytes:
        """A whole file; checks that its extents are sorted, inside it, and inside their chunks."""
        out = bytearray(inode.size)
        last: Extent | None = None
        for extent in inode.extents:
            assert extent.length > 0
            assert extent.start >= (last.start + last.length if last else 0)
            assert extent.start + extent.length <= inode.size
            assert 0 <= extent.skip <= extent.skip + extent.length <= extent.chunk.length
            piece = self.chunk(extent.chunk)[extent.skip : extent.skip + extent.length]
            assert len(piece) == extent.length
            out[extent.start : extent.start + extent.length] = piece
            last = extent
        return bytes(out)
