"""Single flight on the node: which parts of a blob this process fetches, so that others wait for them instead.

A claim per chunk would cost more than the chunk (6 us for 16 KiB); regions of 256 KiB of a blob are claimed instead.
Threads of one process share a region: among them the fetcher sees to it that no chunk is fetched twice.
"""

import hashlib
import threading
from collections.abc import Iterable
from typing import Protocol

from ckptfs.model.toc import Chunk
from ckptfs.settings import KiB

_REGION = 256 * KiB


class ClaimStore(Protocol):
    """The node-wide claims (engine/claims.py)."""

    def try_claim(self, keys: Iterable[bytes]) -> set[bytes]: ...
    def release(self, keys: Iterable[bytes]) -> None: ...


class RegionClaims:
    """Regions that this process holds, counted."""

    def __init__(self, store: ClaimStore) -> None:
        self._store = store
        self._held: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def take(self, blob: bytes, chunks: Iterable[Chunk]) -> tuple[list[Chunk], list[Chunk], list[bytes]]:
        """(chunks that are ours to fetch, chunks that another process fetches, what to give to `release`)."""
        mine: list[Chunk] = []
        others: list[Chunk] = []
        taken: dict[int, bytes | None] = {}
        for chunk in chunks:
            number = chunk.offset // _REGION
            if number not in taken:
                region = hashlib.blake2b(blob + number.to_bytes(8, "big"), digest_size=32).digest()
                taken[number] = region if self._take(region) else None
            (others if taken[number] is None else mine).append(chunk)
        return mine, others, [region for region in taken.values() if region is not None]

    def release(self, regions: Iterable[bytes]) -> None:
        with self._lock:
            for region in regions:
                self._held[region] -= 1
                if not self._held[region]:
                    del self._held[region]
                    self._store.release([region])

    def _take(self, region: bytes) -> bool:
        with self._lock:
            if region not in self._held:
                if not self._store.try_claim([region]):
                    return False
                self._held[region] = 0
            self._held[region] += 1
            return True
