"""A layer on its way: written to a nameless file, hashed while it is written, then sent from there.

A registry wants a blob's digest with the blob, and a blob that is there already is not sent at all: so a layer is
complete before its upload begins. Disk for the compressed layer, no memory. Nothing is left behind, whatever happens.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TypeVar

from ckptfs.errors import CacheError, FormatError
from ckptfs.model.oci import Descriptor
from ckptfs.settings import MiB

T = TypeVar("T")


class Spool:
    """Written by one thread, then read as a Blob by any; `descriptor` is set in between."""

    def __init__(self, work: Path) -> None:
        self._descriptor: Descriptor | None = None
        try:
            self._file = tempfile.TemporaryFile(dir=work, prefix="ckptfs-layer-")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise CacheError(f"cannot write to {work}: {error.strerror}", hint="name another --work-dir") from None

    def write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise CacheError(f"cannot keep a layer: {error.strerror}", hint="name a larger --work-dir") from None

    def complete(self, descriptor: Descriptor) -> None:
        """Nothing more will be written."""
        self._file.flush()
        self._descriptor = descriptor

    @property
    def descriptor(self) -> Descriptor:
        if self._descriptor is None:
            raise FormatError("a layer is read before it is complete")
        return self._descriptor

    @property
    def size(self) -> int:
        return self.descriptor.size

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        data = os.pread(self._file.fileno(), length, offset)
        if len(data) != length:
            raise FormatError(f"a layer that was kept for its upload lacks {length - len(data)} bytes")
        return data

    def stream(self, offset: int, length: int, *, attempt: int = 0) -> Iterator[bytes]:
        for at in range(offset, offset + length, MiB):
            yield self.read_at(at, min(MiB, offset + length - at))

    def close(self) -> None:
        self._file.close()


class Work:
    """The work directory of one push: whatever is opened in it is closed, and so gone, when the push ends."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack

    def spool(self) -> Spool:
        spool = Spool(self.directory)
        self._stack.callback(spool.close)
        return spool

    def enter(self, context: AbstractContextManager[T]) -> T:
        return self._stack.enter_context(context)


class MemoryBlob:
    """A small document as a Blob."""

    def __init__(self, descriptor: Descriptor, data: bytes) -> None:
        self._descriptor = descriptor
        self._data = data

    @property
    def descriptor(self) -> Descriptor:
        return self._descriptor

    @property
    def size(self) -> int:
        return len(self._data)

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        return self._data[offset : offset + length]

    def stream(self, offset: int, length: int, *, attempt: int = 0) -> Iterator[bytes]:
        yield self.read_at(offset, length)
