"""A large pages file opened through its image: what is read of its table, and that its bytes are right all the same."""

import hashlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from ckptfs.engine.cache import ChunkCache
from ckptfs.errors import IntegrityError
from ckptfs.image import ImageOptions, OpenImage, open_image
from ckptfs.layers import zstd_chunked_writer
from ckptfs.model import index_table
from ckptfs.model.blob import Blob
from ckptfs.model.index_table import PartedExtents
from ckptfs.model.oci import Descriptor, Index, Manifest, Reference
from ckptfs.model.toc import UNKNOWN, Inode
from ckptfs.sources.layout import LayoutSource
from ckptfs.telemetry import NetworkCounters
from tests.support.push import push_to_layout, two_checkpoints

PAGES = b"checkpoint/pages-1.img"
Use = Callable[[OpenImage, Inode], Awaitable[None]]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A layout whose pages file has a table in parts of 8 rows, and the file's bytes."""
    folder = tmp_path_factory.mktemp("parts")
    two_checkpoints(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zstd_chunked_writer, "TABLE_ROWS", 4)
        patch.setattr(index_table, "PART_ROWS", 8)
        push_to_layout(folder / "first.tar", folder / "layout")
    tar = (folder / "first.tar").read_bytes()
    at = tar.index(PAGES + b"\0")
    size = int(tar[at + 124 : at + 135], 8)
    return folder / "layout", tar[at + 512 : at + 512 + size]


@dataclass(eq=False)
class Watched:
    """A layout that notes what is read, and spoils what is read at `spoil`, the first `times` times.

    come   what is not set is waited for.
    """

    inner: LayoutSource
    spoil: int = -1
    times: int = 0
    come: threading.Event | None = None
    ranges: list[tuple[int, int]] = field(default_factory=list)

    @property
    def reference(self) -> Reference:
        return self.inner.reference

    def resolve(self) -> Manifest | Index:
        return self.inner.resolve()

    def fetch(self, descriptor: Descriptor) -> bytes:
        return self.inner.fetch(descriptor)

    def blob(self, descriptor: Descriptor) -> Blob:
        return _WatchedBlob(self.inner.blob(descriptor), self)


@dataclass
class _WatchedBlob(Blob):
    inner: Blob
    source: Watched

    @property
    def descriptor(self) -> Descriptor:
        return self.inner.descriptor

    @property
    def size(self) -> int:
        return self.inner.size

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        if self.source.come is not None:
            self.source.come.wait()
        self.source.ranges.append((offset, length))
        data = self.inner.read_at(offset, length, attempt=attempt)
        if offset == self.source.spoil and self.source.times > 0:
            self.source.times -= 1
            return bytes(len(data))
        return data

    def stream(
        self, offset: int, length: int, *, attempt: int = 0, patient: bool = False
    ) -> Iterator[bytes | memoryview]:
        self.source.ranges.append((offset, length))
        return self.inner.stream(offset, length, attempt=attempt, patient=patient)


def opened(layout: Path, cache: Path, use: Use, **source: Any) -> Watched:
    watched = Watched(LayoutSource(Reference.parse(f"oci:{layout}")), **source)

    async def run() -> None:
        chunks = ChunkCache.open(cache)
        try:
            options = ImageOptions(background=False, prefetch=False)
            async with open_image(watched, chunks, options, NetworkCounters()) as image:
                node = await image.find(PAGES)
                assert node is not None
                assert node.inode is not None
                await use(image, node.inode)
        finally:
            chunks.close()

    trio.run(run)
    return watched


def parts_of(inode: Inode) -> list[bool]:
    """Which parts of the table are known."""
    extents = inode.extents
    assert isinstance(extents, PartedExtents)
    return [extents.known(number) for number in range(extents.part_at(inode.size) + 1)]


def test_one_read_needs_one_part(pushed: tuple[Path, bytes], tmp_path: Path) -> None:
    layout, data = pushed

    async def use(image: OpenImage, inode: Inode) -> None:
        handle = await image.open(inode)
        assert not any(parts_of(inode))
        offset = len(data) // 2
        assert await image.reader.serve(handle, offset, 4096) == data[offset : offset + 4096]
        assert sum(parts_of(inode)) == 1

    opened(layout, tmp_path / "cache", use)


