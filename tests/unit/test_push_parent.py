"""`push --parent` with memory that is made up: what is shared, what never is, and that every page comes back."""

import io
import itertools
import os
import random
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ckptfs.criu.increments import encode_pagemap, left_to_parent, renumbered, stretches
from ckptfs.criu.pagemap import LAZY, PARENT, PRESENT, Run, parse_pagemap
from ckptfs.image import View
from ckptfs.layers import zstd_chunked_writer
from ckptfs.model.annotations import PARENT as PARENT_ANNOTATION
from ckptfs.model.oci import Reference
from ckptfs.model.toc import Chunk, Extent, overlapping
from ckptfs.model.windows import WindowExtents
from ckptfs.pull import pull
from ckptfs.push import PushResult
from ckptfs.settings import Limits, Settings
from ckptfs.sources.layout import LayoutSource
from ckptfs.telemetry import NetworkCounters
from tests.support.blobs import blob_of
from tests.support.criu_images import image, mm, pagemap, vma
from tests.support.golden import directory_listing
from tests.support.push import manifest_of, push_to_layout
from tests.support.trees import layout_with

_PAGE = 4096
_BASE = 0x7F00_0000_0000
_INVENTORY = image("inventory", {1: 1})

Memory = dict[int, tuple[bytes, bool]]  # address -> page, whether it is lazy


def page(word: object) -> bytes:
    """A page that is its own; zeros for 0."""
    return str(word).encode().ljust(_PAGE, b".") if word else bytes(_PAGE)


def write(folder: Path, **memories: Memory) -> Path:
    """CRIU's images with these memories, by pagemap ("pagemap_7"); each has a pages file of its own."""
    folder.mkdir()
    (folder / "inventory.img").write_bytes(_INVENTORY)
    for number, (name, memory) in enumerate(memories.items(), start=1):
        runs: list[tuple[int, int, int]] = []
        for address in sorted(memory):
            flags = PRESENT | LAZY if memory[address][1] else PRESENT
            if runs and runs[-1][2] == flags and runs[-1][0] + runs[-1][1] * _PAGE == address:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, flags)
            else:
                runs.append((address, 1, flags))
        (folder / f"{name.replace('_', '-')}.img").write_bytes(pagemap(number, *runs))
        (folder / f"pages-{number}.img").write_bytes(b"".join(memory[address][0] for address in sorted(memory)))
    return folder


def read(folder: Path, name: str) -> Memory:
    """The memory as criu reads it: pages of a parent through `parent` (criu/pagemap.c: read_parent_page)."""
    path = folder / f"{name.replace('_', '-')}.img"
    found = parse_pagemap(path.read_bytes(), path.name)
    pages = (folder / found.file).read_bytes()
    parent = read(folder / "parent", name) if (folder / "parent" / path.name).exists() else {}
    memory: Memory = {}
    at = 0
    for vaddr, count, flags in found.runs:
        for address in range(vaddr, vaddr + count * _PAGE, _PAGE):
            if flags & PARENT:
                assert flags == PARENT
                memory[address] = parent[address]
            else:
                memory[address] = (pages[at : at + _PAGE], bool(flags & LAZY))
                at += _PAGE
    assert at == len(pages)
    return memory


@dataclass(frozen=True)
class Shelf:
    """A layout, and what its images show."""

    top: Path

    def push(self, folder: Path, tag: str, parent: str = "", settings: Settings | None = None) -> PushResult:
        named = f"oci:{self.layout}:{parent}" if parent else ""
        return push_to_layout(folder, self.layout, tag, parent=named, settings=settings)

    @property
    def layout(self) -> Path:
        return self.top / "layout"

    def unpack(self, tag: str, *, raw: bool = False, limits: Limits | None = None) -> Path:
        target = self.top / f"{tag}-{'raw' if raw else 'view'}{hash(limits) if limits else ''}"
        source = LayoutSource(Reference.parse(f"oci:{self.layout}:{tag}"))
        how: View = "raw" if raw else "checkpoint"
        settings = Settings(limits=limits or Limits())
        pull(source, target, LayoutSource, NetworkCounters(), view=how, settings=settings)
        return target / "checkpoint"


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def process(seed: int, count: int = 600) -> Memory:
    """A few stretches of pages, some zero, some not lazy."""
    chance = random.Random(seed)
    memory: Memory = {}
    address = _BASE
    while len(memory) < count:
        address += chance.choice((0, 0, 1, 7, 300)) * _PAGE
        lazy = chance.random() < 0.8
        for _ in range(chance.randrange(1, 120)):
            memory[address] = (page(chance.randrange(6) and address), lazy)
            address += _PAGE
    return memory


