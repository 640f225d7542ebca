"""Chunks of pages files: cut by address, so that the next dump of the process shares what it did not touch (P11)."""

import base64
import json
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfs.criu.chunking import CELL, SPAN, cell_for, page_cuts
from ckptfs.model.index import decode_index, read_cells
from ckptfs.model.index_columns import Row
from ckptfs.push import PushResult
from ckptfs.settings import GiB, KiB
from tests.support.push import DATA, layer_blob, manifest_of, push_to_layout, two_checkpoints

PAGE = 4 * KiB
BASE = 0x7F0000000000

runs = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 80)), max_size=30).map(
    lambda pairs: [
        (BASE + PAGE * (sum(gap + length for gap, length in pairs[:i]) + pairs[i][0]), PAGE * pairs[i][1])
        for i in range(len(pairs))
    ]
)


def pieces(found: list[tuple[int, int]]) -> tuple[list[frozenset[int]], list[frozenset[int]]]:
    """The chunks and the cells, as sets of page addresses."""
    pages = [address + i for address, length in found for i in range(0, length, PAGE)]
    chunks, cells = [], []
    for lengths in page_cuts(found, PAGE * len(pages)):
        chunks.append(frozenset(pages[: sum(lengths) // PAGE]))
        for length in lengths:
            assert length > 0
            assert length % PAGE == 0
            cells.append(frozenset(pages[: length // PAGE]))
            del pages[: length // PAGE]
    assert not pages
    return chunks, cells


@settings(deadline=None)
@given(runs)
def test_chunks_hold_all_pages_and_no_span_is_left(found: list[tuple[int, int]]) -> None:
    chunks, cells = pieces(found)
    assert all(len({page // SPAN for page in chunk}) == 1 for chunk in chunks)
    assert len({min(chunk) // SPAN for chunk in chunks}) == len(chunks)
    assert all(len(cell) * PAGE <= CELL for cell in cells)


@settings(deadline=None)
@given(runs, st.data())
def test_a_page_that_goes_moves_no_boundary_of_another_span(found: list[tuple[int, int]], data: st.DataObject) -> None:
    pages = [address + i for address, length in found for i in range(0, length, PAGE)]
    if not pages:
        return
    gone = data.draw(st.sampled_from(pages))
    left = [(page, PAGE) for page in pages if page != gone]
    for before, after in zip(pieces(found), pieces(left), strict=True):
        elsewhere = [{piece for piece in some if min(piece) // SPAN != gone // SPAN} for some in (before, after)]
        assert elsewhere[0] == elsewhere[1]


def test_runs_that_meet_in_a_cell_are_one_cell() -> None:
    runs = [(BASE, PAGE), (BASE + 2 * PAGE, PAGE), (BASE + 8 * PAGE, 7 * PAGE), (BASE + 64 * PAGE, 8 * PAGE)]
    assert list(page_cuts(runs, 17 * PAGE)) == [(2 * PAGE, 4 * PAGE, 3 * PAGE), (4 * PAGE, 4 * PAGE)]


def test_a_span_with_few_pages_is_not_cut() -> None:
    scattered = [(BASE + i * 16 * PAGE, PAGE) for i in range(4)]
    assert list(page_cuts(scattered, 4 * PAGE)) == [(4 * PAGE,)]
    assert list(page_cuts([*scattered, (BASE + 63 * PAGE, PAGE)], 5 * PAGE)) == [(PAGE,) * 5]


@pytest.mark.parametrize(("size", "cell"), [(16 * GiB, 16), (16 * GiB + 1, 64), (64 * GiB, 64), (64 * GiB + 1, 256)])
def test_larger_files_have_larger_cells(size: int, cell: int) -> None:
    assert cell_for(size) == cell * KiB


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PushResult, PushResult]:
    """Two checkpoints of one process, 0.7 s apart, both pushed."""
    folder = tmp_path_factory.mktemp("two")
    two_checkpoints(folder)
    layout = folder / "layout"
    pushed = [push_to_layout(folder / f"{name}.tar", layout, name) for name in ("first", "second")]
    return layout, pushed[0], pushed[1]


def cell_rows(result: PushResult) -> list[Row]:
    return [row for layer in result.layers for file in layer.files for row in file.cells.rows(file.offset)]


def test_p11_the_next_checkpoint_lacks_what_changed(two: tuple[Path, PushResult, PushResult]) -> None:
    """Cells that the first image does not have, the tables of cells of both and the manifest, by the changed pages."""
    layout, first, second = two
    changed = json.loads((DATA / "two/pages.json").read_bytes())["changed_bytes_zstd3"]
    have = {digest for *_, digest in cell_rows(first)}
    lacking = sum(size for *_, size, digest in cell_rows(second) if digest not in have)
    tables = [f.cell_table for result in (first, second) for layer in result.layers for f in layer.files]
    lacking += sum(table.size for table in tables if table is not None)
    assert (lacking + len(manifest_of(layout, "second").raw)) / changed <= 1.5


def test_frames_are_the_pages_of_the_process(two: tuple[Path, PushResult, PushResult]) -> None:
    layout, first, _ = two
    (layer,) = (layer for layer in first.layers if layer.descriptor.annotations["dev.ckptfs.role"] == "pages")
    blob = layer_blob(layout, layer.descriptor)
    (file,) = layer.files
    assert max(file.chunks.lengths) <= SPAN
    assert len(file.chunks) < 60 < 500 < len(file.cells)
    for _, length, offset, size, digest in list(file.cells.rows(file.offset))[::50]:
        data = zstandard.ZstdDecompressor().decompress(blob.read_at(offset, size))
        assert blake3(data).digest() == digest
        assert len(data) == length


def test_the_cells_are_the_chunks_in_smaller_pieces(two: tuple[Path, PushResult, PushResult]) -> None:
    """As a reader sees them: the index, and the table of cells that it names."""
    layout, _, _ = two
    manifest = manifest_of(layout, "first")
    index = decode_index(base64.b64decode(manifest.annotations["dev.ckptfs.index"]))
    (number,) = (i for i, d in enumerate(manifest.layers) if d.annotations["dev.ckptfs.role"] == "pages")
    (file,) = (file for file in index.layers[number].files if file.cells is not None)
    assert file.cells is not None
    assert file.entry.inode is not None
    blob = layer_blob(layout, manifest.layers[number])
    cells = read_cells(file, blob.read_at(file.cells.offset, file.cells.size), number, blob.size)
    chunks = file.entry.inode.extents
    assert {chunk.start for chunk in chunks} <= {cell.start for cell in cells}
    assert {chunk.chunk.offset for chunk in chunks} <= {cell.chunk.offset for cell in cells}
    assert sum(cell.length for cell in cells) == sum(chunk.length for chunk in chunks) == file.entry.inode.size
