"""The node's cache on disk: decoded chunks and small documents, shared by all mounts, kept across them.

Puts the parts together: directory.py (layout, permissions), chunk_index.py and chunk_log.py (chunks in segments),
documents.py, claims.py (who fetches what), seal.py and key_mark.py (encryption), disk.py (what happens when the disk
refuses). Blocking calls, safe from several threads; other processes may use the same directory at the same time. A
cache never fails a reader: what it cannot read is a miss, what it cannot write is not kept. Knows no layers, no network
and no trio.
docs/adr/0002-cache-segments.md
"""

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ckptfs.engine import key_mark
from ckptfs.engine.chunk_index import ChunkIndex
from ckptfs.engine.chunk_log import ChunkLog
from ckptfs.engine.claims import Claims
from ckptfs.engine.directory import CacheDirectory
from ckptfs.engine.disk import Buffer, DiskOps, WriteGate
from ckptfs.engine.documents import Documents, MemoryDocuments, key_bytes
from ckptfs.engine.errands import Errands
from ckptfs.engine.seal import Seal
from ckptfs.engine.segment_files import AnonymousSegments, SegmentFiles
from ckptfs.errors import CacheError
from ckptfs.settings import Limits, Sizes

_LAST_WRITES = 1.0  # seconds for which closing waits for documents that are on their way to the disk
_DOCUMENTS = 4  # documents get at most this fraction of the cache

_SIZES = Sizes()

Clock = Callable[[], float]


class CacheStats(NamedTuple):
    """`bytes` are allocated on disk by chunks and documents; `in_use`: another process has the cache open."""

    bytes: int
    chunks: int
    documents: int
    segments: int
    encrypted: bool
    in_use: bool


