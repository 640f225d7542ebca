"""Streams that are read again and again because no cache is large enough, that break, and that are more than threads:
nobody waits for ever, and what a stream has left that was never hashed to its end is not believed for ever.
"""

import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.scan import LayerScan
from ckptfs.errors import CkptfsError, IntegrityError, UnavailableError
from ckptfs.layers.protocols import Emit, Verification
from ckptfs.model.toc import Chunk, Entry
from ckptfs.settings import Settings
from tests.support.blobs import blob_of

COUNT, LENGTH = 40, 1000
DATA = Random(1).randbytes(COUNT * LENGTH)


def chunk(number: int, layer: int = 0) -> Chunk:
    data = DATA[number * LENGTH : (number + 1) * LENGTH]
    key = hashlib.sha256(b"%d/%d" % (layer, number)).digest()
    return Chunk(key, layer, number * LENGTH, LENGTH, LENGTH, hashlib.sha256(data).digest())


class Stream:
    """A layer that can only be read from the front."""

    format = "gzip"
    sequential = True
    verification: Verification = "transport"

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.runs = 0
        self.failure: CkptfsError | None = None

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        self.runs += 1
        for number in range(COUNT):
            if self.failure is not None and number == COUNT // 2:
                raise self.failure
            emit(chunk(number, self.number), DATA[number * LENGTH : (number + 1) * LENGTH])
        return iter(())
        yield

    def decode(self, chunk: Chunk, data: memoryview) -> bytes:
        raise NotImplementedError


async def read_at_random(fetcher: Fetcher, seed: int, count: int) -> None:
    rng = Random(seed)
    for _ in range(count):
        number = rng.randrange(COUNT)
        assert bytes(await fetcher.get(chunk(number))) == DATA[number * LENGTH : (number + 1) * LENGTH]


def run(memory: int, readers: int, each: int, layer: Stream, *, known: bool) -> None:
    async def main() -> None:
        cache = ChunkCache.ephemeral(size=0)
        fetcher = Fetcher(cache, MemoryCache(memory), Settings())
        scan = LayerScan(layer, fetcher, lambda _: None, lambda _: None, number=0, known=known)  # type: ignore[arg-type]
        fetcher.add_layer(blob_of(DATA), layer, scan)  # type: ignore[arg-type]
        with trio.fail_after(30):
            async with trio.open_nursery() as outer:
                outer.start_soon(fetcher.run)
                outer.start_soon(scan.run)
                async with trio.open_nursery() as nursery:
                    for seed in range(readers):
                        nursery.start_soon(read_at_random, fetcher, seed, each)
                scan.stop()
                outer.cancel_scope.cancel()
        cache.close()

    trio.run(main)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("memory", [0, 2 * LENGTH, 10 * LENGTH])
def test_everybody_gets_his_chunk(memory: int, known: bool) -> None:
    layer = Stream()
    run(memory, 8, 60, layer, known=known)
    assert layer.runs > 1


def test_a_broken_stream_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Stream()
    layer.failure = UnavailableError("the registry is gone")
    with pytest.raises(BaseExceptionGroup) as caught:
        run(0, 8, 60, layer, known=True)
    assert caught.group_contains(UnavailableError, match="gone")


def test_streams_that_wait_keep_no_thread_from_others() -> None:
    """Each of many is read for one chunk and then rests; of trio's own threads there are 40."""
    streams = 64

    async def main() -> None:
        cache = ChunkCache.ephemeral(size=0)
        fetcher = Fetcher(cache, MemoryCache(0), Settings())
        scans = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetcher.run)
            for number in range(streams):
                layer = Stream(number)
                scan = LayerScan(layer, fetcher, lambda _: None, lambda _: None, number=number, known=True)  # type: ignore[arg-type]
                fetcher.add_layer(blob_of(DATA), layer, scan)  # type: ignore[arg-type]
                nursery.start_soon(scan.run)
                scans.append(scan)
            with trio.fail_after(10):
                for number in range(streams):
                    assert bytes(await fetcher.get(chunk(0, number))) == DATA[:LENGTH]
                await trio.to_thread.run_sync(lambda: None)
            for scan in scans:
                scan.stop()
            nursery.cancel_scope.cancel()
        cache.close()

    trio.run(main)


Ends = trio.MemoryReceiveChannel[CkptfsError | None]


