"""What every cache of chunks promises: on disk, without a name, and in memory."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.memory import MemoryCache
from tests.support.cache_load import chunk, item, key, right

KiB, MiB = 1024, 1024 * 1024
SIZE = 16 * MiB


class InMemory:
    """MemoryCache with the names that the caches on disk have."""

    def __init__(self) -> None:
        self.memory = MemoryCache(SIZE)
        self.get, self.drop, self.contains = self.memory.get, self.memory.drop, self.memory.__contains__

    def put_many(self, items: list[tuple[bytes, bytes | memoryview]]) -> None:
        for name, data in items:
            self.memory.put(name, data)

    def close(self) -> None:
        pass


AnyCache = ChunkCache | InMemory
CACHES: dict[str, Callable[[Path], AnyCache]] = {
    "disk": lambda path: ChunkCache.open(path / "cache", size=SIZE),
    "encrypted": lambda path: ChunkCache.open(path / "cache", size=SIZE, secret=b"0123456789abcdef"),
    "ephemeral": lambda path: ChunkCache.ephemeral(path, size=SIZE),
    "ephemeral, encrypted": lambda path: ChunkCache.ephemeral(path, size=SIZE, secret=b"0123456789abcdef"),
    "memory": lambda path: InMemory(),
}


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyCache]:
    with closing(CACHES[request.param](tmp_path)) as cache:
        yield cache


@pytest.fixture(params=["disk", "encrypted", "ephemeral", "ephemeral, encrypted"])
def chunk_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkCache]:
    with closing(CACHES[request.param](tmp_path)) as cache:
        assert isinstance(cache, ChunkCache)
        yield cache


def test_what_was_put_is_there(cache: AnyCache) -> None:
    assert cache.get(key(1)) is None and not cache.contains(key(1))
    cache.put_many([item(1, 100), item(2, 300 * KiB)])
    cache.put_many([(key(3), memoryview(chunk(3, 5000))[1000:])])
    for _ in range(2):
        assert cache.get(key(1)) == chunk(1, 100)
        assert cache.get(key(2)) == chunk(2, 300 * KiB)
        assert cache.get(key(3)) == chunk(3, 5000)[1000:]
    assert cache.contains(key(2)) and not cache.contains(key(4))


def test_an_empty_batch_is_nothing(cache: AnyCache) -> None:
    cache.put_many([])
    assert cache.get(key(1)) is None


def test_a_dropped_chunk_is_gone_and_can_come_back(cache: AnyCache) -> None:
    cache.put_many([item(1, 1000), item(2, 1000)])
    cache.drop(key(1))
    cache.drop(key(9))
    assert cache.get(key(1)) is None and cache.get(key(2)) == chunk(2, 1000)
    cache.put_many([item(1, 1000)])
    assert cache.get(key(1)) == chunk(1, 1000)


def test_the_bound_holds_and_what_is_used_stays(cache: AnyCache) -> None:
    for number in range(0, 800, 4):  # 50 MiB into 16
        cache.put_many([item(n, 64 * KiB) for n in range(number, number + 4)])
        assert cache.get(key(0)) == chunk(0, 64 * KiB)
    kept = sum(cache.get(key(n)) is not None for n in range(800))
    assert 0.7 * SIZE <= kept * 64 * KiB <= SIZE
    assert cache.get(key(799)) == chunk(799, 64 * KiB) and cache.get(key(1)) is None


def test_what_was_used_stays_also_when_there_are_more_segments_than_open_files(
    chunk_cache: ChunkCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptfs.engine.chunk_index._OPEN_FILES", 4)
    for number in range(200):
        chunk_cache.put_many([item(number, 64 * KiB)])
    assert len(right(chunk_cache, range(200), 64 * KiB)) == 200
    for number in range(200, 320):
        chunk_cache.put_many([item(number, 64 * KiB)])
    assert 15 <= len(right(chunk_cache, range(60), 64 * KiB)) <= 30, "half of the two oldest segments"


def test_a_chunk_larger_than_the_cache_is_left_out(cache: AnyCache) -> None:
    cache.put_many([item(1, 100), item(2, SIZE + 1), item(3, 100)])
    assert cache.get(key(2)) is None
    assert cache.get(key(1)) == chunk(1, 100) and cache.get(key(3)) == chunk(3, 100)


def test_threads_see_only_right_bytes(cache: AnyCache) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(400):
            number = (i * 7919 + seed * 31) % 700
            length = 10_000 + number % 50_000
            data = cache.get(key(number))
            if data is None:
                cache.put_many([item(number, length)])
            elif data != chunk(number, length):
                wrong.append(number)

    threads = [Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_reading_parts(chunk_cache: ChunkCache) -> None:
    data = chunk(1, 10_000)
    chunk_cache.put_many([(key(1), data)])
    for offset, length in ((500, 100), (0, 10_000), (0, 0), (9_999, 1), (10_000, 0)):
        buffer = bytearray(length)
        assert chunk_cache.read_into(key(1), offset, memoryview(buffer))
        assert buffer == data[offset : offset + length]
    for offset, length in ((9_999, 2), (10_001, 0), (-1, 1)):
        assert not chunk_cache.read_into(key(1), offset, memoryview(bytearray(length)))
    assert not chunk_cache.read_into(key(2), 0, memoryview(bytearray(1)))
    assert chunk_cache.get(key(1)) == data


def test_documents(chunk_cache: ChunkCache) -> None:
    assert chunk_cache.get_document("toc/sha256:1") is None
    chunk_cache.put_document("toc/sha256:1", b"one" * 100_000)
    chunk_cache.put_document("manifest/host/repo:tag", b"")
    assert chunk_cache.get_document("toc/sha256:1") == b"one" * 100_000
    assert chunk_cache.get_document("manifest/host/repo:tag") == b""
    chunk_cache.put_document("toc/sha256:1", b"two")
    assert chunk_cache.get_document("toc/sha256:1") == b"two"
    chunk_cache.delete_document("toc/sha256:1")
    chunk_cache.delete_document("never/was")
    assert chunk_cache.get_document("toc/sha256:1") is None
    assert chunk_cache.stats().documents == 1


def test_documents_are_bounded(chunk_cache: ChunkCache) -> None:
    chunk_cache.put_document("too large", bytes(SIZE // 4 + 1))
    for number in range(8):
        chunk_cache.put_document(str(number), bytes(1 * MiB - 200))
    assert chunk_cache.get_document("too large") is None
    assert chunk_cache.get_document("0") is None and chunk_cache.get_document("7") is not None
    assert chunk_cache.stats().documents == 4


def test_claims_exclude_and_are_given_back(chunk_cache: ChunkCache) -> None:
    keys = {key(n) for n in range(3)}
    assert chunk_cache.try_claim(keys) == keys
    assert chunk_cache.try_claim([key(0), key(5)]) == {key(5)}
    chunk_cache.release([key(0), key(7)])
    assert chunk_cache.try_claim([key(0)]) == {key(0)}


def test_statistics(chunk_cache: ChunkCache) -> None:
    chunk_cache.put_many([item(n, 100 * KiB) for n in range(10)])
    stats = chunk_cache.stats()
    assert (stats.chunks, stats.segments) == (10, 1)
    assert 1000 * KiB <= stats.bytes <= 1100 * KiB


def test_prune_and_clear(chunk_cache: ChunkCache) -> None:
    for number in range(0, 160, 10):
        chunk_cache.put_many([item(n, 64 * KiB) for n in range(number, number + 10)])
    chunk_cache.put_document("d", b"x")
    chunk_cache.prune(5 * MiB)
    stats = chunk_cache.stats()
    assert 2 * MiB <= stats.bytes <= 5 * MiB and stats.documents == 1
    assert chunk_cache.get(key(0)) is None and chunk_cache.get(key(159)) == chunk(159, 64 * KiB)
    chunk_cache.clear()
    stats = chunk_cache.stats()
    assert (stats.bytes, stats.chunks, stats.documents, stats.segments) == (0, 0, 0, 0)
    chunk_cache.put_many([item(1, 100)])
    assert chunk_cache.get(key(1)) == chunk(1, 100)


def test_verify_finds_nothing_wrong(chunk_cache: ChunkCache) -> None:
    chunk_cache.put_many([item(n, 1000) for n in range(50)])
    chunk_cache.put_document("d", b"x")
    assert chunk_cache.verify() == (51, 0)
    assert chunk_cache.stats().chunks == 50


def test_after_close_everything_is_a_miss(chunk_cache: ChunkCache) -> None:
    chunk_cache.put_many([item(1, 100)])
    chunk_cache.close()
    assert chunk_cache.get(key(1)) is None and not chunk_cache.contains(key(1))
    chunk_cache.put_many([item(1, 100)])
    chunk_cache.refresh()
    assert chunk_cache.get(key(1)) is None


def test_memory_counts_bytes() -> None:
    memory = MemoryCache(1000)
    memory.put(key(1), b"x" * 600)
    memory.put(key(1), b"y" * 500)
    memory.put(key(2), b"z" * 1001)
    assert (memory.get(key(1)), memory.get(key(2)), memory.bytes) == (b"y" * 500, None, 500)
    memory.put(key(3), b"w" * 501)
    assert memory.get(key(1)) is None and memory.bytes == 501
