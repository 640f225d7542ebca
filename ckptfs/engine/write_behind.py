"""Chunks on their way to the node's cache: found here until they are on disk, so that nobody waits for the disk.

A disk that other programs keep busy takes seconds for one write now and then. What fetches goes on meanwhile, and who
reads finds what has arrived; only what nobody has asked for waits (`behind`). Called by fetch.py and extents.py in
place of the cache; knows no trio.
docs/adr/0019-write-behind.md
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from ckptfs.engine.disk import Buffer
from ckptfs.engine.errands import Errands
from ckptfs.model.toc import piece_of
from ckptfs.settings import MiB

_BATCH = 1 * MiB  # bytes after which the next write begins: what has been written, other processes find
_BEHIND = 16 * MiB  # the disk is slower than the link: what nobody waits for is not fetched now
_MOST = 48 * MiB  # held at most; a daemon has 200 MB (P8), and the memory cache is a part of it, too


class ChunkStore(Protocol):
    """What the fetcher needs of the node's cache (engine/cache.py)."""

    def get(self, key: bytes) -> Buffer | None: ...
    def read_into(self, key: bytes, offset: int, buffer: memoryview) -> bool: ...
    def contains(self, key: bytes) -> bool: ...
    def put_many(self, chunks: list[tuple[bytes, Buffer]]) -> None: ...
    def refresh(self) -> None: ...
    def try_claim(self, keys: Iterable[bytes]) -> set[bytes]: ...
    def release(self, keys: Iterable[bytes]) -> None: ...
    def drop(self, *keys: bytes) -> None: ...


class _Batch:
    """Chunks that are written with one call, and what is to be done afterwards."""

    __slots__ = ("actions", "chunks", "size")

    def __init__(self) -> None:
        self.chunks: list[tuple[bytes, Buffer]] = []
        self.size = 0
        self.actions: list[Callable[[], None]] = []


class WriteBehind:
    """A ChunkStore in front of another one. `caught_up` is called, in any thread, when it is no longer `behind`."""

    def __init__(self, store: ChunkStore, caught_up: Callable[[], None] = lambda: None) -> None:
        self._store = store
        self._caught_up = caught_up
        self._errands = Errands("ckptfs-cache")
        self._pending: dict[bytes, Buffer] = {}  # all that is not on disk
        self._queue: deque[_Batch] = deque()
        self._writing: _Batch | None = None
        self._bytes = 0
        self._changed = threading.Condition()

    @property
    def behind(self) -> bool:
        """Whether so much waits for the disk that nothing should be fetched that nobody waits for."""
        return self._bytes > _BEHIND

    # -- as the store --------------------------------------------------------------------------------------------------

    def get(self, key: bytes) -> Buffer | None:
        data = self._pending.get(key)
        return self._store.get(key) if data is None else data

    def read_into(self, key: bytes, offset: int, buffer: memoryview) -> bool:
        data = self._pending.get(key)
        if data is None:
            return self._store.read_into(key, offset, buffer)
        if offset + len(buffer) > len(data):
            return False
        buffer[:] = piece_of(data, offset, len(buffer))
        return True

    def contains(self, key: bytes) -> bool:
        return key in self._pending or self._store.contains(key)

    def put_many(self, chunks: Sequence[tuple[bytes, Buffer]], *, urgent: bool = False) -> None:
        """Keep these; found from now on. The caller must not change them again.

        When as much waits as may be held: `urgent` ones, for which somebody waits, are not kept; others wait for room.
        """
        size = sum([len(data) for _, data in chunks])
        with self._changed:
            while self._bytes and self._bytes + size > _MOST:
                if urgent:
                    return
                self._changed.wait()
            another = not self._queue or self._queue[-1].size >= _BATCH
            if another:
                self._queue.append(_Batch())
            batch = self._queue[-1]
            batch.chunks += chunks
            batch.size += size
            self._bytes += size
            self._pending.update(chunks)
        if another:
            self._errands.do(self._write_one)

    def drop(self, *keys: bytes) -> None:
        """Forget these; waits while one of them is being written."""
        gone = set(keys)
        with self._changed:
            for key in gone:
                self._pending.pop(key, None)
            while self._writing is not None and any(key in gone for key, _ in self._writing.chunks):
                self._changed.wait()
        self._store.drop(*keys)

    def refresh(self) -> None:
        self._store.refresh()

    def try_claim(self, keys: Iterable[bytes]) -> set[bytes]:
        return self._store.try_claim(keys)

    def release(self, keys: Iterable[bytes]) -> None:
        self._store.release(keys)

    # -- waiting for the disk ------------------------------------------------------------------------------------------

    def after(self, action: Callable[[], None]) -> None:
        """Call it when all that has been put so far is on disk, or has been refused there: now, or from a thread."""
        with self._changed:
            last = self._queue[-1] if self._queue else self._writing
            if last is not None:
                last.actions.append(action)
                return
        action()

    def flush(self, patience: float = math.inf) -> bool:
        """Wait until all is on disk, or for `patience` seconds; whether all is."""
        return self._errands.flush(patience)

    def _write_one(self) -> None:
        with self._changed:
            batch = self._writing = self._queue.popleft()
            # What was dropped meanwhile, or put anew, is not written.
            batch.chunks = [(key, data) for key, data in batch.chunks if self._pending.get(key) is data]
        try:
            if batch.chunks:
                self._store.put_many(batch.chunks)
        finally:
            with self._changed:
                was_behind = self.behind
                for key, data in batch.chunks:
                    if self._pending.get(key) is data:
                        del self._pending[key]
                self._bytes -= batch.size
                self._writing = None
                self._changed.notify_all()
                caught_up = was_behind and not self.behind
            for action in batch.actions:
                action()
            if caught_up:
                self._caught_up()