class ChunkCache:
    """Made by `open` or `ephemeral`; to be closed."""

    def __init__(
        self,
        name: str,
        directory: CacheDirectory | None,
        files: SegmentFiles,
        documents: Documents,
        claims: Claims,
        *,
        size: int,
        segment: int,
        limits: Limits,
        ops: DiskOps,
        clock: Clock,
        seal: Seal | None = None,
    ) -> None:
        self.name = name
        self._seal = seal
        self._ops = ops
        self._directory = directory
        self._documents = documents
        self._claims = claims
        self._gate = WriteGate(name, clock)
        self._errands = Errands("ckptfs-documents")
        self._index = ChunkIndex(files, ops, clock, limits.chunk_bytes)
        self._log = ChunkLog(self._index, files, ops, clock, size=size, segment=segment, other_bytes=documents.bytes)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        size: int = _SIZES.disk_cache,
        segment: int = _SIZES.segment,
        limits: Limits | None = None,
        ops: DiskOps | None = None,
        clock: Clock = time.monotonic,
        secret: bytes | None = None,
    ) -> "ChunkCache":
        """The cache in directory `path`, made if missing, bounded by `size` bytes in segments of `segment`.

        With a `secret` everything is encrypted on disk, and what was kept with another secret is not seen.
        CacheError: the directory is not safe to keep process memory in, or cannot be used. UsageError: a bad secret.
        """
        seal = Seal(secret) if secret is not None else None
        ops = ops or DiskOps()
        directory = CacheDirectory(path, ops)
        cache = cls(
            str(path),
            directory,
            SegmentFiles(directory, ops),
            Documents(directory.documents, ops, size // _DOCUMENTS),
            Claims(directory.locks / "claims", ops),
            size=size,
            segment=segment,
            limits=limits or Limits(),
            ops=ops,
            clock=clock,
            seal=seal,
        )
        # Neither is needed: leftovers take up room, and are counted and evicted like the rest.
        with suppress(OSError):
            cache._log.sweep()
        with suppress(OSError):
            cache._documents.sweep()
        try:
            cache._index.refresh()
        except OSError as error:
            raise CacheError(
                f"cache directory {path}: {error.strerror}", hint="make it usable, or name another with --cache-dir"
            ) from error
        return cache

    @classmethod
    def ephemeral(
        cls,
        parent: Path | None = None,
        *,
        size: int = _SIZES.disk_cache,
        segment: int = _SIZES.segment,
        ops: DiskOps | None = None,
        clock: Clock = time.monotonic,
        secret: bytes | None = None,
    ) -> "ChunkCache":
        """A cache that nobody else sees and that is gone with the process, even when that is killed.

        Its files lie in `parent` (/var/tmp by default, for /tmp is often memory) and have no names; documents are kept
        in memory. Size 0 keeps nothing at all. `secret`: as for `open`: what has no name is on the disk, too.
        """
        if parent is None:
            parent = Path("/var/tmp" if os.access("/var/tmp", os.W_OK) else os.environ.get("TMPDIR", "/tmp"))
        ops = ops or DiskOps()
        return cls(
            "(ephemeral)",
            None,
            AnonymousSegments(parent.resolve(), ops),
            MemoryDocuments(size // _DOCUMENTS),
            Claims(None, ops),
            size=size,
            segment=segment,
            limits=Limits(),
            ops=ops,
            clock=clock,
            seal=Seal(secret) if secret is not None else None,
        )

    def require_key(self) -> "ChunkCache":
        """CacheError unless the directory is encrypted with our key, or not at all if we have none.

        An empty one becomes ours. For all who read and write contents; keeping house needs no key.
        """
        if self._directory is not None:
            mine = self._seal.fingerprint if self._seal else key_mark.PLAIN
            with _as_cache_error(self.name):
                key_mark.require(self._directory, mine, empty=self._is_empty, ops=self._ops)
        return self

    def _is_empty(self) -> bool:
        """Whether no byte is kept, records or not: damaged ones and those of before a crash are still on disk."""
        return not self._log.bytes() and not self._documents.sizes()

    def __enter__(self) -> "ChunkCache":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything. Reads are misses and writes do nothing afterwards."""
        self._errands.flush(_LAST_WRITES)
        self._log.close()
        self._index.close()
        self._claims.close()
        if self._directory is not None:
            self._directory.close()

    # -- chunks --------------------------------------------------------------------------------------------------------

    def contains(self, key: bytes) -> bool:
        """Whether the chunk seems to be here; only reading it tells."""
        return self._index.contains(self._name(key))

    def get(self, key: bytes) -> bytes | None:
        """The chunk's bytes, verified; None when it is not here."""
        data = self._index.get(self._name(key))
        return self._seal.decrypt(self._name(key), data) if self._seal else data

    def read_into(self, key: bytes, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the chunk's bytes [offset, offset + len(buffer)).

        False when the chunk is not here or shorter; the buffer's content means nothing then.
        """
        if self._seal:
            data = self.get(key)
            if data is None or offset < 0 or offset + len(buffer) > len(data):
                return False
            buffer[:] = data[offset : offset + len(buffer)]
            return True
        return self._index.read_into(key, offset, buffer)

    def put_many(self, items: Sequence[tuple[bytes, Buffer]]) -> None:
        """Keep (key, decoded bytes), key being 32 bytes. Never fails: a disk that refuses is logged and tried later."""
        if self._seal:
            names = [self._seal.name(key) for key, _ in items]
            items = [(name, self._seal.encrypt(name, data)) for name, (_, data) in zip(names, items, strict=True)]
        self._write(lambda: self._log.append(items))

    def drop(self, *keys: bytes) -> None:
        """Forget chunks that turned out to be wrong, for all processes that open the cache from now on."""
        self._index.drop(set(map(self._name, keys)))

    def refresh(self) -> None:
        """Learn at once what other processes added and evicted. Misses do this too, at most every 20 ms.

        A mount that only has hits should call it every few seconds: files that others evicted take up disk space until
        then.
        """
        with suppress(OSError):
            self._index.refresh()
            self._log.refresh()

    # -- who fetches ---------------------------------------------------------------------------------------------------

    def try_claim(self, keys: Iterable[bytes]) -> set[bytes]:
        """The keys that this caller is to fetch, put and release; the others are being fetched by somebody.

        The last holder may have put a chunk before it released the claim: `refresh` and look again before fetching.
        """
        return self._claims.try_claim(keys)

    def release(self, keys: Iterable[bytes]) -> None:
        self._claims.release(keys)

    # -- documents -----------------------------------------------------------------------------------------------------

    def get_document(self, key: str) -> bytes | None:
        """The document that was put last under this name, None when it is not here."""
        if self._seal:
            name = self._seal.name(key_bytes(key))
            return self._seal.decrypt(name, self._documents.get(name.hex()))
        return self._documents.get(key)

    def put_document(self, key: str, data: bytes) -> None:
        """Keep a document instead of what there was. Never fails, like `put_many`."""
        if self._seal:
            name = self._seal.name(key_bytes(key))
            key, data = name.hex(), self._seal.encrypt(name, data)
        self._write(lambda: self._documents.put(key, data))

    def put_document_soon(self, key: str, data: bytes) -> None:
        """The same by another thread: for who has something else to do with it than to wait for a busy disk."""
        self._errands.do(partial(self.put_document, key, data))

    def delete_document(self, key: str) -> None:
        name = self._seal.name(key_bytes(key)).hex() if self._seal else key
        self._write(lambda: self._documents.delete(name))

    # -- housekeeping --------------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """What there is. CacheError when the directory cannot be read."""
        with _as_cache_error(self.name):
            sizes, chunk_bytes = self._documents.sizes(), self._log.bytes()
            encrypted = self._seal is not None
            in_use = False
            if self._directory is not None:
                encrypted |= key_mark.is_encrypted(self._directory.key_mark, self._ops)
                with suppress(OSError), self._directory.alone() as alone:  # a read-only disk has no locks to tell
                    in_use = not alone
        return CacheStats(
            bytes=chunk_bytes + sum(size for _, size, _ in sizes),
            chunks=len(self._index),
            documents=len(sizes),
            segments=len(self._index.segments()),
            encrypted=encrypted,
            in_use=in_use,
        )

    def verify(self) -> tuple[int, int]:
        """Read everything and drop what is damaged. Returns how many chunks and documents were read, and dropped.

        CacheError when the directory cannot be read.
        """
        with _as_cache_error(self.name):
            self._index.refresh()
            checked, bad = self._index.verify()
            documents, bad_documents = self._documents.verify()
        with suppress(OSError):
            self._log.remove_empty()
        return checked + documents, bad + bad_documents

    def prune(self, target: int) -> None:
        """Evict until the cache takes up at most `target` bytes, least recently used first; documents last.

        Segments to which another mount appends stay. CacheError when the disk refuses.
        """
        with _as_cache_error(self.name):
            self._log.prune(max(0, target - self._documents.bytes()))
            self._documents.prune(target)

    def clear(self, *, force: bool = False) -> None:
        """Remove everything; nothing but empty lock files stays.

        CacheError when another process has the cache open, unless `force`: that process then begins anew, and the
        space is free once it notices.
        """
        with _as_cache_error(self.name):
            if self._directory is None:
                self._empty(live=True)
                return
            with self._directory.alone() as alone:
                if not alone and not force:
                    raise CacheError(f"the cache {self.name} is in use", hint="unmount first, or use --force")
                self._empty(live=force)
                if alone:
                    key_mark.forget(self._directory.key_mark, self._ops)

    def _empty(self, *, live: bool) -> None:
        self._log.prune(0, live=live)
        self._documents.prune(0)

    def _write(self, action: Callable[[], None]) -> None:
        if not self._gate.may_write():
            return
        try:
            if self._directory is not None:
                self._directory.require_same()
            action()
        except OSError as error:
            self._gate.failed(error)
        else:
            self._gate.succeeded()

    def _name(self, key: bytes) -> bytes:
        return self._seal.name(key) if self._seal else key


@contextmanager
def _as_cache_error(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        hint = (
            "mount its file system for writing" if error.errno == errno.EROFS else "see the owner and mode of its files"
        )
        raise CacheError(f"cache {name}: {reason}", hint=hint) from error
