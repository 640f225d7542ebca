"""Blob: bytes at an offset, wherever they lie."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

from ckptfs.errors import IntegrityError
from ckptfs.model.oci import Descriptor
from ckptfs.settings import MiB


class Blob(Protocol):
    """Immutable bytes with a descriptor. Calls block and may come from several threads at once.

    A call returns exactly what was asked for or raises a CkptfsError; there are no short reads. Transport faults are
    retried and resumed inside. `attempt` counts earlier answers to the same range that turned out to be wrong
    (bad digest): a Blob with more than one place to ask goes elsewhere.

    A class that inherits from it has `descriptor` and `read_at`; its streams are one read after another.
    """

    @property
    @abstractmethod
    def descriptor(self) -> Descriptor: ...

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.descriptor.size

    @abstractmethod
    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        """The bytes [offset, offset + length)."""

    def stream(
        self, offset: int, length: int, *, attempt: int = 0, patient: bool = False
    ) -> Iterator[bytes | memoryview]:
        """The same bytes in pieces, each as soon as it has arrived; at most 1 MiB, and they stay as they are.

        `patient`: who waits for some of them waits for a megabyte: fewer, longer pieces are better.
        """
        for at in range(offset, offset + length, MiB):
            yield self.read_at(at, min(MiB, offset + length - at), attempt=attempt)

    @property
    def ranges_at_once(self) -> int:
        """How many ranges `stream_ranges` can have for the price of one, as far as is known."""
        return 1

    def stream_ranges(
        self, ranges: Sequence[tuple[int, int]], *, attempt: int = 0, patient: bool = False
    ) -> Iterator[tuple[int, bytes | memoryview]]:
        """The bytes of ranges [start, end), ascending: pieces with their offsets, each byte once."""
        for start, end in ranges:
            for piece in self.stream(start, end - start, attempt=attempt, patient=patient):
                yield start, piece
                start += len(piece)


class DescribedBlob(Blob):
    """One that is given its descriptor."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._descriptor = descriptor

    @property
    def descriptor(self) -> Descriptor:
        return self._descriptor


class MemoryBlob(DescribedBlob):
    """A small document."""

    def __init__(self, descriptor: Descriptor, data: bytes) -> None:
        super().__init__(descriptor)
        self._data = data

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        return self._data[offset : offset + length]


class HashedStream:
    """All of a blob in pieces, hashed as they pass."""

    def __init__(self, blob: Blob, *, attempt: int = 0) -> None:
        self._descriptor = blob.descriptor
        self._pieces = blob.stream(0, blob.size, attempt=attempt)
        self._hash = hashlib.new(blob.descriptor.digest.algorithm)

    def __iter__(self) -> Iterator[bytes | memoryview]:
        for piece in self._pieces:
            self._hash.update(piece)
            yield piece

    def check(self) -> None:
        """Hash what nobody has asked for, then compare: IntegrityError unless this is the blob."""
        for _ in self:
            pass
        digest, actual = self._descriptor.digest, self._hash.hexdigest()
        if actual != digest.hex and not self._descriptor.synthetic:
            raise IntegrityError(f"blob {digest} arrived with digest {digest.algorithm}:{actual}")
