"""A layer on its way: written to a nameless file, hashed while it is written, then sent from there.

A registry wants a blob's digest with the blob, and a blob that is there already is not sent at all: so a layer is
complete before its upload begins. Disk for the compressed layer, no memory. Nothing is left behind, whatever happens.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from ckptfs.errors import CacheError, FormatError
from ckptfs.layers.compression import MAGIC_BYTES, sniff
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor, Digest
from ckptfs.push.checkpoint_files import CheckpointFile
from ckptfs.settings import MiB

T = TypeVar("T")

_TAR = "application/vnd.oci.image.layer.v1.tar"


def nameless(work: Path) -> BinaryIO:
    """A file in the work directory that is gone once it is closed."""
    try:
        return cast("BinaryIO", tempfile.TemporaryFile(dir=work))
    except OSError as error:
        raise CacheError(f"cannot write to {work}: {error.strerror}", hint="name another --work-dir") from None


class Spool(Blob):
    """Written by one thread, then read as a Blob by any; `descriptor` is set in between."""

    def __init__(self, work: Path) -> None:
        self._descriptor: Descriptor | None = None
        self._file = nameless(work)

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

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        data = os.pread(self._file.fileno(), length, offset)
        if len(data) != length:
            raise FormatError(f"a layer that was kept for its upload lacks {length - len(data)} bytes")
        return data

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


def keep(file: CheckpointFile, spool: Spool, media_type: str = "") -> str:
    """A file of the source into a spool, where it can be read at random; returns its compression.

    Without `media_type` the spool is a layer of whatever the bytes say.
    """
    if file.open is None:
        raise FormatError(f"{file.path.decode('utf-8', 'replace')!r} has no content")
    hasher = hashlib.sha256()
    head = b""
    payload = file.open()
    buffer = memoryview(bytearray(MiB))
    try:
        while count := payload.readinto(buffer):
            head = head or bytes(buffer[: min(count, MAGIC_BYTES)])
            hasher.update(buffer[:count])
            spool.write(bytes(buffer[:count]))
    finally:
        payload.close()
    compression = sniff(head) if not media_type else "none"
    kind = media_type or (_TAR if compression == "none" else f"{_TAR}+{compression}")
    spool.complete(Descriptor(kind, Digest("sha256", hasher.hexdigest()), file.inode.size))
    return compression


class PiecesPayload:
    """Bytes that come in pieces, as the content of a file."""

    def __init__(self, pieces: Iterator[bytes | memoryview]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._rest = memoryview(b"")
