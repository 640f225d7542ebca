"""A disk that takes its time: what has been fetched is found before it is written, and nobody waits for the disk."""

import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from ckptfs.engine import errands, write_behind
from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.disk import DiskOps
from ckptfs.engine.errands import Errands
from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.schedule import Priority
from ckptfs.engine.write_behind import WriteBehind
from ckptfs.layers.grid import Grid
from ckptfs.layers.tar import TarFormat
from ckptfs.model.toc import Chunk
from ckptfs.settings import KiB, MiB, Settings, Sizes
from tests.support.blobs import BytesBlob, blob_of
from tests.support.cache_load import item, key
from tests.support.disk_faults import Stuck
from tests.support.readers import content
from tests.support.tools import wait_for

UNIT = 64 * KiB


@pytest.fixture
def disk() -> Iterator[Stuck]:
    ops = Stuck("pwritev")
    yield ops
    ops.free()


@pytest.fixture
def cache(tmp_path: Path, disk: Stuck) -> Iterator[ChunkCache]:
    with ChunkCache.open(tmp_path / "cache", size=256 * MiB, ops=disk) as cache:
        yield cache
        disk.free()


@pytest.fixture
def behind(cache: ChunkCache) -> WriteBehind:
    return WriteBehind(cache)


def parts(first: int, last: int, size: int = UNIT) -> list[tuple[bytes, bytes]]:
    return [item(number, size) for number in range(first, last)]


# -- the queue ---------------------------------------------------------------------------------------------------------


def test_what_is_not_written_yet_is_found(behind: WriteBehind, cache: ChunkCache, disk: Stuck) -> None:
    disk.stick()
    chunks = parts(0, 4)
    behind.put_many(chunks)
    disk.reached()
    buffer = bytearray(100)
    for number, (name, data) in enumerate(chunks):
        assert behind.contains(name) and behind.get(name) == data
        assert behind.read_into(name, 1000, memoryview(buffer)) and buffer == data[1000:1100]
        assert not behind.read_into(name, UNIT - 50, memoryview(buffer)), "it is not that long"
        assert cache.get(key(number)) is None, "it cannot be on disk"
    disk.free()
    assert behind.flush(5)
    assert [cache.get(name) for name, _ in chunks] == [data for _, data in chunks]
    assert [behind.get(name) for name, _ in chunks] == [data for _, data in chunks]


def test_a_read_of_what_nobody_has(behind: WriteBehind) -> None:
    assert behind.get(key(1)) is None and not behind.contains(key(1))
    assert not behind.read_into(key(1), 0, memoryview(bytearray(1)))


def test_what_is_put_while_the_disk_is_stuck_is_written_with_few_calls(behind: WriteBehind, disk: Stuck) -> None:
    disk.stick()
    behind.put_many(parts(0, 1))
    disk.reached()
    before = disk.calls
    for number in range(1, 65):
        behind.put_many(parts(number, number + 1))
    disk.free()
    assert behind.flush(5)
    assert disk.calls - before <= 2 * 5  # 4 MiB, with a call for the data and one for the records of each


def test_who_fetches_ahead_waits_for_room_and_who_is_waited_for_does_not(
    behind: WriteBehind, disk: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "_MOST", 4 * UNIT)
    disk.stick()
    behind.put_many(parts(0, 3))
    disk.reached()
    behind.put_many(parts(3, 6), urgent=True)
    assert not behind.contains(key(3)), "more than may be held"
    ahead = threading.Thread(target=behind.put_many, args=[parts(6, 9)])
    ahead.start()
    ahead.join(0.1)
    assert ahead.is_alive() and not behind.contains(key(6))
    disk.free()
    ahead.join(5)
    assert not ahead.is_alive() and behind.flush(5)
    assert behind.contains(key(8)) and not behind.contains(key(3))


def test_chunks_of_more_than_may_be_held_are_written_all_the_same(
    behind: WriteBehind, cache: ChunkCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "_MOST", UNIT)
    behind.put_many(parts(0, 3))
    behind.put_many(parts(3, 6))
    assert behind.flush(5)
    assert all(cache.contains(key(number)) for number in range(6))


def test_what_is_dropped_is_not_written_afterwards(behind: WriteBehind, cache: ChunkCache, disk: Stuck) -> None:
    disk.stick()
    behind.put_many(parts(0, 1))
    disk.reached()
    behind.put_many(parts(1, 3))
    behind.drop(key(1))
    assert not behind.contains(key(1)) and behind.contains(key(2))
    disk.free()
    assert behind.flush(5)
    assert not cache.contains(key(1)) and cache.contains(key(2))