def later(memory: Memory, seed: int, share: float = 0.1) -> Memory:
    """Pages written, zeroed, gone, new, and of another kind."""
    chance = random.Random(seed)
    out = dict(memory)
    for address in list(memory):
        if chance.random() < share:
            kind = chance.randrange(5)
            if kind == 0:
                del out[address]
            elif kind == 1:
                out[address] = (bytes(_PAGE), memory[address][1])
            elif kind == 2:
                out[address] = (memory[address][0], not memory[address][1])
            else:
                out[address] = (page(f"{seed}/{address}"), memory[address][1])
    for address in chance.sample(list(memory), 5):
        out.setdefault(address - 5000 * _PAGE, (page(f"new {seed}/{address}"), True))
    return out


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("table_rows", [2048, 2], ids=["rows in the index", "rows in the layers"])
def test_every_page_comes_back(seed: int, table_rows: int, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zstd_chunked_writer, "TABLE_ROWS", table_rows)
    tasks = [{"pagemap_7": process(seed), "pagemap_8": process(seed + 100, 90), "pagemap-shmem_9": process(seed + 50)}]
    for number in (1, 2, 3):
        tasks.append({name: later(memory, number) for name, memory in tasks[-1].items()})
    for number, memories in enumerate(tasks):
        parent, images = str(number - 1) if number else "", write(shelf.top / f"images-{number}", **memories)
        os.setxattr(images / "pages-1.img", "user.note", b"of the dump")
        pushed = shelf.push(images, str(number), parent)
        if number:
            increment = pushed.increment
            assert increment is not None
            assert increment.shared > increment.changed and not increment.reason
        raw, view = shelf.unpack(str(number), raw=True), shelf.unpack(str(number))
        for name, memory in memories.items():
            assert read(raw, name) == memory
        dumped = shelf.top / f"images-{number}"
        assert sorted(os.listdir(view)) == sorted(os.listdir(dumped))
        assert all((view / name).read_bytes() == (dumped / name).read_bytes() for name in os.listdir(dumped))
        assert directory_listing(view) == directory_listing(dumped)
    again = shelf.push(Path(f"oci:{shelf.layout}:3"), "again")
    assert again.manifest == shelf.push(shelf.top / "images-3", "whole").manifest


def test_what_an_increment_is_made_of(shelf: Shelf) -> None:
    """The earlier layer comes first, the same blob; links lead to it; new pages files have numbers of their own."""
    memory = process(1)
    first = shelf.push(write(shelf.top / "1", pagemap_7=memory), "1")
    second = shelf.push(write(shelf.top / "2", pagemap_7=later(memory, 1)), "2", "1")
    earlier, image_ = manifest_of(shelf.layout, "1"), manifest_of(shelf.layout, "2")
    assert image_.layers[0] == earlier.layers[1]
    assert image_.annotations[PARENT_ANNOTATION] == str(first.manifest.digest)
    assert [layer.descriptor for layer in second.layers] == list(image_.layers[1:])
    raw, names = shelf.unpack("2", raw=True), ["inventory.img", "pagemap-7.img", "pages-1.img"]
    assert sorted(os.listdir(raw)) == [*names, "pages-2.img", "parent", "whole"]
    assert sorted(os.listdir(raw / "parent")) == names
    assert os.readlink(raw / "parent" / "pages-1.img") == "../pages-1.img"
    assert (raw / "whole" / "pagemap-7.img").read_bytes() == (shelf.top / "2" / "pagemap-7.img").read_bytes()
    assert sorted(os.listdir(shelf.unpack("2"))) == names
    again = shelf.push(shelf.top / "2", "2", "1")
    assert (again.manifest, again.sent) == (second.manifest, 0)


def test_a_process_that_is_new_or_different_is_stored_whole(shelf: Shelf) -> None:
    memory = process(1)
    shelf.push(write(shelf.top / "1", pagemap_7=memory, pagemap_8=process(5)), "1")
    tasks = {"pagemap_7": later(memory, 1), "pagemap_8": process(6), "pagemap_9": process(7, 50)}
    shelf.push(write(shelf.top / "2", **tasks), "2", "1")
    raw = shelf.unpack("2", raw=True)
    assert sorted(path.name for path in (raw / "parent").glob("pagemap-*")) == ["pagemap-7.img"]
    for name, memory in tasks.items():
        assert read(raw, name) == read(shelf.unpack("2") if name == "pagemap_7" else raw, name) == memory


