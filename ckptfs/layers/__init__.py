"""Layer formats: from a blob to entries, and from encoded to decoded chunks. No network, no FUSE, no trio.

A new format is one module and one line in `formats`.
"""

import functools
from typing import TypeGuard

from ckptfs.errors import FormatError
from ckptfs.layers.media_types import is_encrypted
from ckptfs.layers.protocols import Emit, Layer, LayerFormat, Verification, WholeLayer
from ckptfs.layers.zstd_chunked import ZstdChunkedFormat
from ckptfs.model.blob import Blob
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.oci import Descriptor
from ckptfs.settings import Settings

__all__ = [
    "Emit",
    "Layer",
    "LayerFormat",
    "Verification",
    "WholeLayer",
    "formats",
    "may_be_indexed",
    "open_indexed",
    "right_as_a_whole",
    "select_format",
]


@functools.cache
def formats() -> tuple[LayerFormat, ...]:
    """The first that matches reads the layer: formats with a table of contents come before the streams they also are.

    Imported when somebody asks for one: an image whose index tells all chunks need not wait for the others (7 ms).
    """
    from ckptfs.layers.estargz import EStargzFormat
    from ckptfs.layers.stream import StreamFormat
    from ckptfs.layers.tar import TarFormat

    return ZstdChunkedFormat(), EStargzFormat(), StreamFormat("gzip"), StreamFormat("zstd"), TarFormat()


def select_format(descriptor: Descriptor) -> LayerFormat:
    """The format that reads such a layer; FormatError that names the media type when there is none."""
    if is_encrypted(descriptor.media_type):
        raise FormatError(
            f"layer {descriptor.digest} is encrypted ({descriptor.media_type})",
            hint="ckptfs has no keys for ocicrypt; decrypt a copy of the image: skopeo copy --decryption-key",
        )
    for candidate in formats():
        if candidate.matches(descriptor):
            return candidate
    raise FormatError(
        f"layer {descriptor.digest} has the media type {descriptor.media_type}, which is not a tar",
        hint="ckptfs reads OCI and Docker layers: tar, tar+gzip, tar+zstd, zstd:chunked and eStargz",
    )


def may_be_indexed(descriptor: Descriptor) -> bool:
    """Whether an image's index can tell the chunks of such a layer: what it says has to be checked chunk by chunk."""
    return ZstdChunkedFormat().matches(descriptor) and not is_encrypted(descriptor.media_type)


def right_as_a_whole(layer: Layer, blob: Blob) -> TypeGuard[WholeLayer]:
    """Whether nothing but the digest of all of the layer says that its chunks are right; a synthetic one says nothing.

    Who keeps what he reads hashes all of it: no scan does.
    """
    return not layer.sequential and layer.verification != "chunk" and not blob.descriptor.synthetic


def open_indexed(blob: Blob, layer: int, settings: Settings, chunk_digest: ChunkDigest) -> Layer:
    """A layer whose chunks come from an image's index, with such digests. FormatError where there can be none."""
    if not may_be_indexed(blob.descriptor):
        raise FormatError(f"the index tells chunks of layer {blob.descriptor.digest}, which has none")
    opened = ZstdChunkedFormat().open(blob, layer, settings)
    opened.chunk_digest = chunk_digest
    return opened