def test_what_is_dropped_while_it_is_being_written_is_gone_afterwards(
    behind: WriteBehind, cache: ChunkCache, disk: Stuck
) -> None:
    disk.stick()
    behind.put_many(parts(0, 2))
    disk.reached()
    dropping = threading.Thread(target=behind.drop, args=[key(0)])
    dropping.start()
    wait_for("nobody is to find it", lambda: not behind.contains(key(0)))
    dropping.join(0.1)
    assert dropping.is_alive()
    disk.free()
    dropping.join(5)
    assert not dropping.is_alive() and behind.flush(5)
    assert not behind.contains(key(0)) and not cache.contains(key(0)) and cache.contains(key(1))


def test_what_is_put_anew_wins(behind: WriteBehind, cache: ChunkCache, disk: Stuck) -> None:
    disk.stick()
    behind.put_many(parts(0, 1))
    disk.reached()
    behind.put_many([(key(1), b"wrong")])
    behind.drop(key(1))
    behind.put_many([(key(1), b"right")])
    assert behind.get(key(1)) == b"right"
    disk.free()
    assert behind.flush(5)
    assert cache.get(key(1)) == behind.get(key(1)) == b"right"


def test_an_action_comes_after_the_chunks_before_it(behind: WriteBehind, cache: ChunkCache, disk: Stuck) -> None:
    done: list[bool] = []
    behind.after(lambda: done.append(True))
    assert done == [True], "nothing is to be written"
    disk.stick()
    behind.put_many(parts(0, 1))
    disk.reached()
    behind.after(lambda: done.append(cache.contains(key(0))))
    behind.put_many(parts(1, 2))
    behind.after(lambda: done.append(cache.contains(key(1))))
    time.sleep(0.05)
    assert done == [True]
    disk.free()
    wait_for("all actions", lambda: len(done) == 3)
    assert done == [True, True, True]


def test_a_flush_has_patience_only(behind: WriteBehind, disk: Stuck) -> None:
    disk.stick()
    behind.put_many(parts(0, 1))
    began = time.monotonic()
    assert not behind.flush(0.1) and not behind.flush(0)
    assert time.monotonic() - began < 2
    disk.free()
    assert behind.flush()


def test_a_disk_that_refuses_keeps_nobody_waiting(tmp_path: Path) -> None:
    class Refusing(DiskOps):
        @staticmethod
        def pwritev(fd: int, buffers: Sequence[object], offset: int) -> int:
            raise OSError(28, "No space left on device")

    with ChunkCache.open(tmp_path / "cache", size=256 * MiB, ops=Refusing()) as cache:
        behind = WriteBehind(cache)
        for number in range(100):
            behind.put_many(parts(number, number + 1))
        assert behind.flush(5)
        assert not behind.contains(key(0)) and not behind.behind


def test_without_threads_it_is_written_at_once(
    behind: WriteBehind, cache: ChunkCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    for number in range(3):
        behind.put_many(parts(number, number + 1))
        assert cache.contains(key(number)) and behind.flush(0)


# -- the thread --------------------------------------------------------------------------------------------------------


def test_the_thread_ends_when_it_rests_and_another_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errands, "_REST", 0.05)
    doing = Errands("test-errands")
    names: list[str] = []

    def at_work() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "test-errands"]

    for count in (1, 2):
        doing.do(lambda: names.append(threading.current_thread().name))
        wait_for("it is done", lambda count=count: len(names) == count)
        wait_for("the thread has ended", lambda: not at_work())
    assert names == ["test-errands"] * 2


