"""A registry that is not to be asked (`--offline`): everything that the node's cache lacks is an error at once.

Opens no socket. Layouts and archives lie on this machine and are left as they are. Called by image/.
"""

from collections.abc import Iterator

from ckptfs.errors import NotFoundError
from ckptfs.model.blob import Blob, DescribedBlob
from ckptfs.model.oci import Descriptor, Index, Manifest, Reference
from ckptfs.sources import Source


def offline_source(source: Source) -> Source:
    """`source`, or what stands in for it if it would use the network."""
    return _OfflineSource(source.reference) if source.reference.kind == "registry" else source


class _OfflineSource:
    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    @property
    def reference(self) -> Reference:
        return self._reference

    def resolve(self) -> Manifest | Index:
        raise _not_here(str(self._reference))

    def fetch(self, descriptor: Descriptor) -> bytes:
        raise _not_here(f"{descriptor.digest} of {self._reference}")

    def blob(self, descriptor: Descriptor) -> Blob:
        return _OfflineBlob(descriptor)


class _OfflineBlob(DescribedBlob):
    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        raise _not_here(f"a part of layer {self._descriptor.digest}")

    def stream(
        self, offset: int, length: int, *, attempt: int = 0, patient: bool = False
    ) -> Iterator[bytes | memoryview]:
        raise _not_here(f"a part of layer {self._descriptor.digest}")


def _not_here(what: str) -> NotFoundError:
    return NotFoundError(
        f"{what} is not in this node's cache", hint="leave --offline out, or fetch it before: ckptfs cache warm REF"
    )
