"""Where inspection reads from: the files of a checkpoint by path, in ranges.

Owns the protocol and its simplest form, a local directory. An open image of a registry is another form; it is not here.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from ckptfs.errors import AuthError, FormatError, LimitExceeded, NotFoundError, outage
from ckptfs.settings import Limits, MiB

Range = tuple[str, int, int]  # path, offset, length
BATCH = 4 * MiB  # announced together: an extent of a sequential fetch
_ABSENT = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))

T = TypeVar("T")


class CheckpointFiles(Protocol):
    """A checkpoint as `--view checkpoint` shows it: checkpoint/, config.dump, ...

    Paths are relative, without ".."; they may lead through the link `checkpoint/parent` of an incremental checkpoint.
    Calls block. They raise CkptfsError; a read past the end of a file is FormatError.
    """

    def list(self, directory: str) -> Sequence[str]:
        """Names in a directory ("" is the root), a slash after directories; empty where there is no such directory."""

    def size(self, path: str) -> int | None:
        """Bytes of a regular file; None where there is none."""

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Exactly [offset, offset + length)."""

    def expect(self, ranges: Sequence[Range]) -> None:
        """These will be read next: a source behind a network fetches them together. May do nothing."""


class LocalFiles:
    """CheckpointFiles of a directory, a mount or an unpacked archive.

    What a mount cannot read is an error, never a file that is not there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def list(self, directory: str) -> Sequence[str]:
        try:
            with _reading(directory), os.scandir(self._inside(directory)) as entries:
                return sorted(entry.name + ("/" if entry.is_dir(follow_symlinks=False) else "") for entry in entries)
        except NotFoundError:
            return ()

    def size(self, path: str) -> int | None:
        try:
            with _reading(path):
                status = self._inside(path).lstat()
        except NotFoundError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def read(self, path: str, offset: int, length: int) -> bytes:
        if self.size(path) is None:
            raise NotFoundError(f"{path} is not in the checkpoint")
        with _reading(path), open(self._inside(path), "rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise FormatError(f"{path} ends before byte {offset + length}")
        return data

    def _inside(self, path: str) -> Path:
        """The real path; NotFoundError where a link leads out of the directory."""
        full = Path(os.path.realpath(self._root / path))
        if not full.is_relative_to(self._root):
            raise NotFoundError(f"{path} leads out of the checkpoint")
        return full

    def expect(self, ranges: Sequence[Range]) -> None:
        pass


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """What the kernel says of a path, in our words."""
    try:
        yield
    except OSError as error:
        message = f"{path or 'the checkpoint'} cannot be read: {error.strerror}"
        if error.errno in _ABSENT:
            raise NotFoundError(message) from None
        if error.errno == errno.EACCES:
            raise AuthError(message) from None
        raise outage(message) from None


def announced(
    items: Iterable[T], size: Callable[[T], int], expect: Callable[[Sequence[T]], None], batch: int = BATCH
) -> Iterator[T]:
    """The items, each announced before: `batch` bytes of them together, one batch ahead of the one that is read."""
    waiting: list[T] = []
    gathered: list[T] = []
    total = 0
    for item in items:
        gathered.append(item)
        total += size(item)
        if total >= batch:
            expect(gathered)
            yield from waiting
            waiting, gathered, total = gathered, [], 0
    expect(gathered)
    yield from waiting
    yield from gathered


class Images:
    """The CRIU images of one checkpoint: small files whole, by name.

    files: the source; directory: where they are ("checkpoint"); limits: what is refused.
    """

    def __init__(self, files: CheckpointFiles, directory: str, limits: Limits) -> None:
        self.files = files
        self.directory = directory
        self.limits = limits
        self.names = [name for name in files.list(directory) if not name.endswith("/")]
        self._present = set(self.names)

    def path(self, name: str) -> str:
        return f"{self.directory}/{name}" if self.directory else name

    def inherited(self) -> Iterator[str]:
        """The paths of all files of the parent checkpoints, nearest first, through the `parent` links."""
        for level in range(1, self.limits.pre_dumps + 1):
            directory = self.path("parent" + "/parent" * (level - 1))
            names = self.files.list(directory)
            if not names:
                return
            yield from (f"{directory}/{name}" for name in names if not name.endswith("/"))

    def read(self, name: str) -> bytes | None:
        """A whole image, None where there is none."""
        if name not in self._present:
            return None
        return read_whole(self.files, self.path(name), self.limits.criu_image_bytes)

    def need(self, name: str) -> bytes:
        """A whole image; FormatError where there is none."""
        data = self.read(name)
        if data is None:
            raise FormatError(f"the checkpoint has no {self.path(name)}", hint="it is not a complete CRIU checkpoint")
        return data


def read_whole(files: CheckpointFiles, path: str, most: int) -> bytes | None:
    """A small file; None where there is none, LimitExceeded where it is larger than `most` bytes."""
    size = files.size(path)
    if size is None:
        return None
    if size > most:
        raise LimitExceeded(f"{path} has {size} bytes", hint=f"at most {most} are read")
    return files.read(path, 0, size)
