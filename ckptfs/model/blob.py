"""Blob: bytes at an offset, wherever they lie."""

from collections.abc import Iterator
from typing import Protocol

from ckptfs.model.oci import Descriptor


class Blob(Protocol):
    """Immutable bytes with a descriptor. Calls block and may come from several threads at once.

    A call returns exactly what was asked for or raises a CkptfsError; there are no short reads. Transport faults are
    retried and resumed inside. `attempt` counts earlier answers to the same range that turned out to be wrong
    (bad digest): a Blob with more than one place to ask goes elsewhere.
    """

    @property
    def descriptor(self) -> Descriptor: ...

    @property
    def size(self) -> int:
        """Bytes in all."""

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        """The bytes [offset, offset + length)."""

    def stream(self, offset: int, length: int, *, attempt: int = 0) -> Iterator[bytes | memoryview]:
        """The same bytes in pieces, each as soon as it has arrived; at most 1 MiB, and they stay as they are."""
