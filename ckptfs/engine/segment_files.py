"""Segments as files: the named ones that all processes of the node share, and the nameless ones of one process.

Owns names, locks and times of the files in `segments/`; knows nothing of what is in them. `<n>-<random>.seg` is the
data, `.idx` the records; n only orders them, the random part makes a name one file for ever. A segment is live while
the process that appends to it holds an exclusive flock on its data; the kernel frees that when the process dies. Called
by chunk_log.py and chunk_index.py.
"""

import errno
import fcntl
import os
import re
import secrets
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from ckptfs.engine.directory import CacheDirectory
from ckptfs.engine.disk import DiskOps, Handle, write_all
from ckptfs.engine.segments import ERASED, RECORD

_NAME = re.compile(r"([0-9]{8,})-[0-9a-f]{8}\Z")
# Time stamps of files advance with the timer tick, 1 to 10 ms: a directory that changed within this time may change
# again without getting a new one.
_SETTLED_NS = 50_000_000


class Usage(NamedTuple):
    """One segment on disk: allocated bytes of both its files, and when somebody last used it."""

    name: str
    bytes: int
    used_ns: int


class SegmentFiles:
    """The segments of the node's cache. Every method raises OSError."""

    def __init__(self, directory: CacheDirectory, ops: DiskOps) -> None:
        self._ops = ops
        self._directory = directory
        self._path = str(directory.segments)
        self._changed_ns = -1

    def room(self) -> AbstractContextManager[None]:
        """Held while segments are evicted, begun or taken over."""
        return self._directory.room()

    def names(self) -> list[str] | None:
        """The segments that there are, oldest first; None when none came or went since the last call."""
        changed = self._ops.stat(self._path).st_mtime_ns
        if changed == self._changed_ns:
            return None
        names = self._listed(".idx")
        self._changed_ns = changed if time.time_ns() - changed > _SETTLED_NS else -1
        return names

    def look_again(self) -> None:
        """The next call of `names` is to tell all of them."""
        self._changed_ns = -1

    def open(self, name: str) -> Handle:
        """The data, for reading."""
        return self._handle(name, os.O_RDONLY)

    def open_index(self, name: str) -> Handle | None:
        return Handle(self._ops, self._index(name), os.O_RDONLY)

    def create(self) -> tuple[str, Handle, Handle | None]:
        """A new live segment: name, data, index. Data comes first: a name counts as a segment once it has an index."""
        number = max((int(name.partition("-")[0]) for name in self._listed(".seg")), default=0) + 1
        name = f"{number:08d}-{secrets.token_hex(4)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOATIME
        data = Handle(self._ops, self._data(name), flags)
        try:
            self._ops.flock(data.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return name, data, Handle(self._ops, self._index(name), flags)
        except OSError:
            with suppress(OSError):
                self._ops.unlink(self._data(name))
            raise

    def take_over(self, name: str) -> tuple[Handle, Handle | None] | None:
        """Become the writer of a segment that is not live; None when it is. Call with `room` held."""
        data = self._handle(name, os.O_RDWR)
        try:
            self._ops.flock(data.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return data, Handle(self._ops, self._index(name), os.O_RDWR)

    def let_go(self, data: Handle) -> None:
        """No longer live, even if readers still have the handle."""
        self._ops.flock(data.fd, fcntl.LOCK_UN)

    def exists(self, data: Handle) -> bool:
        """Whether the file still has its name: `cache clear` and people remove files under a writer."""
        return self._ops.fstat(data.fd).st_nlink > 0

    def is_live(self, name: str) -> bool:
        """Whether a process appends to it. Only with `room` held, for it takes the lock for a moment."""
        try:
            return self.take_over(name) is None
        except FileNotFoundError:
            return False

    def touch(self, name: str) -> None:
        """Note for all processes that it is being used. FileNotFoundError: it was evicted."""
        self._ops.utime(self._data(name))

    def usage(self) -> list[Usage]:
        """Everything that takes up room, leftovers of a crash in between two system calls included."""
        found = []
        for name in self._listed(".seg", ".idx"):
            used_ns = total = 0
            for path in (self._data(name), self._index(name)):
                with suppress(FileNotFoundError):
                    status = self._ops.stat(path)
                    # Both, because copy-on-write file systems allocate late and others allocate ahead.
                    total += max(status.st_blocks * 512, status.st_size)
                    used_ns = max(used_ns, status.st_mtime_ns)
            found.append(Usage(name, total, used_ns))
        return found

    def available(self) -> int:
        """Bytes that the file system has left for us."""
        status = self._ops.statvfs(self._path)
        return status.f_bavail * status.f_frsize

    def remove(self, name: str) -> None:
        """Index first: what has none is a leftover."""
        for path in (self._index(name), self._data(name)):
            with suppress(FileNotFoundError):
                self._ops.unlink(path)

    def erase(self, name: str, i: int) -> None:
        """Overwrite record `i` with zeros, so that no process that opens the cache later believes it."""
        index = Handle(self._ops, self._index(name), os.O_WRONLY)
        write_all(self._ops, index.fd, [ERASED], i * RECORD.size)

    def leftovers(self) -> list[str]:
        """Names with only one of the two files. Only with `room` held."""
        data, index = self._listed(".seg"), self._listed(".idx")
        return sorted(set(data) ^ set(index))

    def _handle(self, name: str, flags: int) -> Handle:
        """The data, of which reads note no time of access if it is ours: that is a write, for which they may wait."""
        try:
            return Handle(self._ops, self._data(name), flags | os.O_NOATIME)
        except PermissionError:  # somebody else's
            return Handle(self._ops, self._data(name), flags)

    def _listed(self, *suffixes: str) -> list[str]:
        names = {n[:-4] for n in self._ops.listdir(self._path) if n.endswith(suffixes) and _NAME.match(n[:-4])}
        return sorted(names, key=lambda name: (len(name), name))

    def _data(self, name: str) -> str:
        return f"{self._path}/{name}.seg"

    def _index(self, name: str) -> str:
        return f"{self._path}/{name}.idx"


class _Nameless:
    """The data of one, and when it was last used."""

    __slots__ = ("data", "used_ns")

    def __init__(self, data: Handle) -> None:
        self.data = data
        self.used_ns = time.monotonic_ns()


class AnonymousSegments(SegmentFiles):
    """Segments without a name: no other process sees them, and the kernel frees them when this one dies, however."""

    def __init__(self, directory: Path, ops: DiskOps) -> None:
        self._ops = ops
        self._path = str(directory)
        self._open: dict[str, _Nameless] = {}  # readers look things up in it while a writer adds and removes
        self._count = 0

    def room(self) -> AbstractContextManager[None]:
        return nullcontext()

    def names(self) -> list[str] | None:
        return None

    def open(self, name: str) -> Handle:
        try:
            return self._open[name].data
        except KeyError:  # evicted since its reader found it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None

    def open_index(self, name: str) -> Handle | None:
        return None

    def take_over(self, name: str) -> tuple[Handle, Handle | None] | None:
        """One that a refused write has left unfinished: nobody else appends to it."""
        return self.open(name), None

    def create(self) -> tuple[str, Handle, Handle | None]:
        try:
            data = Handle(self._ops, self._path, os.O_TMPFILE | os.O_RDWR | os.O_NOATIME)
        except OSError:  # some file systems have no O_TMPFILE
            path = f"{self._path}/.ckptfs-{secrets.token_hex(8)}"
            data = Handle(self._ops, path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOATIME)
            self._ops.unlink(path)
        self._count += 1
        name = f"{self._count:08d}"
        self._open[name] = _Nameless(data)
        return name, data, None

    def let_go(self, data: Handle) -> None:
        pass

    def exists(self, data: Handle) -> bool:
        return True

    def is_live(self, name: str) -> bool:
        return False

    def touch(self, name: str) -> None:
        with suppress(KeyError):  # the process that has evicted it is this one, and knows
            self._open[name].used_ns = time.monotonic_ns()

    def usage(self) -> list[Usage]:
        return [
            Usage(name, self._ops.fstat(found.data.fd).st_blocks * 512, found.used_ns)
            for name, found in list(self._open.items())
        ]

    def remove(self, name: str) -> None:
        self._open.pop(name, None)

    def erase(self, name: str, i: int) -> None:
        pass

    def leftovers(self) -> list[str]:
        return []
