"""Where a pulled image is written: a new directory that appears under its name when all of it is there.

Owns every system call that makes something. Nothing is ever followed: the tree that is written has been merged before
(a name is a directory or a link, never both), each directory is opened by the names that lead to it, one at a time and
never through a link, and until the end nobody else may enter. Called by pull/__init__.py and contents.py, the latter
from several threads.
"""

import errno
import os
import secrets
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from ckptfs.errors import CacheError, UsageError
from ckptfs.model.toc import Inode

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
# What a file system or a user without privileges refuses for one file, and can do without.
_REFUSED = frozenset((errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.E2BIG, errno.ERANGE, errno.EROFS))
_NAMED = 20  # of what was left out, the first are told by name


class Destination:
    """A context manager: leaving it with an error removes what has been written.

    left_out   what could not be made, and why, in words: a few by name.
    omitted    how many there are in all.
    """

    def __init__(self, target: Path) -> None:
        """UsageError where `target` is there and no empty directory, or its parent is missing."""
        self.target = Path(os.path.abspath(target))
        self.left_out: list[str] = []
        self.omitted = 0
        self._absent: set[bytes] = set()
        self._root = os.geteuid() == 0
        _check(self.target)
        # Beside the target, for a rename; hidden, and telling to whoever finds it after a power failure.
        self._staging = self.target.parent / f".{self.target.name[:200]}.partial-{secrets.token_hex(4)}"
        self._shown = False

    def __enter__(self) -> Self:
        with translated(self.target):
            os.mkdir(self._staging, 0o700)
            self.top = os.open(self._staging, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.top)
        if self._shown:
            return
        try:
            shutil.rmtree(self._staging)
        except OSError as failure:
            raise CacheError(
                f"what was pulled until the failure could not be removed: {failure.strerror}",
                hint=f"remove {self._staging}",
            ) from error

    def show(self) -> None:
        """Everything is there: give it its name."""
        try:
            os.rename(self._staging, self.target)
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EXDEV):
                raise UsageError(f"{self.target} is a mount point", hint="name a new directory inside it") from None
            raise _full(error, self.target) from None
        self._shown = True

    # -- names ---------------------------------------------------------------------------------------------------------

    def make(self, where: "Directories", path: bytes, inode: Inode) -> None:
        """Everything but regular files and hard links. Directories can be entered by us only, until `dress`."""
        parent, name = where.parent_of(path)
        kind = stat.S_IFMT(inode.mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=parent)
            return
        if kind == stat.S_IFLNK:
            os.symlink(inode.target, name, dir_fd=parent)
        elif not self._allowed(path, "the device", partial(os.mknod, name, kind | 0o600, inode.rdev, dir_fd=parent)):
            self._absent.add(path)
            return
        if self._root:
            change = partial(os.chown, name, inode.uid, inode.gid, dir_fd=parent, follow_symlinks=False)
            self._allowed(path, "the owner of", change)
        self._attributes(b"/proc/self/fd/%d/%s" % (parent, name), path, inode)
        if kind != stat.S_IFLNK:  # nothing to follow: this name was made a moment ago
            os.chmod(name, self._mode(inode), dir_fd=parent)
        os.utime(name, ns=(inode.mtime_ns, inode.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def create(self, where: "Directories", path: bytes) -> int:
        """A new regular file, open for writing."""
        parent, name = where.parent_of(path)
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600, dir_fd=parent)

    def link(self, sources: "Directories", source: bytes, targets: "Directories", target: bytes) -> None:
        """Another name for a file that is there; left out with the device that it would be."""
        if source in self._absent:
            self._omit("the link to a device", target, "the device was left out")
            return
        source_parent, source_name = sources.parent_of(source)
        parent, name = targets.parent_of(target)
        os.link(source_name, name, src_dir_fd=source_parent, dst_dir_fd=parent, follow_symlinks=False)

    def dress(self, file: int, path: bytes, inode: Inode) -> None:
        """Owner, xattrs, mode and time of an open file or directory; in this order, for each may undo the next."""
        if self._root:
            self._allowed(path, "the owner of", partial(os.chown, file, inode.uid, inode.gid))
        self._attributes(file, path, inode)
        os.chmod(file, self._mode(inode))
        os.utime(file, ns=(inode.mtime_ns, inode.mtime_ns))

    def _attributes(self, file: int | bytes, path: bytes, inode: Inode) -> None:
        for key, value in inode.xattrs.items():
            change = partial(os.setxattr, file, key, value, follow_symlinks=isinstance(file, int))
            self._allowed(path, f"the attribute {os.fsdecode(key)} of", change)

    def _mode(self, inode: Inode) -> int:
        """As in the image; set-id bits would be those of another owner, unless root set him."""
        if self._root:
            return stat.S_IMODE(inode.mode)
        # runc makes checkpoint/ of mode 0600, which only root can enter, and remove
        return stat.S_IMODE(inode.mode) & 0o1777 | (0o700 if inode.is_dir else 0)

    def _allowed(self, path: bytes, what: str, action: Callable[[], None]) -> bool:
        """Whether it could be done. What only this file lacks is noted, what all would lack is raised."""
        try:
            action()
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            self._omit(what, path, error.strerror or "refused")
            return False
        return True

    def _omit(self, what: str, path: bytes, why: str) -> None:
        self.omitted += 1
        if len(self.left_out) < _NAMED:
            self.left_out.append(f"{what} {os.fsdecode(path)}: {why}")


class Directories:
    """Directories of the tree by path; remembers where it was, for neighbours. Not for several threads."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._path = b""
        self._file = os.dup(top)

    def parent_of(self, path: bytes) -> tuple[int, bytes]:
        """The directory that holds `path`, open until the next call, and the name in it."""
        directory, _, name = path.rpartition(b"/")
        _plain(name)
        return self.at(directory), name

    def at(self, path: bytes) -> int:
        """The directory `path`, open until the next call."""
        if path != self._path:
            start, names = self._top, path
            if self._path and path.startswith(self._path + b"/"):
                start, names = self._file, path[len(self._path) + 1 :]
            here = os.dup(start)
            try:
                for name in names.split(b"/") if names else ():
                    _plain(name)
                    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _FLAGS, dir_fd=here)
                    os.close(here)
                    here = inner
            except BaseException:
                os.close(here)
                raise
            os.close(self._file)
            self._path, self._file = path, here
        return self._file

    def close(self) -> None:
        os.close(self._file)


@contextmanager
def translated(target: Path) -> Iterator[None]:
    """OSError into what it means for the pull."""
    try:
        yield
    except OSError as error:
        raise _full(error, target) from None


def _full(error: OSError, target: Path) -> CacheError:
    return CacheError(f"cannot write {target}: {error.strerror}", hint="name a directory with room, of your own")


def _check(target: Path) -> None:
    if not target.name:
        raise UsageError(f"{target} cannot be pulled to", hint="name a new directory")
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        if not target.parent.is_dir():
            how = f"run: mkdir -p {shlex.quote(str(target.parent))}"
            raise UsageError(f"there is no directory {target.parent}", hint=how) from None
        return
    except OSError as error:
        raise UsageError(f"{target}: {error.strerror}", hint="name a new directory") from None
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{target} is there and no directory", hint="name a new directory")
    if os.path.ismount(target):
        raise UsageError(f"{target} is a mount point", hint="name a new directory inside it")
    if next(os.scandir(target), None) is not None:
        raise UsageError(f"{target} is not empty", hint="name a new directory")
    if os.path.samestat(found, os.stat(".")):  # who stands in it would stay in what was there before
        raise UsageError(f"{target} is where you are", hint="name a new directory inside it")


def _plain(name: bytes) -> None:
    """The formats let no other names through; what writes to disk does not rely on it."""
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise UsageError(f"the image has a file of the name {name!r}", hint="it was made to do harm: do not use it")
