"""Layer formats: from a blob to entries, and from encoded to decoded chunks. No network, no FUSE, no trio.

A new format is one module and one line in `FORMATS`.
"""

from ckptfs.errors import FormatError
from ckptfs.layers.estargz import EStargzFormat
from ckptfs.layers.gzip import GzipFormat
from ckptfs.layers.media_types import is_encrypted
from ckptfs.layers.protocols import Emit, Layer, LayerFormat, Verification
from ckptfs.layers.tar import TarFormat
from ckptfs.layers.zstd import ZstdFormat
from ckptfs.layers.zstd_chunked import ZstdChunkedFormat
from ckptfs.model.oci import Descriptor

__all__ = ["FORMATS", "Emit", "Layer", "LayerFormat", "Verification", "select_format"]

# The first that matches reads the layer: those with a table of contents come before the streams that they also are.
FORMATS: tuple[LayerFormat, ...] = (
    ZstdChunkedFormat(),
    EStargzFormat(),
    GzipFormat(),
    ZstdFormat(),
    TarFormat(),
)


def select_format(descriptor: Descriptor) -> LayerFormat:
    """The format that reads such a layer; FormatError that names the media type when there is none."""
    if is_encrypted(descriptor.media_type):
        raise FormatError(
            f"layer {descriptor.digest} is encrypted ({descriptor.media_type})",
            hint="ckptfs has no keys for ocicrypt; decrypt a copy of the image: skopeo copy --decryption-key",
        )
    for candidate in FORMATS:
        if candidate.matches(descriptor):
            return candidate
    raise FormatError(
        f"layer {descriptor.digest} has the media type {descriptor.media_type}, which is not a tar",
        hint="ckptfs reads OCI and Docker layers: tar, tar+gzip, tar+zstd, zstd:chunked and eStargz",
    )
