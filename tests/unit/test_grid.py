"""The grid: chunks by position, extents made when they are asked for."""

import pytest

from ckptfs.layers.grid import Grid, windows
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.model.toc import Extent, derived_key, slice_extents, stored
from ckptfs.settings import GiB, KiB, Limits, MiB
from tests.support.memory import peak_memory
from tests.support.tars import header


def test_extents_cover_a_file_chunk_by_chunk() -> None:
    extents = Grid("d", 2, 100).extents([(0, 250, 90)])
    assert [(e.start, e.length, e.skip, e.chunk.offset) for e in extents] == [
        (0, 10, 90, 0),
        (10, 100, 0, 100),
        (110, 100, 0, 200),
        (210, 40, 0, 300),
    ]
    chunk = extents[1].chunk
    assert (chunk.key, chunk.layer, chunk.size, chunk.length, chunk.digest) == (
        derived_key("d", 100, kind="grid"),
        2,
        100,
        100,
        None,
    )


def test_what_is_stored_is_told_chunk_by_chunk() -> None:
    for segments in ([(0, 250, 90)], [(10, 20, 90), (500, 5, 110), (700, 100, 115)]):
        extents = Grid("d", 2, 100).extents(segments)
        assert list(stored(extents)) == [(e.chunk.key, e.chunk.layer, e.chunk.size) for e in extents]


def test_files_share_their_chunks() -> None:
    grid = Grid("d", 0, 100)
    first, second = grid.extents([(0, 10, 0)]), grid.extents([(0, 10, 50)])
    assert first[0].chunk is second[0].chunk is grid.chunk(0)


def test_a_large_layer_does_not_keep_its_chunks() -> None:
    """64 GiB in chunks of 256 KiB."""
    grid = Grid("d", 0, 256 * KiB, end=64 * GiB)
    with peak_memory() as peak:
        keys = sum(1 for _ in grid.extents([(0, 64 * GiB, 0)]))
    assert (keys, grid.chunk(5)) == (64 * GiB // (256 * KiB), grid.extents([(0, 1, 5 * 256 * KiB)])[0].chunk)
    assert peak.grown < 8 * MiB


def test_the_last_chunk_ends_with_the_blob() -> None:
    grid = Grid("d", 0, 100, end=250)
    assert [(grid.chunk(i).size, grid.chunk(i).length) for i in range(3)] == [(100, 100), (100, 100), (50, 50)]


def test_holes_lie_between_runs() -> None:
    extents = Grid("d", 0, 100).extents([(10, 20, 90), (500, 5, 110), (700, 100, 115)])
    assert [(e.start, e.length, e.skip) for e in extents] == [
        (10, 10, 90),
        (20, 10, 0),
        (500, 5, 10),
        (700, 85, 15),
        (785, 15, 0),
    ]
    assert [e.start for e in extents[1:4]] == [20, 500, 700] and extents[-1].start == 785
    assert [(e.start, e.length) for e in slice_extents(extents, 25, 480)] == [(0, 5), (475, 5)]
    for index in (5, -6):
        with pytest.raises(IndexError):
            extents[index]


def test_a_file_without_bytes_has_no_extents() -> None:
    assert len(Grid("d", 0, 100).extents([])) == 0


def test_windows_into_a_file_are_the_same_whether_its_extents_are_made_or_kept() -> None:
    """A tar inside: members anywhere in the file around it, over its holes and across its runs."""
    made = Grid("d", 0, 100).extents([(10, 20, 90), (500, 5, 110), (700, 100, 115)])
    for start, length, position in ((0, 800, 0), (5, 20, 15), (0, 600, 20), (7, 30, 690), (0, 100, 30), (0, 1, 504)):
        expected = [Extent(start + e.start, *e[1:]) for e in slice_extents(made, position, length)]
        assert list(windows(made, [(start, length, position)])) == expected
        assert list(windows(tuple(made), [(start, length, position)])) == expected
    both = [(0, 10, 15), (100, 50, 700)]
    assert list(windows(made, both)) == list(windows(tuple(made), both))
    assert [(e.start, e.length) for e in windows(windows(made, both), [(0, 120, 5)])] == [(0, 5), (95, 25)]


def test_what_is_wanted_cannot_be_skipped() -> None:
    scanner = TarScanner(Grid("d", 0, 100), Limits())
    scanner.feed(header(b"x", 1000))
    assert (scanner.at, scanner.wanted) == (512, 512 + 1024)
    scanner.skip_to(1000)
    for position in (999, 1537):
        with pytest.raises(ValueError, match="wanted"):
            scanner.skip_to(position)
