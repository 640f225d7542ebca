"""Chunks of pages files: cut by address, so that the next dump of the process shares what it did not touch (P11)."""

import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.criu.chunking import SPAN, STEP, page_cuts, step_for
from ckptfs.push import PushResult
from ckptfs.settings import GiB, KiB
from tests.support.push import DATA, layer_blob, manifest_of, push_to_layout

PAGE = 4 * KiB
BASE = 0x7F0000000000

runs = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 80)), max_size=30).map(
    lambda pairs: [
        (BASE + PAGE * (sum(gap + length for gap, length in pairs[:i]) + pairs[i][0]), PAGE * pairs[i][1])
        for i in range(len(pairs))
    ]
)


def cells(found: list[tuple[int, int]]) -> list[frozenset[int]]:
    """The chunks as sets of page addresses."""
    pages = [address + i for address, length in found for i in range(0, length, PAGE)]
    out = []
    for length in page_cuts(found, PAGE * len(pages)):
        assert length % PAGE == 0
        out.append(frozenset(pages[: length // PAGE]))
        del pages[: length // PAGE]
    assert not pages
    return out


@given(runs)
def test_chunks_hold_all_pages_and_no_span_is_left(found: list[tuple[int, int]]) -> None:
    for chunk in cells(found):
        assert len({page // SPAN for page in chunk}) == 1
        assert len(chunk) * PAGE <= STEP


@given(runs, st.data())
def test_a_page_that_goes_moves_no_boundary_of_another_span(found: list[tuple[int, int]], data: st.DataObject) -> None:
    pages = [address + i for address, length in found for i in range(0, length, PAGE)]
    if not pages:
        return
    gone = data.draw(st.sampled_from(pages))
    left = [(page, PAGE) for page in pages if page != gone]
    before = {chunk for chunk in cells(found) if min(chunk) // SPAN != gone // SPAN}
    after = {chunk for chunk in cells(left) if min(chunk) // SPAN != gone // SPAN}
    assert before == after


def test_runs_that_meet_in_a_cell_are_one_chunk() -> None:
    assert list(page_cuts([(BASE, PAGE), (BASE + 2 * PAGE, PAGE), (BASE + 64 * PAGE, 8 * PAGE)], 10 * PAGE)) == [
        2 * PAGE,
        4 * PAGE,
        4 * PAGE,
    ]


def test_a_span_with_few_pages_is_one_chunk() -> None:
    scattered = [(BASE + i * 16 * PAGE, PAGE) for i in range(4)]
    assert list(page_cuts(scattered, 4 * PAGE)) == [4 * PAGE]
    assert list(page_cuts([*scattered, (BASE + 63 * PAGE, PAGE)], 5 * PAGE)) == [PAGE] * 5


@pytest.mark.parametrize(("size", "step"), [(8 * GiB, 16), (8 * GiB + 1, 64), (32 * GiB, 64), (32 * GiB + 1, 256)])
def test_larger_files_have_larger_cells(size: int, step: int) -> None:
    assert step_for(size) == step * KiB


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PushResult, PushResult]:
    """Two checkpoints of one process, 0.7 s apart, both pushed."""
    folder = tmp_path_factory.mktemp("two")
    first = zstandard.ZstdDecompressor().stream_reader((DATA / "two/first.tar.zst").read_bytes()).read()
    reference = zstandard.ZstdCompressionDict(first, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    patch = (DATA / "two/second.tar.patch.zst").read_bytes()
    decompressor = zstandard.ZstdDecompressor(dict_data=reference, max_window_size=1 << 27)
    (folder / "first.tar").write_bytes(first)
    (folder / "second.tar").write_bytes(decompressor.stream_reader(patch).read())
    layout = folder / "layout"
    pushed = [push_to_layout(folder / f"{name}.tar", layout, name) for name in ("first", "second")]
    return layout, pushed[0], pushed[1]


def test_p11_the_next_checkpoint_fetches_what_changed(two: tuple[Path, PushResult, PushResult]) -> None:
    """Frames that the first image does not have, and the manifest, by the compressed bytes of the changed pages."""
    layout, first, second = two
    changed = json.loads((DATA / "two/pages.json").read_bytes())["changed_bytes_zstd3"]
    have = {digest for layer in first.layers for file in layer.files for *_, digest in file.rows()}
    lacking = sum(
        size
        for layer in second.layers
        for file in layer.files
        for *_, size, digest in file.rows()
        if digest not in have
    )
    assert (lacking + len(manifest_of(layout, "second").raw)) / changed <= 1.5


def test_frames_are_the_pages_of_the_process(two: tuple[Path, PushResult, PushResult]) -> None:
    layout, first, _ = two
    (layer,) = (layer for layer in first.layers if layer.descriptor.annotations["dev.ckptfs.role"] == "pages")
    blob = layer_blob(layout, layer.descriptor)
    (file,) = layer.files
    assert max(file.lengths) <= 16 * KiB + SPAN
    for _, length, offset, size, digest in list(file.rows())[::50]:
        data = zstandard.ZstdDecompressor().decompress(blob.read_at(offset, size))
        assert len(data) == length
        assert bool(digest) == bool(data.strip(b"\0"))
