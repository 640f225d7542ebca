"""A working set that is scattered over a blob, fetched with few requests; a wrong byte in one of its pieces."""

import hashlib
from collections.abc import Iterator, Sequence

import pytest
import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.schedule import Priority
from ckptfs.errors import IntegrityError
from ckptfs.layers.tar import TarLayer
from ckptfs.model.blob import Blob
from ckptfs.model.toc import Chunk
from ckptfs.settings import KiB, Settings
from tests.support.blobs import BytesBlob, blob_of
from tests.support.readers import content

PIECE = 8 * KiB
DATA = content(100 * 128 * KiB)


class Far(BytesBlob):
    """Notes how many requests it gets; sends wrong bytes from `spoiled` as often as `times` says."""

    requests = 0
    spoiled = -1
    times = 0

    def stream_ranges(
        self, ranges: Sequence[tuple[int, int]], *, attempt: int = 0, patient: bool = False
    ) -> Iterator[tuple[int, bytes | memoryview]]:
        self.requests += 1
        for at, piece in Blob.stream_ranges(self, ranges, attempt=attempt, patient=patient):
            if at == self.spoiled and self.times:
                self.times -= 1
                yield at, bytes(len(piece))
            else:
                yield at, piece


class Checked(TarLayer):
    """A layer of plain bytes with a digest for each chunk."""

    def decode(self, chunk: Chunk, data: memoryview) -> memoryview:
        if hashlib.sha256(data).digest() != chunk.key:
            raise IntegrityError("wrong bytes")
        return data


def chunks() -> list[Chunk]:
    places = [(number * 37 % 100) * 128 * KiB for number in range(60)]
    return [Chunk(hashlib.sha256(DATA[at : at + PIECE]).digest(), 0, at, PIECE, PIECE) for at in places]


async def fetched(far: Far) -> None:
    wanted = chunks()
    cache = ChunkCache.ephemeral(size=0)
    fetcher = Fetcher(cache, MemoryCache(64 * KiB * KiB), Settings())
    fetcher.add_layer(far, Checked(far, 0, Settings()))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetcher.run)
            fetcher.want(wanted, Priority.PREFETCH)
            await fetcher.settled()
            try:
                for chunk in wanted:
                    data = await fetcher.get(chunk)
                    assert bytes(data) == DATA[chunk.offset : chunk.offset + PIECE]
            finally:
                nursery.cancel_scope.cancel()
    cache.close()


def far(ranges_at_once: int) -> Far:
    made = blob_of(DATA)
    return Far(made.data, made.descriptor, ranges_at_once=ranges_at_once)


@pytest.mark.parametrize(("ranges_at_once", "requests"), [(1, 60), (24, 3)])
def test_few_requests(ranges_at_once: int, requests: int) -> None:
    blob = far(ranges_at_once)
    trio.run(fetched, blob)
    assert blob.requests == requests


def test_a_wrong_piece_is_asked_for_again_alone() -> None:
    blob = far(24)
    blob.spoiled, blob.times = chunks()[30].offset, 1
    trio.run(fetched, blob)
    assert blob.requests == 4
    assert blob.times == 0


def test_a_piece_that_is_wrong_twice_is_an_error() -> None:
    blob = far(24)
    blob.spoiled, blob.times = chunks()[30].offset, 100
    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(fetched, blob)
    assert caught.group_contains(IntegrityError, match="wrong bytes twice")
