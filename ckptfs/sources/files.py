"""Local files as blobs, read with pread. Used by layout.py and archive.py; any thread may read."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckptfs.errors import AuthError, CkptfsError, FormatError, IntegrityError, NotFoundError, UnavailableError
from ckptfs.model.blob import DescribedBlob
from ckptfs.model.oci import Descriptor

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # opening a fifo must not wait for its writer


@dataclass(frozen=True, slots=True)
class Identity:
    """Which file, in which state: as long as it stays the same, so do the bytes."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class OpenFile:
    """A regular file that is open for reading; closed with the object."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{name} is not a regular file", hint="write it to one: it is read more than once")
        self.identity = _identity(status)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly [offset, offset + length). IntegrityError where the file is shorter or was written to meanwhile."""
        parts = []
        left = length
        try:
            while left and (part := os.pread(self._fd, left, offset)):
                parts.append(part)
                offset += len(part)
                left -= len(part)
            now = _identity(os.fstat(self._fd))
        except OSError as error:
            raise UnavailableError(f"{self.name}: {error.strerror}", permanent=True) from None
        if now != self.identity:
            raise IntegrityError(
                f"{self.name} was changed while it was open", hint="begin again, and leave it as it is"
            )
        if left:
            raise IntegrityError(f"{self.name} ends {left} bytes early")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        os.close(self._fd)


def open_file(path: Path) -> OpenFile:
    """A file that the user named: symlinks are followed."""
    try:
        return OpenFile(os.open(path, _FLAGS), str(path))
    except OSError as error:
        raise translated(error, path) from None


def open_inside(top: Path, *parts: str) -> OpenFile:
    """A file below the directory `top` whose path has no symlink: what came from elsewhere leads nowhere else."""
    path = top.joinpath(*parts)
    try:
        fd = os.open(top, _FLAGS | os.O_DIRECTORY)
        for part in parts[:-1]:
            fd = _step(fd, part, os.O_DIRECTORY)
        return OpenFile(_step(fd, parts[-1], 0), str(path))
    except OSError as error:
        raise translated(error, path) from None


def _step(directory: int, name: str, flags: int) -> int:
    try:
        return os.open(name, _FLAGS | os.O_NOFOLLOW | flags, dir_fd=directory)
    finally:
        os.close(directory)


def translated(error: OSError, path: Path) -> CkptfsError:
    """What a file or directory that cannot be read means to whoever named it."""
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"there is no {path}", hint="check the path; is the image complete?")
    if isinstance(error, PermissionError):
        return AuthError(
            f"{path} may not be read by this user", hint="ask its owner for the right, or run as a user who has it"
        )
    return FormatError(f"{path} cannot be read: {error.strerror}")


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class FileBlob(DescribedBlob):
    """A model.blob.Blob that is a whole file of exactly the descriptor's size; opened when it is read first."""

    def __init__(self, open_it: Callable[[], OpenFile], descriptor: Descriptor) -> None:
        self._open_it = open_it
        super().__init__(descriptor)
        self._file: OpenFile | None = None

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        file = self._file or self._checked(self._open_it())
        return file.read(offset, length)

    def _checked(self, file: OpenFile) -> OpenFile:
        if file.identity.size != self.size:
            raise IntegrityError(f"{file.name} has {file.identity.size} bytes, its descriptor says {self.size}")
        self._file = file
        return file
