"""A plain tar that turns out to be another layer's while it is read: who waits is told at once, and gets none of it."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import pytest
import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.memory import MemoryCache
from ckptfs.errors import IntegrityError
from ckptfs.image.whole import condemn_layer
from ckptfs.layers.tar import TarFormat
from ckptfs.settings import MiB, Settings
from tests.support.blobs import BytesBlob, blob_of

DATA = Random(7).randbytes(2 * MiB)


@dataclass
class Hanging(BytesBlob):
    """Nothing comes before `go_on`."""

    go_on: threading.Event = field(default_factory=threading.Event)

    def stream(self, offset: int, length: int, **options: object) -> Iterator[bytes | memoryview]:
        self.ranges.append((offset, length))
        assert self.go_on.wait(20)
        yield self.data[offset : offset + length]


def test_reads_under_way_of_a_layer_that_is_wrong_end_at_once_and_bring_nothing() -> None:
    """A page that is being read is locked: the kernel cannot forget it, nor the mount end, before that has ended."""
    blob = Hanging(DATA, blob_of(DATA).descriptor)
    layer = TarFormat().open(blob, 0, Settings())
    first, second = list(layer.chunks())[:2]
    errors: list[IntegrityError] = []

    async def read(fetcher: Fetcher) -> None:
        with pytest.raises(IntegrityError, match="another's") as caught:
            await fetcher.get(first)
        errors.append(caught.value)

    async def main() -> None:
        with ChunkCache.ephemeral(size=4 * MiB) as cache:
            fetcher = Fetcher(cache, MemoryCache(4 * MiB), Settings())
            fetcher.add_layer(blob, layer)
            cache.put_many([(second.key, DATA[second.offset : second.offset + second.length])])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetcher.run)
                with trio.fail_after(10):
                    async with trio.open_nursery() as readers:
                        readers.start_soon(read, fetcher)
                        while not blob.ranges:  # noqa: ASYNC110
                            await trio.sleep(0.01)
                        await condemn_layer(fetcher, 0, layer, IntegrityError("it is another's"))
                    blob.go_on.set()
                    await fetcher.settled()
                for chunk in (first, second):
                    assert fetcher.lookup(chunk) is fetcher.held(chunk) is None
                    assert not fetcher.lookup_into(chunk, 0, memoryview(bytearray(chunk.length)))
                    with pytest.raises(IntegrityError, match="another's"):
                        await fetcher.get(chunk)
                nursery.cancel_scope.cancel()

    trio.run(main)
    assert len(errors) == 1 and len(blob.ranges) == 1
