"""Small documents out of blobs: how large each kind may be, and whether the bytes are the ones that were named."""

from ckptfs.errors import IntegrityError, LimitExceeded
from ckptfs.model.oci import MANIFEST_TYPES, Descriptor
from ckptfs.settings import Limits

CONFIG_TYPES = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")


def check_limit(descriptor: Descriptor, limits: Limits) -> None:
    """LimitExceeded for a document that no image has a reason to make so large. Nothing has been read yet."""
    if descriptor.media_type in MANIFEST_TYPES:
        limit = limits.manifest_bytes
    elif descriptor.media_type in CONFIG_TYPES:
        limit = limits.config_bytes
    else:
        limit = limits.toc_compressed_bytes
    if descriptor.size > limit:
        raise LimitExceeded(f"{descriptor.media_type} {descriptor.digest} has {descriptor.size} bytes, limit {limit}")


def check_document(raw: bytes, descriptor: Descriptor, place: str) -> None:
    """IntegrityError unless `raw`, found at `place`, has the size and the digest of `descriptor`."""
    if len(raw) != descriptor.size:
        raise IntegrityError(f"{place}: {descriptor.digest} has {len(raw)} bytes, not {descriptor.size}")
    descriptor.digest.check(raw, f"{place}: {descriptor.digest}")