def scan_of(layer: Stream, cache: ChunkCache, *, memory: int = 0) -> tuple[Fetcher, LayerScan, Ends]:
    """A fetcher that has the layer, the scan of it, not begun, and how each of its runs has ended."""
    fetcher = Fetcher(cache, MemoryCache(memory), Settings())
    send, ends = trio.open_memory_channel[CkptfsError | None](2)
    scan = LayerScan(layer, fetcher, lambda _: None, send.send_nowait, number=0)  # type: ignore[arg-type]
    fetcher.add_layer(blob_of(DATA), layer, scan)  # type: ignore[arg-type]
    return fetcher, scan, ends


@asynccontextmanager
async def failed(fetcher: Fetcher, scan: LayerScan, ends: Ends) -> AsyncIterator[None]:
    """Both are at work, and the first run of the scan has found the layer to be wrong; within ten seconds."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetcher.run)
        nursery.start_soon(scan.run)
        with trio.fail_after(10):
            assert isinstance(await ends.receive(), IntegrityError)
        yield
        scan.stop()
        nursery.cancel_scope.cancel()


class Damaged(Stream):
    """Its first run has wrong bytes on the way, and breaks before anybody can tell."""

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        self.runs += 1
        first = self.runs == 1
        for number in range(COUNT // 2 if first else COUNT):
            data = DATA[number * LENGTH : (number + 1) * LENGTH]
            emit(chunk(number), bytes(LENGTH) if first and number == 3 else data)
        if first:
            raise UnavailableError("the registry is gone")
        return iter(())
        yield


def test_a_stream_that_is_right_replaces_what_a_broken_one_has_left(tmp_path: Path) -> None:
    async def main() -> None:
        with ChunkCache.open(tmp_path / "cache", size=1 << 24) as cache:
            fetcher, scan, ends = scan_of(Damaged(), cache)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetcher.run)
                nursery.start_soon(scan.run)
                with trio.fail_after(10):
                    assert isinstance(await ends.receive(), UnavailableError)
                    assert fetcher.cache.flush(5)
                    assert cache.get(chunk(3).key) == bytes(LENGTH), "nobody can tell, so far"
                    scan.run_on()
                    assert await ends.receive() is None
                for number in range(COUNT):
                    expected = DATA[number * LENGTH : (number + 1) * LENGTH]
                    assert bytes(await fetcher.get(chunk(number))) == expected
                scan.stop()
                nursery.cancel_scope.cancel()
        with ChunkCache.open(tmp_path / "cache", size=1 << 24) as cache:
            assert cache.get(chunk(3).key) == DATA[3 * LENGTH : 4 * LENGTH]

    trio.run(main)


class Wrong(Stream):
    """It is not what its digest says."""

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        yield from super().scan(emit, attempt=attempt)
        raise IntegrityError("another layer")


def test_a_stream_that_was_wrong_is_dropped_while_others_are_answered() -> None:
    """A layer of 10 GB are 40 000 chunks."""

    async def main() -> None:
        layer = Wrong()
        with ChunkCache.ephemeral(size=1 << 24) as cache:
            fetcher, scan, ends = scan_of(layer, cache, memory=1 << 20)
            drop, threads = cache.drop, []

            def watched(*keys: bytes) -> None:
                threads.append(threading.current_thread())
                trio.from_thread.run_sync(fetcher.lookup, chunk(0))  # somebody reads just then
                drop(*keys)

            cache.drop = watched  # type: ignore[method-assign]
            async with failed(fetcher, scan, ends):
                assert threading.current_thread() not in threads and len(threads) == layer.runs == 2
                assert not any(fetcher.has(chunk(number)) for number in range(COUNT))
                fetcher.memory.put(chunk(1).key, DATA[LENGTH : 2 * LENGTH])  # a request that was under way
                for number in range(2):
                    with pytest.raises(IntegrityError):
                        await fetcher.get(chunk(number))

    trio.run(main)


def test_what_is_asked_for_between_two_tries_is_no_reason_for_a_third() -> None:
    async def main() -> None:
        layer = Wrong()
        with ChunkCache.ephemeral(size=0) as cache:
            fetcher, scan, ends = scan_of(layer, cache)
            drop = cache.drop

            def watched(*keys: bytes) -> None:
                trio.from_thread.run_sync(scan.need, chunk(5))
                drop(*keys)

            cache.drop = watched  # type: ignore[method-assign]
            async with failed(fetcher, scan, ends):
                assert layer.runs == 2

    trio.run(main)
