"""The system calls of the node's cache, behind one small object, and what happens when they fail.

Owns: DiskOps (the seam where a test makes the N-th call fail), Handle (an open file that closes with its last user) and
WriteGate (whether the disk is written to at all). Never interprets what it reads. Called by the other modules of the
cache only.
"""

import ctypes
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Sequence

Buffer = bytes | bytearray | memoryview

# Out of room: evicting something can help. Everything else (EROFS, EIO, EMFILE ...) is waited out.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

RETRY_WRITES = 30.0  # seconds between attempts to write to a disk that refused

_IOV_MAX = 1024  # linux/uio.h UIO_MAXIOV
_KEEP_SIZE = 1  # linux/falloc.h FALLOC_FL_KEEP_SIZE

_libc = ctypes.CDLL(None, use_errno=True)

_log = logging.getLogger(__name__)


class DiskOps:
    """Every system call that the cache makes. Each raises OSError; a subclass may make one fail on purpose."""

    open = staticmethod(os.open)
    close = staticmethod(os.close)
    pread = staticmethod(os.pread)
    preadv = staticmethod(os.preadv)
    pwritev = staticmethod(os.pwritev)
    ftruncate = staticmethod(os.ftruncate)
    fstat = staticmethod(os.fstat)
    stat = staticmethod(os.lstat)
    statvfs = staticmethod(os.statvfs)
    listdir = staticmethod(os.listdir)
    mkdir = staticmethod(os.mkdir)
    rename = staticmethod(os.replace)
    unlink = staticmethod(os.unlink)
    utime = staticmethod(os.utime)
    flock = staticmethod(fcntl.flock)

    @staticmethod
    def allocate(fd: int, offset: int, length: int) -> None:
        """fallocate(2) behind the end of a file, whose size stays; os.posix_fallocate would change it."""
        if _libc.fallocate(fd, _KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    @staticmethod
    def lock_range(fd: int, command: int, lock: bytes) -> bytes:
        return fcntl.fcntl(fd, command, lock)


class Handle:
    """An open file. It closes when the last thread that uses it lets go, never under a reader.

    A descriptor number that is closed while another thread is about to read from it can be given to another file
    in between, and the reader gets that file's bytes. Reference counting rules that out without a lock per read.
    So keep the handle in a variable while its `fd` is in use.

    `verified[i]` is 1 when record i of the segment was checked through this very handle.
    """

    __slots__ = ("_ops", "fd", "verified")

    def __init__(self, ops: DiskOps, path: str, flags: int) -> None:
        self.fd = -1
        self._ops = ops
        self.fd = ops.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self.verified = bytearray()

    def __del__(self) -> None:
        if self.fd >= 0:
            try:
                self._ops.close(self.fd)
            except OSError:
                pass  # Linux frees the descriptor before it reports an error


def read_all(ops: DiskOps, fd: int, offset: int, limit: int) -> bytes:
    """The bytes from `offset` to the end of the file, at most `limit` of them."""
    parts = []
    while limit > 0:
        part = ops.pread(fd, min(limit, 1 << 20), offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        limit -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_all(ops: DiskOps, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write every byte at `offset`, in as few calls as possible. OSError: some of them may have been written."""
    views = [memoryview(buffer) for buffer in buffers if len(buffer)]
    while views:
        count = ops.pwritev(fd, views[:_IOV_MAX], offset)
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += count
        done = 0
        while done < len(views) and count >= len(views[done]):
            count -= len(views[done])
            done += 1
        views = views[done:]
        if count:
            views[0] = views[0][count:]


class WriteGate:
    """Open while the disk takes what is written; after a failure shut, and tried again every RETRY_WRITES seconds.

    Logs one WARNING when it shuts and one when it opens again. Safe from several threads.
    """

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._failed_at: float | None = None

    def may_write(self) -> bool:
        failed_at = self._failed_at
        # A clock that jumped back must not keep the gate shut for a year.
        return failed_at is None or not 0 <= self._clock() - failed_at < RETRY_WRITES

    def failed(self, error: OSError) -> None:
        with self._lock:
            first, self._failed_at = self._failed_at is None, self._clock()
        if first:
            reason = error.strerror or type(error).__name__
            advice = "free some space there or give a smaller --cache-size; " if error.errno in FULL else ""
            _log.warning("cache %s: %s; %sgoing on without writing to it", self._name, reason, advice)

    def succeeded(self) -> None:
        if self._failed_at is None:
            return
        with self._lock:
            was_shut, self._failed_at = self._failed_at is not None, None
        if was_shut:
            _log.warning("cache %s: writing to it again", self._name)
