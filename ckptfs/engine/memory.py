"""Decoded chunks in memory, bounded by bytes. Shared by the read path and the worker threads of one mount."""

import threading
from collections.abc import Iterable

import cachetools

from ckptfs.engine.disk import Buffer


class MemoryCache:
    """The chunks used last, at most `size` bytes of them. Safe from several threads."""

    def __init__(self, size: int) -> None:
        self._chunks: cachetools.LRUCache[bytes, Buffer] = cachetools.LRUCache(size, getsizeof=len)
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Buffer | None:
        with self._lock:
            return self._chunks.get(key)

    def put(self, key: bytes, data: Buffer) -> None:
        """Keep the chunk; one that is larger than the whole cache is left out. The caller must not change it again."""
        self.put_many([(key, data)])

    def put_many(self, chunks: Iterable[tuple[bytes, Buffer]]) -> None:
        """`put` each of these."""
        with self._lock:
            for key, data in chunks:
                if len(data) <= self._chunks.maxsize:
                    self._chunks[key] = data

    def drop(self, key: bytes) -> None:
        with self._lock:
            self._chunks.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._chunks.clear()

    def __contains__(self, key: bytes) -> bool:
        return key in self._chunks

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return int(self._chunks.currsize)
