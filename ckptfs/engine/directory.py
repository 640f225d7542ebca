"""The cache directory: its layout, who may own it, and the locks that processes hold on it.

    <cache-dir>/v1/segments/   chunks          (segment_files.py)
                   documents/  small documents (documents.py)
                   locks/      users: held shared by every process that has the cache open
                               room: held by the one that evicts or begins a segment
                               claims: byte ranges (claims.py)
                   key         which key it is encrypted with, or that it is not (key_mark.py)

The cache holds process memory, passwords among it: every directory is 0700, every file 0600 and ours. What is not named
like a file of ours is left alone, and so are other versions beside v1. Raises CacheError with the command that mends
it. Called by cache.py and segment_files.py.
"""

import errno
import fcntl
import os
import pwd
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ckptfs.engine.disk import DiskOps, Handle
from ckptfs.errors import CacheError

VERSION = "v1"
FILE_SUFFIXES = (".seg", ".idx", ".doc", ".tmp")
_LOCKS = ("users", "room", "claims")
# Seconds for the holder of a lock, which may have been stopped
_ROOM_PATIENCE = 2.0  # it is done in milliseconds
_USERS_PATIENCE = 10.0  # it is alone to remove everything: 40 GB are a thousand files


class CacheDirectory:
    """A checked and complete cache directory, and our share of its `users` lock while this object lives."""

    def __init__(self, path: Path, ops: DiskOps) -> None:
        """Create what is missing. CacheError when something is not safe or cannot be made."""
        self._ops = ops
        self.root = path
        base = path / VERSION
        self.segments, self.documents, self.locks = base / "segments", base / "documents", base / "locks"
        self.key_mark = base / "key"
        self._users_path = str(self.locks / "users")  # looked at before each write: a Path costs more than the call
        try:
            _check_parent(path, ops)
            for directory in (path, base, self.segments, self.documents, self.locks):
                _make(directory, ops)
                _check(directory, ops, "directory")
            for directory in (self.segments, self.documents, self.locks):
                for name in ops.listdir(directory):
                    if name.endswith(FILE_SUFFIXES) or (directory is self.locks and name in _LOCKS):
                        _check(directory / name, ops, "file")
            _check(self.key_mark, ops, "file")
            self._users = self._open_lock("users")
            self._room = self._open_lock("room")
            self._share()
        except OSError as error:
            raise CacheError(
                f"cache directory {path}: {error.strerror or error}",
                hint="make it usable, or name another with --cache-dir",
            ) from error

    def close(self) -> None:
        """Give up our locks."""
        self._users = self._room = None

    def require_same(self) -> None:
        """OSError where another directory may be in the place of ours, which was moved or removed.

        It may have another key, and those who use it hold locks that we know nothing of.
        """
        users = self._users
        if users is None:
            return
        ours, there = self._ops.fstat(users.fd), self._ops.stat(self._users_path)
        if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
            raise OSError(errno.ESTALE, "another directory is in its place")

    def _open_lock(self, name: str) -> Handle | None:
        """The lock file; None where the file system is read-only, then nobody writes and no lock is needed."""
        try:
            return Handle(self._ops, str(self.locks / name), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno == errno.EROFS:
                return None
            raise

    def _share(self) -> None:
        """Be one of those who have the cache open. CacheError while somebody has it for himself."""
        if self._users is not None and not self._wait(self._users, fcntl.LOCK_SH, _USERS_PATIENCE):
            raise CacheError(
                f"the cache {self.root} is being cleared, and that does not end",
                hint=f"lslocks shows who has {self.locks / 'users'}: continue or kill it if it was stopped",
            )

    @contextmanager
    def room(self) -> Iterator[None]:
        """The right to evict and to begin segments; one holder on the node.

        OSError where it is not to be had: a holder that was stopped must not stop us. Not for two threads at once.
        """
        if self._room is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not self._wait(self._room, fcntl.LOCK_EX, _ROOM_PATIENCE):
            raise OSError(errno.EBUSY, "another process holds the lock on evicting")
        try:
            yield
        finally:
            self._ops.flock(self._room.fd, fcntl.LOCK_UN)

    @contextmanager
    def alone(self, patience: float = 0.0, unless: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Whether no other process has this cache open; while True holds, no other can open it. OSError: EROFS.

        Others are waited for as long as `patience` seconds, `unless` what it is about has happened. Of several who
        wait, the first gets in: they have all lost their share. CacheError as when it is opened.
        """
        if self._users is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        try:
            yield self._wait(self._users, fcntl.LOCK_EX, patience, unless)
        finally:
            self._share()  # a lock that could not be changed is lost (flock(2))

    def _wait(self, lock: Handle, kind: int, patience: float, unless: Callable[[], bool] = lambda: False) -> bool:
        give_up = time.monotonic() + patience
        while not self._try_lock(lock, kind):
            if time.monotonic() > give_up or unless():
                return False
            time.sleep(0.002)
        return True

    def _try_lock(self, lock: Handle, kind: int) -> bool:
        try:
            self._ops.flock(lock.fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _make(path: Path, ops: DiskOps) -> None:
    missing = []
    while True:
        try:
            ops.stat(path)
            break
        except FileNotFoundError:
            missing.append(path)
            path = path.parent
    for directory in reversed(missing):
        try:
            ops.mkdir(directory, 0o700)
        except FileExistsError:
            pass  # another mount was quicker; what it made is checked like everything else


def _check_parent(path: Path, ops: DiskOps) -> None:
    try:
        parent = path.parent.resolve()
        mode = ops.stat(parent).st_mode
    except FileNotFoundError:
        return  # it will be made by us
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise CacheError(
            f"cache directory {path} lies in {parent}, where anybody may replace it",
            hint=f"run: chmod o-w {shlex.quote(str(parent))}",
        )


def _check(path: Path, ops: DiskOps, kind: Literal["directory", "file"]) -> None:
    is_kind, mode = (stat.S_ISDIR, 0o700) if kind == "directory" else (stat.S_ISREG, 0o600)
    try:
        found = ops.stat(path)
    except FileNotFoundError:
        return  # evicted since it was listed
    quoted = shlex.quote(str(path))
    if stat.S_ISLNK(found.st_mode):
        raise CacheError(f"cache {kind} {path} is a symbolic link", hint=f"run: rm {quoted}, or name its target")
    if not is_kind(found.st_mode):
        raise CacheError(f"{path} in the cache is not a {kind}", hint="move it away")
    if found.st_uid != os.geteuid():
        raise CacheError(f"cache {kind} {path} belongs to user {found.st_uid}", hint=f"run: chown {_me()} {quoted}")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise CacheError(f"cache {kind} {path} is open to other users", hint=f"run: chmod {mode:o} {quoted}")
    if kind == "file" and found.st_nlink > 1:
        raise CacheError(f"cache file {path} has a second hard link", hint=f"run: rm {quoted}")


def _me() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