def test_the_whole_file_through_parts_and_through_the_table(pushed: tuple[Path, bytes], tmp_path: Path) -> None:
    layout, data = pushed

    async def by_parts(image: OpenImage, inode: Inode) -> None:
        handle = await image.open(inode)
        for offset in reversed(range(0, len(data), 100_000)):
            assert await image.reader.serve(handle, offset, 100_000) == data[offset : offset + 100_000]
        assert all(parts_of(inode))
        assert not image.tables  # nothing is left to be learnt

    async def by_table(image: OpenImage, inode: Inode) -> None:
        await image.open(inode)
        await image.tables.load_all()
        assert not isinstance(inode.extents, PartedExtents)
        assert hashlib.sha256(await image.read(inode, 0, inode.size)).digest() == hashlib.sha256(data).digest()

    opened(layout, tmp_path / "cache", by_parts)
    opened(layout, tmp_path / "cache", by_table)
    opened(layout, tmp_path / "other", by_table)


def test_readers_that_come_together_and_a_second_mount_fetch_a_part_once(
    pushed: tuple[Path, bytes], tmp_path: Path
) -> None:
    layout, data = pushed

    async def use(image: OpenImage, inode: Inode) -> None:
        async def read(offset: int) -> None:
            assert await image.read(inode, offset, 100) == data[offset : offset + 100]

        async with trio.open_nursery() as nursery:
            for n in range(10):
                nursery.start_soon(read, n * 100)
        await image.fetcher.settled()

    assert len(opened(layout, tmp_path / "cache", use).ranges) == 2  # the part, and the chunk
    assert not opened(layout, tmp_path / "cache", use).ranges


def test_a_spoilt_part_is_read_again_and_never_believed(pushed: tuple[Path, bytes], tmp_path: Path) -> None:
    layout, data = pushed

    async def use(image: OpenImage, inode: Inode) -> None:
        assert await image.read(inode, 0, 100) == data[:100]

    async def refused(image: OpenImage, inode: Inode) -> None:
        with pytest.raises(IntegrityError):
            await image.read(inode, 0, 100)
        assert not any(parts_of(inode))
        assert await image.read(inode, 0, 100) == data[:100]

    place = opened(layout, tmp_path / "a", use).ranges[0][0]
    assert [at for at, _ in opened(layout, tmp_path / "b", use, spoil=place, times=1).ranges[:2]] == [place, place]
    opened(layout, tmp_path / "c", refused, spoil=place, times=2)


def test_a_plan_learns_the_parts_it_needs(pushed: tuple[Path, bytes], tmp_path: Path) -> None:
    async def use(image: OpenImage, inode: Inode) -> None:
        chunks = [extent.chunk for extent in inode.extents]
        assert {chunk.layer for chunk in chunks} == {UNKNOWN}
        assert await image.tables.parts.learn_for(chunks[1:3])
        assert [number for number, known in enumerate(parts_of(inode)) if known] == [1, 2]
        assert not await image.tables.parts.learn_for(extent.chunk for extent in inode.extents[1:9])

    opened(pushed[0], tmp_path / "cache", use)


def test_parts_that_do_not_come_keep_no_thread_from_others(pushed: tuple[Path, bytes], tmp_path: Path) -> None:
    """What a mount needs a thread for, its end for example, goes on when the registry is dead."""
    layout, data = pushed
    come = threading.Event()
    come.set()

    async def use(image: OpenImage, inode: Inode) -> None:
        await image.open(inode)
        come.clear()
        trio.to_thread.current_default_thread_limiter().total_tokens = 2
        async with trio.open_nursery() as nursery:
            for extent in inode.extents[:4]:
                nursery.start_soon(image.read, inode, extent.start, 100)
            await trio.testing.wait_all_tasks_blocked(0.05)
            try:
                with trio.fail_after(2):
                    await trio.to_thread.run_sync(lambda: None)
            finally:
                come.set()
        assert await image.read(inode, 0, 100) == data[:100]

    opened(layout, tmp_path / "cache", use, come=come)