def test_an_errand_that_fails_is_told_and_the_next_one_is_done(caplog: pytest.LogCaptureFixture) -> None:
    doing, done = Errands("test-errands"), threading.Event()
    doing.do(lambda: 1 // 0)
    doing.do(done.set)
    assert done.wait(5)
    assert "an errand failed" in caplog.text and "ZeroDivisionError" in caplog.text


# -- a fetcher on it ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def fetching(cache: ChunkCache, count: int) -> AsyncIterator[tuple[Fetcher, BytesBlob, list[Chunk]]]:
    """A fetcher at work on a layer of so many chunks of 64 KiB; for 20 seconds at most."""
    blob = blob_of(content(count * UNIT))
    settings = Settings()._replace(sizes=Sizes(grid=UNIT))
    fetcher = Fetcher(cache, MemoryCache(0), settings)
    fetcher.add_layer(blob, TarFormat().open(blob, 0, settings))
    grid = Grid("layer", 0, UNIT, count * UNIT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetcher.run)
        with trio.fail_after(20):
            yield fetcher, blob, [grid.chunk(number) for number in range(count)]
        nursery.cancel_scope.cancel()


def test_reads_are_answered_while_a_write_hangs(cache: ChunkCache, disk: Stuck) -> None:
    """One at a time, far more of them than there are places for requests under way."""

    async def main() -> None:
        async with fetching(cache, 200) as (fetcher, blob, chunks):
            disk.stick()
            for chunk in chunks:
                with trio.fail_after(1):
                    assert bytes(await fetcher.get(chunk)) == blob.data[chunk.offset :][:UNIT]
            assert all(fetcher.has(chunk) for chunk in chunks) and not cache.contains(chunks[-1].key)
            asked = len(blob.ranges)
            for chunk in chunks:
                assert fetcher.lookup(chunk) is not None
            assert len(blob.ranges) == asked
            disk.free()

    trio.run(main)
    assert (
        len(list(filter(cache.contains, (Grid("layer", 0, UNIT, 200 * UNIT).chunk(n).key for n in range(200))))) == 200
    )


def test_what_nobody_waits_for_waits_for_the_disk(
    cache: ChunkCache, disk: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "_BEHIND", 8 * UNIT)

    async def main() -> None:
        async with fetching(cache, 2000) as (fetcher, blob, chunks):
            disk.stick()
            fetcher.fill(iter(chunks[:1900]))
            with trio.move_on_after(0.5):
                await fetcher.settled()
            came = sum(length for _, length in blob.ranges)
            assert 8 * UNIT < came < 1000 * UNIT, "no more than was under way"
            with trio.fail_after(1):
                await fetcher.get_all(chunks[1950:], Priority.DEMAND)
            disk.free()
            await fetcher.settled()
            assert all(cache.contains(chunk.key) for chunk in chunks[:1900])

    trio.run(main)


def test_what_is_settled_is_on_disk(cache: ChunkCache, disk: Stuck) -> None:
    async def main() -> None:
        async with fetching(cache, 20) as (fetcher, _, chunks):
            disk.stick()
            fetcher.fill(iter(chunks))
            with trio.move_on_after(0.3):
                await fetcher.settled()
                pytest.fail("the disk is stuck")
            disk.free()
            await fetcher.settled()
            assert all(cache.contains(chunk.key) for chunk in chunks)

    trio.run(main)


def test_a_disk_that_hangs_does_not_keep_a_mount_from_ending(
    cache: ChunkCache, disk: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptfs.engine.fetch._LAST_WRITES", 0.2)

    async def main() -> None:
        async with fetching(cache, 4) as (fetcher, _, chunks):
            disk.stick()
            await fetcher.get(chunks[0])

    began = time.monotonic()
    trio.run(main)
    assert time.monotonic() - began < 5


def test_another_process_waits_for_what_is_on_its_way_to_the_disk(
    cache: ChunkCache, disk: Stuck, tmp_path: Path
) -> None:
    """It is claimed until then: the other one takes it from the disk, and fetches nothing."""

    async def main() -> None:
        with ChunkCache.open(tmp_path / "cache", size=256 * MiB) as other:
            async with fetching(cache, 1) as (ours, _, chunks), fetching(other, 1) as (theirs, blob, _):
                disk.stick()
                data = await ours.get(chunks[0])
                with trio.move_on_after(0.3):
                    await theirs.get(chunks[0])
                    pytest.fail("it cannot have it")
                disk.free()
                with trio.fail_after(2):
                    assert await theirs.get(chunks[0]) == data
                assert not blob.ranges

    trio.run(main)


# -- reading while the disk is busy ------------------------------------------------------------------------------------


def test_a_hit_does_not_wait_for_the_note_that_it_was_used(tmp_path: Path) -> None:
    disk = Stuck("utime")
    with ChunkCache.open(tmp_path / "cache", size=256 * MiB, ops=disk) as cache:
        cache.put_many(parts(0, 1))
        disk.stick()
        began = time.monotonic()
        assert cache.get(key(0)) is not None
        assert time.monotonic() - began < 1
        disk.reached()
        disk.free()


def test_a_miss_does_not_wait_for_a_segment_that_is_begun(tmp_path: Path) -> None:
    disk = Stuck("open")
    with ChunkCache.open(tmp_path / "cache", size=256 * MiB, ops=disk) as cache:
        disk.stick()
        writing = threading.Thread(target=cache.put_many, args=[parts(0, 1)])
        writing.start()
        disk.reached()
        began = time.monotonic()
        assert cache.get(key(1)) is None and not cache.contains(key(0))
        assert time.monotonic() - began < 1
        disk.free()
        writing.join(5)
        assert cache.contains(key(0))
