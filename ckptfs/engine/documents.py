"""Small documents in the cache: manifests, configs, tables of contents, by a name such as "toc/sha256:...".

One file each: a header with lengths and a hash, the name, the payload. Written beside its place and renamed, without
fsync: a file that power loss tore fails the hash, is unlinked and was never there. The hash is xxh3-128: it tells torn
files, not forgers, who would own the directory and the hash; callers check digests where documents have one.
Called by cache.py; key_mark.py writes its file in the same way.
"""

import fcntl
import hashlib
import os
import secrets
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

from ckptfs.engine.disk import Buffer, DiskOps, Handle, read_all, write_all

_HEADER = struct.Struct("<8sIQ16s")  # magic, bytes of the name, bytes of the payload, xxh3-128 of both
_MAGIC = b"ckptdoc1"


def key_bytes(key: str) -> bytes:
    """A key as it is written and hashed: names of files, which are in some, need not be UTF-8."""
    return key.encode(errors="surrogateescape")


class Documents:
    """The documents of the node's cache, at most `share` bytes of them, those used last. Raises OSError on writing."""

    def __init__(self, directory: Path, ops: DiskOps, share: int) -> None:
        self._path, self._ops, self._share = str(directory), ops, share

    def put(self, key: str, data: bytes) -> None:
        """Keep it instead of what there was. One that is larger than the share is left out."""
        name = key_bytes(key)
        header = _HEADER.pack(_MAGIC, len(name), len(data), _hash(name, data))
        if len(header) + len(name) + len(data) > self._share:
            return
        replace(self._ops, self._path, self._file(key), [header, name, data])
        self.prune(self._share)

    def get(self, key: str) -> bytes | None:
        """The document, None when there is none or it is damaged, or larger than the share."""
        path = self._file(key)
        try:
            file = Handle(self._ops, path, os.O_RDONLY)
            content = read_all(self._ops, file.fd, 0, self._share + 1)
        except OSError:
            return None
        if len(content) > self._share:  # of a process with a larger cache: none of ours, and none that is damaged
            return None
        payload = _payload(key_bytes(key), content)
        with suppress(OSError):
            if payload is None:
                self._ops.unlink(path)
            else:
                self._ops.utime(path)
        return payload

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._ops.unlink(self._file(key))

    def sizes(self) -> list[tuple[int, int, str]]:
        """(time of last use in ns, bytes on disk, path) of each, leftovers included."""
        found = []
        for name in self._ops.listdir(self._path):
            if name.endswith((".doc", ".tmp")):
                path = f"{self._path}/{name}"
                with suppress(FileNotFoundError):
                    status = self._ops.stat(path)
                    found.append((status.st_mtime_ns, max(status.st_blocks * 512, status.st_size), path))
        return found

    def bytes(self) -> int:
        """What they take up on disk."""
        return sum(size for _, size, _ in self.sizes())

    def prune(self, target: int) -> None:
        """Remove those used least recently until they take up at most `target` bytes."""
        sizes = sorted(self.sizes())
        total = sum(size for _, size, _ in sizes)
        for _, size, path in sizes:
            if total <= target:
                break
            with suppress(FileNotFoundError):
                self._ops.unlink(path)
            total -= size

    def sweep(self) -> None:
        """Remove the temporary files of processes that died."""
        for _, _, path in self.sizes():
            if path.endswith(".tmp"):
                with suppress(BlockingIOError, FileNotFoundError):
                    file = Handle(self._ops, path, os.O_RDONLY)
                    self._ops.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._ops.unlink(path)

    def verify(self) -> tuple[int, int]:
        """Read all that are ours, see `get`, and remove the damaged ones; (read, damaged)."""
        checked = damaged = 0
        for _, _, path in self.sizes():
            with suppress(OSError):
                if path.endswith(".doc"):
                    file = Handle(self._ops, path, os.O_RDONLY)
                    content = read_all(self._ops, file.fd, 0, self._share + 1)
                    if len(content) > self._share:
                        continue
                    checked += 1
                    if _payload(None, content) is None:
                        self._ops.unlink(path)
                        damaged += 1
        return checked, damaged

    def _file(self, key: str) -> str:
        return f"{self._path}/{hashlib.sha256(key_bytes(key)).hexdigest()}.doc"


def replace(ops: DiskOps, directory: str, path: str, content: Sequence[Buffer]) -> None:
    """Write a file whole or not at all, in place of what there was. It is made in the documents' `directory`.

    Whoever opens the cache next sweeps that, for what processes have left that died.
    """
    try:
        _replace(ops, directory, path, content)
    except FileNotFoundError:  # swept before it was locked, or cleared by force: not what a disk refuses
        _replace(ops, directory, path, content)


def _replace(ops: DiskOps, directory: str, path: str, content: Sequence[Buffer]) -> None:
    temporary = f"{directory}/{secrets.token_hex(8)}.tmp"
    try:
        file = Handle(ops, temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        ops.flock(file.fd, fcntl.LOCK_EX)  # what sweep() finds unlocked belongs to the dead
        write_all(ops, file.fd, content, 0)
        ops.rename(temporary, path)
    except OSError:
        with suppress(OSError):
            ops.unlink(temporary)
        raise


class MemoryDocuments(Documents):
    """The same for a cache that must leave nothing behind."""

    def __init__(self, share: int) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._documents: dict[str, bytes] = {}  # least recently used first

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._documents.pop(key, None)
            if len(data) <= self._share:
                self._documents[key] = data
        self.prune(self._share)

    def get(self, key: str) -> bytes | None:
        with self._lock:
            data = self._documents.pop(key, None)
            if data is not None:
                self._documents[key] = data
            return data

    def delete(self, key: str) -> None:
        with self._lock:
            self._documents.pop(key, None)

    def sizes(self) -> list[tuple[int, int, str]]:
        with self._lock:
            return [(order, len(data), key) for order, (key, data) in enumerate(self._documents.items())]

    def prune(self, target: int) -> None:
        with self._lock:
            while sum(map(len, self._documents.values())) > target:
                del self._documents[next(iter(self._documents))]

    def sweep(self) -> None:
        pass

    def verify(self) -> tuple[int, int]:
        return len(self._documents), 0


def _hash(name: bytes, payload: bytes) -> bytes:
    hasher = xxhash.xxh3_128(name)
    hasher.update(payload)
    return hasher.digest()


def _payload(name: bytes | None, content: bytes) -> bytes | None:
    """What a document's file holds; None when it is damaged or another's."""
    if len(content) < _HEADER.size:
        return None
    magic, name_bytes, payload_bytes, digest = _HEADER.unpack_from(content)
    start = _HEADER.size + name_bytes
    if magic != _MAGIC or len(content) != start + payload_bytes:
        return None
    own_name, payload = content[_HEADER.size : start], content[start:]
    if _hash(own_name, payload) != digest or (name is not None and name != own_name):
        return None
    return payload
