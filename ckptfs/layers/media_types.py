"""Which media types are tars, and how they say that they are compressed. Facts of the image and Docker specs only."""

from typing import Literal

Compression = Literal["none", "gzip", "zstd"]

# OCI image-spec, layer.md (the nondistributable ones are deprecated but pushed by older tools); Docker image manifest
# V2 schema 2, with the +zstd that containers/image accepts; the CRIU tar that containerd puts into an index.
_BARE = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.containerd.container.criu.checkpoint.criu.tar",
)
_SUFFIXES: dict[str, Compression] = {"": "none", "+gzip": "gzip", ".gzip": "gzip", "+zstd": "zstd", ".zstd": "zstd"}
_COMPRESSION = {bare + suffix: compression for bare in _BARE for suffix, compression in _SUFFIXES.items()}


def compression_of(media_type: str) -> Compression | None:
    """What the media type claims; None when it does not name a tar. Docker's types are often wrong about it."""
    return _COMPRESSION.get(media_type)


def is_encrypted(media_type: str) -> bool:
    """ocicrypt appends +encrypted to the type of the layer inside."""
    return "+encrypted" in media_type