def test_archives_that_list_no_directories(shelf: Shelf) -> None:
    memory = process(1)
    tasks = [memory, later(memory, 1)]
    for number, one in enumerate(tasks):
        images = write(shelf.top / f"images-{number}", pagemap_7=one)
        with tarfile.open(shelf.top / f"{number}.tar", "w") as archive:
            for path in sorted(images.iterdir()):
                archive.add(path, f"checkpoint/{path.name}")
        shelf.push(shelf.top / f"{number}.tar", str(number), str(number - 1) if number else "")
    assert read(shelf.unpack("1", raw=True), "pagemap_7") == read(shelf.unpack("1"), "pagemap_7") == tasks[1]
    again = shelf.push(Path(f"oci:{shelf.layout}:1"), "again")
    assert again.manifest == shelf.push(shelf.top / "1.tar", "whole").manifest


def test_a_pod_of_two_containers(shelf: Shelf) -> None:
    memories = {name: process(seed) for seed, name in enumerate(("web", "db"), start=1)}
    for number in (0, 1):
        for name, memory in memories.items():
            (shelf.top / str(number) / name).mkdir(parents=True)
            write(shelf.top / str(number) / name / "checkpoint", pagemap_1=later(memory, 1) if number else memory)
        pushed = shelf.push(shelf.top / str(number), str(number), "0" if number else "")
    assert pushed.increment is not None and not pushed.increment.reason and len(pushed.increment.layers) == 1
    raw, view = shelf.unpack("1", raw=True).parent, shelf.unpack("1").parent
    for name, memory in memories.items():
        assert read(raw / name / "checkpoint", "pagemap_1") == later(memory, 1)
        assert read(view / name / "checkpoint", "pagemap_1") == later(memory, 1)
        assert sorted(os.listdir(view / name / "checkpoint")) == ["inventory.img", "pagemap-1.img", "pages-1.img"]


@pytest.mark.parametrize("lie", ["present and a parent's", "a parent's", "cut short in the parent"])
def test_a_pagemap_that_lies_is_stored_as_it_is(lie: str, shelf: Shelf) -> None:
    """Other memory is shared all the same, and the view is the dump."""
    memory, other = process(1), process(5, 90)
    first = write(shelf.top / "1", pagemap_7=memory, pagemap_8=other)
    second = write(shelf.top / "2", pagemap_7=later(memory, 1), pagemap_8=other)
    runs = parse_pagemap((second / "pagemap-8.img").read_bytes(), "pagemap-8.img").runs
    if lie == "cut short in the parent":
        (first / "pagemap-8.img").write_bytes((first / "pagemap-8.img").read_bytes()[:-1])
    elif lie == "a parent's":
        (second / "pagemap-8.img").write_bytes(pagemap(2, *runs, (runs[-1].vaddr + (1 << 30), 5, PARENT)))
    else:
        (second / "pagemap-8.img").write_bytes(pagemap(2, *((run.vaddr, run.pages, 5) for run in runs)))
    shelf.push(first, "1")
    pushed = shelf.push(second, "2", "1")
    assert pushed.increment is not None and pushed.increment.shared > pushed.increment.changed
    assert directory_listing(shelf.unpack("2")) == directory_listing(second)
    again = shelf.push(Path(f"oci:{shelf.layout}:2"), "again")
    assert again.manifest == shelf.push(second, "whole").manifest


def test_without_anything_changed(shelf: Shelf) -> None:
    images = write(shelf.top / "1", pagemap_7=process(1))
    shelf.push(images, "1")
    pushed = shelf.push(images, "2", "1")
    assert pushed.increment is not None and pushed.increment.changed == 0
    assert read(shelf.unpack("2", raw=True), "pagemap_7") == read(shelf.unpack("2"), "pagemap_7") == process(1)


