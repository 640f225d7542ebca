"""zstd layers without an index of their own (podman and buildah write one frame): streamed."""

from ckptfs.layers.media_types import compression_of
from ckptfs.layers.stream import StreamLayer
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor
from ckptfs.settings import Settings


class ZstdFormat:
    name = "zstd"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def matches(self, descriptor: Descriptor) -> bool:
        return compression_of(descriptor.media_type) == "zstd"

    def open(self, blob: Blob, layer: int) -> StreamLayer:
        return StreamLayer(self.name, blob, layer, self.settings)
