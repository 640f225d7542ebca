"""Layers inside files of the image: their ranges wait for chunks of the layer around them, which needs room to come."""

import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.reader import Reader
from ckptfs.image.inner import InodeBlob
from ckptfs.layers.grid import Grid
from ckptfs.layers.tar import TarFormat
from ckptfs.model.toc import Inode
from ckptfs.settings import KiB, Settings, Sizes, Timeouts
from tests.support.blobs import blob_of
from tests.support.readers import content

UNIT = 64 * KiB
COUNT = 200
DATA = content(COUNT * UNIT)


def layer_in_layer(fetcher: Fetcher, reader: Reader) -> None:
    """Layer 0 has a file with all of DATA, which is layer 1."""
    outer = blob_of(DATA)
    fetcher.add_layer(outer, TarFormat().open(outer, 0, Settings()))
    extents = Grid("outer", 0, UNIT, len(DATA)).extents(((0, len(DATA), 0),))
    inner = InodeBlob(reader, Inode(0o100644, size=len(DATA), extents=extents), outer.descriptor.media_type)
    fetcher.add_layer(inner, TarFormat().open(inner, 1, Settings()), inside=True)


def test_many_reads_inside_of_a_file_do_not_keep_its_own_bytes_away() -> None:
    settings = Settings()._replace(sizes=Sizes(grid=UNIT), timeouts=Timeouts(read_deadline=3.0))

    async def main() -> None:
        cache = ChunkCache.ephemeral(size=0)
        fetcher = Fetcher(cache, MemoryCache(0), settings)
        reader = Reader(fetcher, 1000)
        layer_in_layer(fetcher, reader)
        chunks = [Grid("inner", 1, UNIT, len(DATA)).chunk(number) for number in range(0, COUNT, 3)]

        async def get(number: int) -> None:
            data = await fetcher.get(chunks[number])
            assert bytes(data) == DATA[3 * number * UNIT :][:UNIT]

        with trio.fail_after(20):
            async with trio.open_nursery() as outermost:
                outermost.start_soon(fetcher.run)
                async with trio.open_nursery() as nursery:
                    for number in range(len(chunks)):
                        nursery.start_soon(get, number)
                outermost.cancel_scope.cancel()
        cache.close()

    trio.run(main)


def test_readers_of_a_layer_inside_do_not_keep_its_own_reads_away() -> None:
    """As many readers as may wait at all, each for a chunk that is behind a read of the file around it."""
    settings = Settings()._replace(sizes=Sizes(grid=UNIT), timeouts=Timeouts(read_deadline=3.0))

    async def main() -> None:
        cache = ChunkCache.ephemeral(size=0)
        fetcher = Fetcher(cache, MemoryCache(0), settings)
        reader = Reader(fetcher, 4)
        layer_in_layer(fetcher, reader)
        file = Inode(0o100644, size=len(DATA), extents=Grid("inner", 1, UNIT, len(DATA)).extents(((0, len(DATA), 0),)))

        async def read(number: int) -> None:
            assert bytes(await reader.read(file, 9 * number * UNIT, 100)) == DATA[9 * number * UNIT :][:100]

        with trio.fail_after(20):
            async with trio.open_nursery() as outermost:
                outermost.start_soon(fetcher.run)
                async with trio.open_nursery() as nursery:
                    for number in range(12):
                        nursery.start_soon(read, number)
                outermost.cancel_scope.cancel()
        cache.close()

    trio.run(main)