@pytest.mark.parametrize(("size", "shared"), [(16384, True), (65536, False)])
def test_machines_with_larger_pages(size: int, shared: bool, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has not changed: its own pagemap has no page that tells how large they are. 64 KiB are over cells."""
    monkeypatch.setattr(sys.modules[__name__], "_PAGE", size)
    memories = {"pagemap_7": process(1, 80), "pagemap_8": process(2, 80)}
    shelf.push(write(shelf.top / "1", **memories), "1")
    changed = {**memories, "pagemap_7": later(memories["pagemap_7"], 1)}
    pushed = shelf.push(write(shelf.top / "2", **changed), "2", "1").increment
    third = shelf.push(write(shelf.top / "3", **memories), "3", "2").increment
    assert pushed is not None and third is not None and bool(pushed.layers) == bool(third.layers) == shared
    for number in ("2", "3"):
        dumped, view = shelf.top / number, shelf.unpack(number)
        assert all((view / name).read_bytes() == (dumped / name).read_bytes() for name in os.listdir(dumped))
        whole = shelf.push(Path(f"oci:{shelf.layout}:{number}"), f"{number}-again").manifest
        assert whole == shelf.push(dumped, f"{number}-whole").manifest


def test_huge_pages_are_never_left_to_a_parent(shelf: Shelf) -> None:
    """criu does not premap them, and reads what is not premapped from the checkpoint's own file (criu/mem.c)."""
    memory = {_BASE + n * _PAGE: (page(n + 1), False) for n in range(600)}
    huge = (_BASE, _BASE + 100 * _PAGE)
    for name in ("1", "2"):
        images = write(shelf.top / name, pagemap_7=memory)
        (images / "mm-7.img").write_bytes(mm(vma(*huge, flags=0x40022), vma(huge[1], _BASE + 600 * _PAGE)))
    shelf.push(shelf.top / "1", "1")
    pushed = shelf.push(shelf.top / "2", "2", "1")
    assert pushed.increment is not None and pushed.increment.changed == 100 * _PAGE
    found = parse_pagemap((shelf.unpack("2", raw=True) / "pagemap-7.img").read_bytes(), "pagemap-7.img")
    assert found.runs == (Run(_BASE, 100, PRESENT), Run(huge[1], 500, PARENT))


def test_pushed_whole_where_nothing_is_shared(shelf: Shelf) -> None:
    images = write(shelf.top / "1", pagemap_7=process(1))
    shelf.push(write(shelf.top / "0", pagemap_7=process(2)), "0")
    whole = shelf.push(images, "whole")
    pushed = shelf.push(images, "1", "0")
    assert pushed.manifest == whole.manifest
    assert pushed.increment is not None and "in common" in pushed.increment.reason


def test_pushed_whole_on_an_image_without_an_index(shelf: Shelf, tmp_path: Path) -> None:
    images = write(shelf.top / "1", pagemap_7=process(1))
    foreign = Path(__file__).parents[1] / "data/corpus/tree/k8s-gzip.oci"
    pushed = push_to_layout(images, shelf.layout, "1", parent=f"oci:{foreign}")
    assert pushed.increment is not None and "no index" in pushed.increment.reason


def test_pushed_whole_with_pages_that_nothing_describes(shelf: Shelf) -> None:
    """They would stand in the way of the numbers."""
    images = write(shelf.top / "1", pagemap_7=process(1))
    shelf.push(images, "1")
    (images / "pages-9.img").write_bytes(bytes(_PAGE))
    pushed = shelf.push(images, "2", "1")
    assert pushed.increment is not None and "pages-9.img has no pagemap" in pushed.increment.reason


def test_a_chain_has_an_end(shelf: Shelf) -> None:
    settings = Settings()
    settings = settings._replace(limits=settings.limits._replace(increments=3))
    memory = process(1)
    reasons = []
    for number in range(5):
        images = write(shelf.top / f"images-{number}", pagemap_7=memory)
        pushed = shelf.push(images, str(number), str(number - 1) if number else "", settings)
        reasons.append(pushed.increment.reason if pushed.increment is not None else None)
        memory = later(memory, number)
    assert reasons[:3] == [None, "", ""]
    assert reasons[3] == "it stands on 2 others already, and 3 in a row are the most"
    assert reasons[4] == ""
    assert Limits().increments == 8


def test_increments_of_criu_stay_what_they_are(shelf: Shelf) -> None:
    memory = process(1)
    shelf.push(write(shelf.top / "1", pagemap_7=memory), "1")
    top = shelf.top / "dumps"
    top.mkdir()
    write(top / "pre", pagemap_7=memory)
    (write(top / "2", pagemap_7=later(memory, 1)) / "parent").symlink_to("../pre")
    pushed = shelf.push(top, "2", "1")
    assert pushed.increment is not None and pushed.increment.reason == "the checkpoint is an increment already"


@pytest.mark.parametrize("damage", ["pagemap", "pages", "cut", "endless", "other pages"])
def test_a_broken_increment_is_shown_as_it_is(damage: str, shelf: Shelf) -> None:
    """criu says what is wrong with it; a view that made zeros of what is lacking would be worse."""
    memory = process(1)
    shelf.push(write(shelf.top / "1", pagemap_7=memory), "1")
    shelf.push(write(shelf.top / "2", pagemap_7=later(memory, 1)), "2", "1")
    raw = shelf.unpack("2", raw=True)
    parent = raw / "parent"
    if damage == "other pages":
        shutil.copy(shelf.top / "1" / "pagemap-7.img", raw / "whole")
    elif damage == "endless":
        for _ in range(9):
            parent = parent / "parent"
            parent.mkdir()
            shutil.copy(raw / "parent" / "pagemap-7.img", parent)
    else:
        gone = {"pagemap": parent / "pagemap-7.img", "pages": raw / "pages-1.img", "cut": parent / "pagemap-7.img"}[
            damage
        ]
        if damage == "cut":
            gone.write_bytes(gone.read_bytes()[:-5])
        else:
            gone.unlink()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.add(raw, "checkpoint")
    layout = layout_with(shelf.top / "broken", [blob_of(tar.getvalue())], {PARENT_ANNOTATION: "sha256:" + "0" * 64})
    target = shelf.top / "broken-view"
    pull(LayoutSource(Reference.parse(f"oci:{layout}")), target, LayoutSource, NetworkCounters())
    shown = target / "checkpoint"
    assert (shown / "pagemap-7.img").read_bytes() == (raw / "pagemap-7.img").read_bytes()
    assert (shown / "parent").is_dir()


def test_pagemaps_at_the_limit_and_past_it(shelf: Shelf) -> None:
    memory = process(1)
    shelf.push(write(shelf.top / "1", pagemap_7=memory), "1")
    shelf.push(write(shelf.top / "2", pagemap_7=later(memory, 1)), "2", "1")
    size = sum(path.stat().st_size for path in shelf.unpack("2", raw=True).rglob("pagemap-*"))
    assert not (shelf.unpack("2", limits=Limits(increment_bytes=size)) / "parent").exists()
    assert (shelf.unpack("2", limits=Limits(increment_bytes=size - 1)) / "parent").is_dir()
    assert not (shelf.unpack("2", limits=Limits(increments=2)) / "parent").exists()
    assert (shelf.unpack("2", limits=Limits(increments=1, increment_bytes=size)) / "parent").is_dir()


@given(st.lists(st.booleans(), max_size=60))
def test_stretches_cover_everything_once(marks: list[bool]) -> None:
    found = list(stretches(bytes(marks)))
    assert [value for count, value in found for _ in range(count)] == marks
    assert all(a[1] != b[1] for a, b in itertools.pairwise(found))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), max_size=8), st.data())
