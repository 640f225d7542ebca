"""What is fetched ahead: as metadata CRIU's images and the dumps beside them, and not every small file there is; in the
background everything, and the end of it is noticed.
"""

import stat
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.schedule import Priority
from ckptfs.errors import IntegrityError
from ckptfs.layers.grid import Grid
from ckptfs.layers.tar import TarFormat
from ckptfs.model.toc import Chunk, Entry, Extent, Inode
from ckptfs.model.tree import Tree
from ckptfs.prefetch.background import Background, Metadata
from ckptfs.settings import KiB, MiB, Settings, Sizes
from tests.support.blobs import BytesBlob, blob_of
from tests.support.readers import content


def tree_of(sizes: dict[str, int]) -> Tree:
    """Files of these sizes, each one chunk whose key is its path."""
    tree = Tree()
    tree.begin(1)
    tree.add([Entry(path.encode(), _file(path.encode(), size)) for path, size in sizes.items()], 1)
    tree.finish(1)
    return tree


def _file(key: bytes, size: int) -> Inode:
    return Inode(stat.S_IFREG | 0o600, size=size, extents=(Extent(0, size, Chunk(key, 0, 0, size, size, key)),))


def keys(chunks: Iterable[Chunk]) -> list[str]:
    return [chunk.key.decode() for chunk in chunks]


def test_metadata_is_what_lies_with_criu_s_images_and_beside_them() -> None:
    tree = tree_of(
        {
            "config.dump": 10,
            "spec.dump": 10,
            "checkpoint/inventory.img": 10,
            "checkpoint/core-1.img": 10,
            "checkpoint/pages-1.img": 4096,
            "checkpoint/tmpfs.img": Sizes().small_file + 1,
            "rootfs-diff/etc/passwd": 10,
            "volumes/data/file": 10,
        }
    )
    expected = ["config.dump", "spec.dump", "checkpoint/core-1.img", "checkpoint/inventory.img"]
    assert keys(Metadata().plan(tree)) == expected
    assert set(keys(Background().plan(tree))) >= {"rootfs-diff/etc/passwd", "checkpoint/pages-1.img"}


def test_every_container_of_a_pod_and_every_parent_has_metadata() -> None:
    tree = tree_of({f"{top}/{name}": 10 for top in ("a", "b") for name in ("config.dump", "checkpoint/inventory.img")})
    assert len(keys(Metadata().plan(tree))) == 4


def test_an_image_of_many_small_files_has_none() -> None:
    assert not keys(Metadata().plan(tree_of({f"usr/share/{n}": 10 for n in range(100)})))


@asynccontextmanager
async def fetching(kib: int) -> AsyncIterator[tuple[Fetcher, BytesBlob, list[Chunk]]]:
    """A fetcher at work on a layer of so many chunks of 1 KiB; for 20 seconds at most."""
    blob = blob_of(content(kib * KiB))
    with ChunkCache.ephemeral(size=64 * MiB) as cache:
        fetcher = Fetcher(cache, MemoryCache(0), Settings())
        fetcher.add_layer(blob, TarFormat().open(blob, 0, Settings()))
        grid = Grid("layer", 0, KiB, kib * KiB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetcher.run)
            with trio.fail_after(20):
                yield fetcher, blob, [grid.chunk(number) for number in range(kib)]
            nursery.cancel_scope.cancel()


def test_a_plan_is_settled_when_all_of_it_is_here() -> None:
    """More chunks than are queued at once; the second time all of them are here already."""

    async def main() -> None:
        async with fetching(2000) as (fetcher, _, chunks):
            for _ in range(2):
                fetcher.fill(iter(chunks))
                await fetcher.settled()
                assert all(fetcher.has(chunk) for chunk in chunks)

    trio.run(main)


def test_nothing_is_fetched_ahead_of_a_layer_that_is_wrong() -> None:
    async def main() -> None:
        async with fetching(16) as (fetcher, blob, chunks):
            fetcher.condemn(0, IntegrityError("another layer"))
            fetcher.want(chunks, Priority.PREFETCH)
            await fetcher.settled()
            assert not blob.ranges and not any(fetcher.has(chunk) for chunk in chunks)

    trio.run(main)
