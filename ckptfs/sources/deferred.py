"""A registry whose code is loaded when something is first asked of it: what the node's cache has needs none.

urllib3 and what speaks to registries take 60 ms to import, a quarter of a mount whose image is here. Made by
`open_source` for every registry; daemon/standby.py imports them earlier where a request is sure to come.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from ckptfs.model.blob import Blob, DescribedBlob
from ckptfs.model.oci import Descriptor, Digest, Index, Manifest, Reference

if TYPE_CHECKING:
    from ckptfs.sources.registry import RegistrySource

T = TypeVar("T")


class DeferredSource:
    """What `open` returns, from the first question on. Threads may share it."""

    def __init__(self, reference: Reference, open: "Callable[[], RegistrySource]") -> None:
        self._reference = reference
        self._source = _Once(open)

    @property
    def reference(self) -> Reference:
        return self._reference

    def resolve(self) -> Manifest | Index:
        return self._source().resolve()

    def connect(self) -> None:
        self._source().connect()

    def document(self, name: str) -> Manifest | Index:
        return self._source().document(name)

    def fetch(self, descriptor: Descriptor) -> bytes:
        return self._source().fetch(descriptor)

    def referrers(self, digest: Digest, artifact_type: str = "") -> tuple[Descriptor, ...]:
        return self._source().referrers(digest, artifact_type)

    def blob(self, descriptor: Descriptor) -> Blob:
        return _DeferredBlob(descriptor, lambda: self._source().blob(descriptor))


class _DeferredBlob(DescribedBlob):
    def __init__(self, descriptor: Descriptor, open: Callable[[], Blob]) -> None:
        super().__init__(descriptor)
        self._blob = _Once(open)

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        return self._blob().read_at(offset, length, attempt=attempt)

    def stream(
        self, offset: int, length: int, *, attempt: int = 0, patient: bool = False
    ) -> Iterator[bytes | memoryview]:
        return self._blob().stream(offset, length, attempt=attempt, patient=patient)

    @property
    def ranges_at_once(self) -> int:
        return self._blob().ranges_at_once

    def stream_ranges(
        self, ranges: Sequence[tuple[int, int]], *, attempt: int = 0, patient: bool = False
    ) -> Iterator[tuple[int, bytes | memoryview]]:
        return self._blob().stream_ranges(ranges, attempt=attempt, patient=patient)


class _Once(Generic[T]):
    """What `make` returns, made once, by the first thread that asks; asked again after it has failed."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: T | None = None

    def __call__(self) -> T:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made
