"""Where an image is published: what the publisher needs of a registry or an OCI layout.

Implemented by sources/upload.py for registries and by push/layout_target.py. Calls block and come from several threads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ckptfs.errors import UsageError
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor, Digest, Reference
from ckptfs.settings import Settings
from ckptfs.telemetry import NetworkCounters

# Told of bytes as they have been sent; negative when some have to be sent again.
Sent = Callable[[int], None]


class Target(Protocol):
    """One repository of a registry, or one layout."""

    @property
    def reference(self) -> Reference:
        """Where it is; tag and digest do not matter."""

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there, whole."""

    def mount(self, descriptor: Descriptor, repository: str) -> bool:
        """Make a blob of another repository of the same registry one of this; False where that cannot be done."""

    def put_blob(self, descriptor: Descriptor, blob: Blob, sent: Sent) -> None:
        """Send a blob. Resumes where the other side stopped; raises when its digest is not the descriptor's."""

    def put_manifest(self, raw: bytes, media_type: str, tag: str) -> Digest:
        """Publish a manifest whose blobs are all there, under its digest and under `tag` ("" for none)."""


def open_target(
    reference: Reference, *, settings: Settings, counters: NetworkCounters, plain_http: bool = False
) -> Target:
    """The target of a reference with a tag; a registry is not asked yet, a layout is made. UsageError for others."""
    if reference.digest is not None:
        raise UsageError(f"cannot push to {reference}", hint="name a tag; the digest is what comes out")
    if reference.kind == "oci":
        from ckptfs.push.layout_target import LayoutTarget

        return LayoutTarget(Path(reference.path))
    if reference.kind == "registry":
        from ckptfs.sources.upload import RegistryTarget

        return RegistryTarget(reference, settings, counters, plain_http=plain_http)
    raise UsageError(f"cannot push to {reference}", hint="push to HOST/REPOSITORY:TAG or oci:DIR:TAG")
