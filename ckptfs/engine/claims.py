"""Who on this node fetches a chunk: claims that die with their holder.

A claim is a lock on one byte of `locks/claims`, at the position that the key hashes to: an open-file-description lock
(fcntl(2), F_OFD_SETLK), which the kernel frees when the process dies. Threads of one process exclude each other by a
set. Owns nothing else, waits for nobody. Called by cache.py.
"""

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterable
from pathlib import Path

from ckptfs.engine.disk import DiskOps, Handle

# struct flock with 64-bit off_t: type, whence, start, len, pid, and the padding that a C compiler adds.
_FLOCK = struct.Struct("@hhqqi0q")
_HELD_BY_ANOTHER = (errno.EAGAIN, errno.EACCES)


class Claims:
    """The claims of this process; without a file (`path` None, or a read-only disk) they bind only its own threads."""

    def __init__(self, path: Path | None, ops: DiskOps) -> None:
        self._ops = ops
        self._lock = threading.Lock()
        self._held: set[int] = set()
        self._file: Handle | None = None
        if path is not None:
            try:
                self._file = Handle(ops, str(path), os.O_RDWR | os.O_CREAT)
            except OSError:
                pass  # fetching twice is better than not at all

    def try_claim(self, keys: Iterable[bytes]) -> set[bytes]:
        """Claim what nobody holds; returns the keys that are ours now. Does not block."""
        got = set()
        with self._lock:
            for key in keys:
                at = _position(key)
                if at not in self._held and self._set(at, fcntl.F_WRLCK):
                    self._held.add(at)
                    got.add(key)
        return got

    def release(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            for key in keys:
                at = _position(key)
                if at in self._held:
                    self._held.remove(at)
                    self._set(at, fcntl.F_UNLCK)

    def close(self) -> None:
        """Give up all claims."""
        with self._lock:
            self._held.clear()
            self._file = None

    def _set(self, at: int, kind: int) -> bool:
        if self._file is None:
            return True
        try:
            self._ops.lock_range(self._file.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0))
        except OSError as error:
            return error.errno not in _HELD_BY_ANOTHER  # ENOLCK and its like must not keep anybody from fetching
        return True


def _position(key: bytes) -> int:
    return int.from_bytes(key[:8], "big") >> 2
