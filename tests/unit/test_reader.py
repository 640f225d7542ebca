"""How much the engine has on the way depends on who reads: from front to back, or single pages that a process needs."""

from pathlib import Path

import pytest
import trio

from ckptfs.engine import reader as module
from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.reader import Handle, Reader
from ckptfs.engine.schedule import Priority
from ckptfs.layers.grid import Grid
from ckptfs.layers.tar import TarFormat
from ckptfs.model.toc import Chunk, Extent, Inode
from ckptfs.settings import KiB, MiB, Settings
from tests.support.blobs import blob_of

SIZE = 4 * MiB


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    with ChunkCache.open(tmp_path / "cache") as cache:
        fetcher = Fetcher(cache, MemoryCache(0), Settings())
        fetcher.keep({bytes(32): bytes(SIZE)})
        return Reader(fetcher, 8)


def opened(*, paging: bool = False, size: int = SIZE) -> Handle:
    inode = Inode(0o100600)
    inode.size = size
    inode.extents = (Extent(0, size, Chunk(bytes(32), 0, 0, size, size)),)
    handle = Handle(inode)
    handle.paging = paging
    return handle


def read(reader: Reader, handle: Handle, *places: tuple[int, int]) -> None:
    for offset, size in places:
        assert len(trio.run(reader.serve, handle, offset, size)) == size


def through(size: int) -> list[tuple[int, int]]:
    return [(offset, size) for offset in range(0, SIZE, size)]


def patient(reader: Reader) -> bool:
    usual = Fetcher(reader.fetcher.cache, MemoryCache(0), Settings()).link.window
    return reader.fetcher.link.window > 2 * usual


def test_from_front_to_back(reader: Reader) -> None:
    assert not patient(reader)
    read(reader, opened(), *through(1 * MiB))
    assert patient(reader)


def test_criu_with_lazy_pages_though_it_reads_in_sequence_too(reader: Reader) -> None:
    read(reader, opened(paging=True), *through(64 * KiB))
    assert not patient(reader)


def test_a_page_fault_ends_it_and_forbids_it_for_a_while(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    front_to_back, faults = opened(), opened()
    read(reader, front_to_back, *through(1 * MiB))
    read(reader, faults, (3 * MiB, 4 * KiB))
    assert not patient(reader)
    read(reader, front_to_back, *through(1 * MiB))
    assert not patient(reader)
    monkeypatch.setattr(module, "_CALM", -1.0)
    read(reader, front_to_back, *through(1 * MiB))
    assert patient(reader)


def test_small_reads_of_small_files_are_no_page_faults(reader: Reader) -> None:
    read(reader, opened(size=100 * KiB), (64 * KiB, 4 * KiB), (4 * KiB, 4 * KiB))
    read(reader, opened(), *through(1 * MiB))
    assert patient(reader)


def test_nothing_is_begun_unasked_once_the_mount_ends(tmp_path: Path) -> None:
    """Also not by who reads on in sequence: those who wait have the link for themselves."""
    blob = blob_of(bytes(64 * KiB))
    with ChunkCache.open(tmp_path / "cache") as cache:
        fetcher = Fetcher(cache, MemoryCache(0), Settings())
        fetcher.add_layer(blob, TarFormat().open(blob, 0, Settings()))
        fetcher.quiesce()
        fetcher.want([Grid("layer", 0, 64 * KiB, 64 * KiB).chunk(0)], Priority.PREFETCH)
        assert not fetcher.scheduler.pending(Priority.PREFETCH)
