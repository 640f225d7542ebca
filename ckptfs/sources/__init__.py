"""Where images come from: a registry, an OCI layout, an archive. Only this package knows the network.

A new source is one module and one branch in `open_source`. Calls block and are made from worker threads.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor, Digest, Index, Manifest, Reference
from ckptfs.settings import Settings
from ckptfs.telemetry import NetworkCounters

if TYPE_CHECKING:
    from ckptfs.sources.registry import RegistrySource


class Source(Protocol):
    """One repository (or layout, or archive) at one reference."""

    @property
    def reference(self) -> Reference: ...

    def resolve(self) -> Manifest | Index:
        """The document that the reference names; checked against the reference's digest where it has one."""

    def fetch(self, descriptor: Descriptor) -> bytes:
        """A small document (manifest, config, TOC, index) whole, checked against size and digest."""

    def blob(self, descriptor: Descriptor) -> Blob:
        """A layer to be read in ranges. No I/O until it is read."""


OpenSource = Callable[[Reference], Source]  # how another image is reached: `open_source` with all else given


@runtime_checkable
class Repository(Protocol):
    """What a source can do besides when it is a repository that may hold more than the one image."""

    def connect(self) -> None:
        """Get ready for one more request at the same time. What keeps it from that is found by the request."""

    def document(self, name: str) -> Manifest | Index:
        """Another manifest or index, by tag or digest; NotFoundError where there is none."""

    def referrers(self, digest: Digest, artifact_type: str = "") -> tuple[Descriptor, ...]:
        """What was attached to the manifest `digest`; nothing where there is no way to ask."""


def open_source(
    reference: Reference,
    *,
    settings: Settings,
    counters: NetworkCounters,
    plain_http: bool = False,
) -> Source:
    """The source of a reference; nothing is asked yet. Only what it needs is imported, when it is needed.

    plain_http: speak http to a registry that is not on this machine; loopback needs no permission.
    """
    if reference.kind == "oci":
        from ckptfs.sources.layout import LayoutSource

        return LayoutSource(reference, settings.limits)
    if reference.kind == "archive":
        from ckptfs.sources.archive import ArchiveSource

        return ArchiveSource(reference)
    from ckptfs.sources.deferred import DeferredSource

    def open_registry() -> "RegistrySource":
        from ckptfs.sources.registry import RegistrySource

        return RegistrySource(reference, settings, counters, plain_http=plain_http)

    return DeferredSource(reference, open_registry)
