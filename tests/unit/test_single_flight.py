"""A chunk that another process of the node is fetching: waited for, taken over, or fetched all the same in the end."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.extents import Receiver
from ckptfs.engine.link import LinkEstimate
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.regions import RegionClaims
from ckptfs.engine.schedule import Job, Priority
from ckptfs.engine.waiting import Waiting
from ckptfs.engine.write_behind import WriteBehind
from ckptfs.errors import CkptfsError
from ckptfs.layers.grid import Grid
from ckptfs.layers.tar import TarFormat
from ckptfs.settings import KiB, MiB, Settings, Sizes
from tests.support.blobs import BytesBlob, blob_of
from tests.support.tools import wait_for

DATA = bytes(64 * KiB)
CHUNK = Grid("layer", 0, 64 * KiB, len(DATA)).chunk(0)


def receiver_of(cache: WriteBehind, patience: float, memory: MemoryCache | None = None) -> Receiver:
    memory = memory or MemoryCache(1 * MiB)
    return Receiver(cache, memory, Waiting(), LinkEstimate(Sizes()), patience, 64 * KiB, lambda: None)


class Neighbour:
    """Another process: it has claimed the chunk."""

    def __init__(self, cache: ChunkCache, blob: bytes) -> None:
        self.cache = cache
        self._claims = RegionClaims(cache)
        mine, _, self._regions = self._claims.take(blob, [CHUNK])
        assert mine == [CHUNK]

    def release(self) -> None:
        self._claims.release(self._regions)


class Fetch(threading.Thread):
    """One job of ours; `asked` are the ranges that went to the registry."""

    def __init__(self, cache: ChunkCache, patience: float) -> None:
        super().__init__()
        self.blob = blob_of(DATA)
        self.asked = self.blob.ranges
        self.memory = MemoryCache(1 * MiB)
        self.failures: dict[bytes, CkptfsError] = {}
        self.cache = WriteBehind(cache)
        self._receiver = receiver_of(self.cache, patience, self.memory)

    def run(self) -> None:
        job = Job(0, CHUNK.offset, CHUNK.offset + CHUNK.size, [CHUNK], Priority.DEMAND)
        self.failures = self._receiver.fetch(job, self.blob, TarFormat().open(self.blob, 0, Settings()))


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[tuple[ChunkCache, ChunkCache]]:
    with ChunkCache.open(tmp_path / "cache") as one, ChunkCache.open(tmp_path / "cache") as other:
        yield one, other


def begun(caches: tuple[ChunkCache, ChunkCache], patience: float = 10) -> tuple[Fetch, Neighbour]:
    fetch = Fetch(caches[0], patience)
    neighbour = Neighbour(caches[1], fetch.blob.descriptor.digest.raw)
    fetch.start()
    time.sleep(0.05)
    assert fetch.asked == [] and fetch.memory.get(CHUNK.key) is None
    return fetch, neighbour


def test_what_another_has_put_is_taken_at_once_and_not_fetched(caches: tuple[ChunkCache, ChunkCache]) -> None:
    fetch, neighbour = begun(caches)
    neighbour.cache.put_many([(CHUNK.key, DATA)])
    fetch.join(1)  # the claim is held still
    assert not fetch.is_alive()
    assert (fetch.failures, fetch.memory.get(CHUNK.key), fetch.asked) == ({}, DATA, [])


def test_what_another_has_given_up_is_fetched(caches: tuple[ChunkCache, ChunkCache]) -> None:
    fetch, neighbour = begun(caches)
    neighbour.release()
    fetch.join(1)
    assert not fetch.is_alive()
    assert (fetch.failures, fetch.memory.get(CHUNK.key), fetch.asked) == ({}, DATA, [(0, len(DATA))])
    assert fetch.cache.flush(5)
    assert caches[1].get(CHUNK.key) == DATA


def test_another_that_does_not_fetch_is_not_waited_for_long(caches: tuple[ChunkCache, ChunkCache]) -> None:
    fetch, _ = begun(caches, patience=0.2)
    fetch.join(2)
    assert not fetch.is_alive()
    assert (fetch.failures, fetch.memory.get(CHUNK.key), fetch.asked) == ({}, DATA, [(0, len(DATA))])


def test_what_has_come_while_we_fetched_is_not_fetched_again(caches: tuple[ChunkCache, ChunkCache]) -> None:
    """Two others: one gives up, so that we fetch for longer than others are waited for; the second one delivers."""
    grid = Grid("layer", 0, 256 * KiB, 512 * KiB)
    ours, theirs = grid.chunk(0), grid.chunk(1)
    data = bytes(512 * KiB)
    receiver = receiver_of(WriteBehind(caches[0]), 0.2)
    claims = RegionClaims(caches[1])

    class Slow(BytesBlob):
        def stream(self, offset: int, length: int, **options: object) -> Iterator[bytes | memoryview]:
            time.sleep(0.5)
            caches[1].put_many([(theirs.key, data[: 256 * KiB])])
            return super().stream(offset, length)

    plain = blob_of(data)
    blob = Slow(data, plain.descriptor)
    _, _, failing = claims.take(plain.descriptor.digest.raw, [ours])
    _, _, delivering = claims.take(plain.descriptor.digest.raw, [theirs])
    threading.Timer(0.1, claims.release, [failing]).start()
    job = Job(0, 0, len(data), [ours, theirs], Priority.DEMAND)
    assert receiver.fetch(job, blob, TarFormat().open(blob, 0, Settings())) == {}
    assert blob.ranges == [(0, 256 * KiB)]
    claims.release(delivering)


def test_what_another_fetches_in_the_middle_of_ours_is_not_fetched_with_it(
    caches: tuple[ChunkCache, ChunkCache],
) -> None:
    grid = Grid("layer", 0, 256 * KiB, 1 * MiB)
    chunks, data = [grid.chunk(number) for number in range(4)], bytes(1 * MiB)
    blob = blob_of(data)
    receiver = receiver_of(WriteBehind(caches[0]), 10)
    claims = RegionClaims(caches[1])
    _, _, theirs = claims.take(blob.descriptor.digest.raw, [chunks[1]])
    job = Job(0, 0, len(data), chunks, Priority.PREFETCH)
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(receiver.fetch, job, blob, TarFormat().open(blob, 0, Settings()))
        wait_for("ours", lambda: caches[0].contains(chunks[3].key))
        caches[1].put_many([(chunks[1].key, data[: 256 * KiB])])
        claims.release(theirs)
        assert fetched.result(5) == {}
    assert blob.ranges == [(0, 256 * KiB), (512 * KiB, 512 * KiB)]
    assert job.received == 768 * KiB
