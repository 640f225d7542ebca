"""Cells of an image that lie inside chunks of an earlier one: the node's cache, with a second way to find a chunk.

Two dumps of a process share most of their 16 KiB cells and few of their 256 KiB chunks. The earlier image's chunks are
on disk; a cell of the later one is a part of such a chunk, where `add` said so. What is found that way is hashed before
it is handed out: the earlier image may come from somebody else. Called by fetch.py in place of the cache.
"""

from collections.abc import Iterable
from typing import NamedTuple

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.disk import Buffer
from ckptfs.model.chunk_digest import ChunkDigest


class Place(NamedTuple):
    """Bytes [skip, skip + length) of the chunk `key`, whose digest of that kind is the cell's key."""

    key: bytes
    skip: int
    length: int
    digest: ChunkDigest


class SharedCells:
    """A ChunkStore over the node's cache. Any thread may call."""

    def __init__(self, cache: ChunkCache) -> None:
        self._cache = cache
        self._places: dict[bytes, Place] = {}

    def add(self, places: dict[bytes, Place]) -> None:
        """Where the cells with these digests lie."""
        self._places.update(places)

    def get(self, key: bytes) -> bytes | None:
        data = self._cache.get(key)
        place = self._places.get(key) if data is None else None
        if place is None:
            return data
        cell = bytearray(place.length)
        if self._cache.read_into(place.key, place.skip, memoryview(cell)) and place.digest.of(cell) == key:
            return bytes(cell)
        self._places.pop(key, None)
        return None

    def read_into(self, key: bytes, offset: int, buffer: memoryview) -> bool:
        if self._cache.read_into(key, offset, buffer):
            return True
        data = self.get(key) if key in self._places else None
        if data is None or offset + len(buffer) > len(data):
            return False
        buffer[:] = data[offset : offset + len(buffer)]
        return True

    def contains(self, key: bytes) -> bool:
        if self._cache.contains(key):
            return True
        place = self._places.get(key)
        return place is not None and self._cache.contains(place.key)

    def put_many(self, chunks: list[tuple[bytes, Buffer]]) -> None:
        self._cache.put_many(chunks)

    def refresh(self) -> None:
        self._cache.refresh()

    def try_claim(self, keys: Iterable[bytes]) -> set[bytes]:
        return self._cache.try_claim(keys)

    def release(self, keys: Iterable[bytes]) -> None:
        self._cache.release(keys)

    def drop(self, *keys: bytes) -> None:
        for key in keys:
            self._places.pop(key, None)
        self._cache.drop(*keys)