def test_pagemaps_are_written_as_they_are_read(pieces: list[tuple[int, int, bool]], data: st.DataObject) -> None:
    runs, address = [], _BASE
    for gap, count, lazy in pieces:
        address += gap * _PAGE
        runs.append((address, count, PRESENT | LAZY if lazy else PRESENT))
        address += count * _PAGE
    raw = pagemap(1, *runs)
    whole = parse_pagemap(raw, "pagemap-1.img")
    marks = data.draw(st.lists(st.integers(0, 1), min_size=whole.present_pages, max_size=whole.present_pages))
    thin = parse_pagemap(
        encode_pagemap(raw, "pagemap-1.img", 70000, left_to_parent(whole, bytes(marks), _PAGE)), "pagemap-1.img"
    )
    assert thin.pages_id == 70000
    assert sum(run.pages for run in thin.runs) == sum(run.pages for run in whole.runs)
    assert thin.present_pages == marks.count(0)
    other = parse_pagemap(renumbered(raw, "pagemap-1.img", 300), "pagemap-1.img")
    assert (other.pages_id, other.runs) == (300, whole.runs)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 90), st.integers(1, 40)), max_size=12),
    st.integers(0, 400),
    st.integers(1, 100),
)
@hypothesis_settings(deadline=None)
def test_windows_are_what_they_show(places: list[tuple[int, int, int]], offset: int, length: int) -> None:
    """Against bytes: two files of 130 with a hole in each."""
    files = [bytes(range(130)), bytes(range(100, 230))]
    sources = []
    for which in (0, 1):
        chunks = [Chunk(bytes([which, n]), which, 0, 0, 30) for n in range(4)]
        sources.append([Extent(start, 30, chunk) for start, chunk in zip((0, 30, 70, 100), chunks, strict=True)])
    windows = WindowExtents(sources, places)
    expected = b"".join(
        bytes(0 if 60 <= i < 70 or i >= 130 else files[which][i] for i in range(at, at + n)) for which, at, n in places
    )
    shown = bytearray(len(expected))
    for extent in windows:
        which, n = extent.chunk.key
        start = (0, 30, 70, 100)[n] + extent.skip
        shown[extent.start : extent.start + extent.length] = files[which][start : start + extent.length]
    assert shown == expected
    wanted = [e for e in windows if e.start < offset + length and e.start + e.length > offset]
    assert list(overlapping(windows, offset, length)) == wanted
    assert [windows[i] for i in range(len(windows))] == list(windows) == windows[:]
