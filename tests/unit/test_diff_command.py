"""`ckptfs diff`: what differs, told from as little as it takes; whatever the formats of the two images."""

import gzip
import io
import json
import math
import random
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.inspection import equality
from ckptfs.inspection.diff import Difference
from ckptfs.inspection.image_diff import diff_images
from ckptfs.model.toc import Chunk, Extent, Inode
from ckptfs.telemetry import NetworkCounters
from tests.support.blobs import TAR, blob_of
from tests.support.command import ckptfs
from tests.support.counted import with_layouts
from tests.support.criu_images import CORPUS, image, mm, pagemap, task, vma
from tests.support.push import DATA, push_to_layout, two_checkpoints
from tests.support.tars import member, pax, tar_of
from tests.support.trees import layout_of, layout_with

P = 4096


def compare(before: Path, after: Path, cache: Path, *, memory: bool = True) -> tuple[Difference, NetworkCounters]:
    return with_layouts([before, after], cache, lambda images: diff_images(images[0], images[1], memory=memory))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """first.oci and second.oci as we push them; first.plain and second.plain as one tar layer each."""
    folder = tmp_path_factory.mktemp("two")
    two_checkpoints(folder)
    for name in ("first", "second"):
        push_to_layout(folder / f"{name}.tar", folder / f"{name}.oci")
        layout_of((folder / f"{name}.tar").read_bytes(), folder / f"{name}.plain")
    return folder


@pytest.mark.parametrize(("first", "second"), [("oci", "oci"), ("plain", "plain"), ("plain", "oci")])
def test_two_checkpoints_of_one_process(first: str, second: str, two: Path, tmp_path: Path) -> None:
    """150 of 2062 pages changed; the counts do not depend on the format."""
    found, _ = compare(two / f"first.{first}", two / f"second.{second}", tmp_path)
    (container,) = found.containers
    (memory,) = container.memory
    assert (memory.same_pages, memory.changed_pages, memory.added_pages, memory.removed_pages) == (1912, 150, 0, 0)
    assert sum(length for _, length in memory.changed) == 150 * P
    changed = {change.path: change.fields for change in found.files}
    assert changed["checkpoint/pages-1.img"] == ("content",)
    assert {"checkpoint/core-14515.img", "checkpoint/timens-0.img"} <= changed.keys()
    assert not {"checkpoint/mm-14515.img", "config.dump", "checkpoint/pagemap-14515.img"} & changed.keys()


def test_the_second_pull_takes_what_changed(two: Path, tmp_path: Path) -> None:
    changed = json.loads((DATA / "two/pages.json").read_bytes())["changed_bytes_zstd3"]
    found, counters = compare(two / "first.oci", two / "second.oci", tmp_path, memory=False)
    assert found.fetch_bytes is not None and changed <= found.fetch_bytes <= 1.5 * changed
    assert found.containers[0].memory == ()
    # two manifests, the tables of cells and the command lines: no page was compared
    assert counters.bytes < 60_000 and counters.round_trips(math.inf) <= 5
    whole, _ = compare(two / "first.plain", two / "second.plain", tmp_path / "other", memory=False)
    assert whole.fetch_bytes is not None and whole.fetch_bytes > 8_000_000


def test_an_increment_of_the_first(two: Path, tmp_path: Path) -> None:
    """`push --parent`: cells of the earlier image's chunks are compared as ever, and only what is new is pulled."""
    changed = json.loads((DATA / "two/pages.json").read_bytes())["changed_bytes_zstd3"]
    increment = two / "second.increment"
    push_to_layout(two / "second.tar", increment, parent=f"oci:{two}/first.oci")
    found, _ = compare(two / "first.oci", increment, tmp_path)
    (memory,) = found.containers[0].memory
    assert (memory.same_pages, memory.changed_pages, memory.added_pages, memory.removed_pages) == (1912, 150, 0, 0)
    assert found.fetch_bytes is not None and changed <= found.fetch_bytes <= 1.1 * changed
    _, counters = compare(two / "first.oci", increment, tmp_path / "again", memory=False)
    assert counters.bytes < 500_000


def test_an_image_and_itself(two: Path, tmp_path: Path) -> None:
    found, counters = compare(two / "first.oci", two / "first.oci", tmp_path)
    assert found.files == () and found.fetch_bytes == 0 and found.containers[0].processes == ()
    assert found.containers[0].memory[0].changed_pages == 0
    assert counters.bytes < 70_000


def test_formats_that_share_nothing_are_compared_by_content(tmp_path: Path) -> None:
    """zstd:chunked against one zstd stream of the same archive; the tars inside are looked into as well."""
    layouts = [CORPUS / "counter" / f"{name}.oci" for name in ("k8s-zstdchunked", "k8s-zstd")]
    found, counters = compare(*layouts, tmp_path)
    assert found.files == () and found.containers[0].memory[0].same_pages == 398
    blob = max(file.stat().st_size for file in (layouts[1] / "blobs" / "sha256").iterdir())
    assert found.fetch_bytes == blob and counters.round_trips(math.inf) <= 14
    total = sum(file.stat().st_size for layout in layouts for file in (layout / "blobs" / "sha256").iterdir())
    assert counters.bytes < total + 64 * 1024  # the stream ran once


def test_what_the_node_has_learnt_of_streams_is_no_difference(tmp_path: Path) -> None:
    """The second look knows the digests of the streams' chunks: those of two layers are still called differently."""
    pages, layouts = random.Random(4).randbytes(5 << 20), []
    for name in ("first", "second"):
        files = {
            "checkpoint/inventory.img": image("inventory", {1: 1}),
            "config.dump": f'{{"name": "{name}"}}'.encode(),
        }
        layer = blob_of(gzip.compress(tar_of({**files, "checkpoint/pages-1.img": pages}), 1), f"{TAR}+gzip")
        layouts.append(layout_with(tmp_path / name, [layer]))
    looks = [compare(*layouts, tmp_path / "cache", memory=False) for _ in range(3)]
    assert [[change.path for change in found.files] for found, _ in looks] == [["config.dump"]] * 3


def test_attributes_of_files(tmp_path: Path) -> None:
    """A capability that comes or goes changes what a program may do."""
    layouts, capability = [], bytes.fromhex("0100000200040000000000000000000000000000")
    for name, attributes in (("first", []), ("second", [(b"SCHILY.xattr.security.capability", capability)])):
        members = [member(b"checkpoint/inventory.img", image("inventory", {1: 1})), pax(attributes), member(b"ping")]
        layouts.append(layout_with(tmp_path / name, [blob_of(b"".join(members))]))
    found, _ = compare(*layouts, tmp_path / "cache", memory=False)
    assert [(change.path, change.fields) for change in found.files] == [("ping", ("xattrs",))]


def test_different_containers(tmp_path: Path) -> None:
    counter, tree = CORPUS / "counter/k8s-zstdchunked.oci", CORPUS / "tree/k8s-zstdchunked.oci"
    found, _ = compare(counter, tree, tmp_path)
    changes = [(change.pid, change.status) for change in found.containers[0].processes]
    assert changes == [(1, "removed"), (14400, "added"), (14401, "added"), (14402, "added")]
    paths = {change.path: change.status for change in found.files}
    assert paths["config.dump"] == "removed" and paths["checkpoint/mm-14400.img"] == "added"
    assert paths["rootfs-diff"] == "removed" and any(path.startswith("rootfs-diff/") for path in paths)


def checkpoint(folder: Path, pages: bytes, delta: dict[str, bytes], *, processes: bool = True) -> Path:
    """A flat checkpoint of one process whose memory is `pages`, with a file system delta."""
    images = folder / "checkpoint"
    images.mkdir(parents=True)
    (images / "inventory.img").write_bytes(image("inventory", {1: 1, 3: 1}))
    (images / "pstree.img").write_bytes(image("pstree", task(5)))
    (images / "core-5.img").write_bytes(image("core", {1: 1, 3: {1: 1, 2: 0, 3: 0, 4: 0, 5: 0, 6: "main"}}))
    (images / "ids-5.img").write_bytes(image("ids", {1: 1, 2: 1, 3: 1, 4: 1}))
    (images / "mm-5.img").write_bytes(mm(vma(0x1000, 0x1000 + len(pages))))
    (images / "pagemap-5.img").write_bytes(pagemap(1, (0x1000, len(pages) // P, 4)))
    (images / "pages-1.img").write_bytes(pages)
    with tarfile.open(folder / "rootfs-diff.tar", "w") as archive:
        for name, data in delta.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return folder


def plain(folder: Path, source: Path) -> Path:
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        archive.add(source, ".")
    return layout_of(folder.with_suffix(".tar").read_bytes(), folder)


@pytest.mark.parametrize("make", [plain, lambda folder, source: push_to_layout(source, folder) and folder])
def test_files_of_the_delta(make: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    big = random.Random(3).randbytes(3 << 20)
    changed = bytearray(big)
    changed[-1] ^= 1
    before = {"etc/same": b"x" * 900, "var/big": big, "etc/changed": b"old", "etc/gone": b"1"}
    after = {"etc/same": b"x" * 900, "var/big": bytes(changed), "etc/changed": b"new", "etc/new": b"1"}
    pages = bytes(P) + b"a" * P
    first = make(tmp_path / "1", checkpoint(tmp_path / "a", pages, before))
    second = make(tmp_path / "2", checkpoint(tmp_path / "b", pages, after))
    found, _ = compare(first, second, tmp_path / "cache")
    inside = {c.path: (c.status, c.fields) for c in found.files if c.path.startswith("rootfs-diff/")}
    assert inside == {
        "rootfs-diff/etc/changed": ("modified", ("content",)),
        "rootfs-diff/etc/gone": ("removed", ()),
        "rootfs-diff/etc/new": ("added", ()),
        "rootfs-diff/var/big": ("modified", ("content",)),
    }
    assert found.containers[0].memory[0].changed_pages == 0


def test_memory_that_cannot_be_told_apart_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layouts = []
    for number, size in enumerate((2 * P, 8 * P)):
        source = checkpoint(tmp_path / f"s{number}", bytes(range(256)) * (size // 256), {})
        if number:  # the same count of pages in four times the bytes: pages of another size
            (source / "checkpoint" / "pagemap-5.img").write_bytes(pagemap(1, (0, 2, 4)))
        layouts.append(plain(tmp_path / f"l{number}", source))
    found, _ = compare(*layouts, tmp_path / "cache")
    assert found.containers[0].memory == () and "process 5 is not compared" in caplog.text


def test_the_command(two: Path, tmp_path: Path) -> None:
    references = [f"oci:{two}/{name}.oci" for name in ("first", "second")]
    result = ckptfs("diff", *references, "--cache-dir", tmp_path)
    assert result.code == 0 and result.line.startswith("fetched 0 B of")
    assert "memory of 14515: 150 pages changed, 0 added, 0 removed, 1912 the same" in result.out
    assert "~ checkpoint/pages-1.img (content)" in result.out and "To fetch for the second: 4" in result.out
    found = ckptfs("diff", *references, "--json", "--no-pages", "--cache-dir", tmp_path).json
    assert found["containers"][0]["memory"] == [] and found["before"] == references[0]
    assert {"files", "fetch_bytes", "fetched_bytes", "image_bytes", "requests", "round_trips"} <= found.keys()


# equality by chunks


def extents(*pieces: tuple[int, int, bytes, int], digests: bool = True, whole: int = 0) -> Inode:
    """A file of (start, length, key, skip); each chunk is as long as its piece, or `whole`."""
    size = max((start + length for start, length, _, _ in pieces), default=0)
    return Inode(
        0o100644,
        size=size,
        extents=tuple(
            Extent(start, length, Chunk(key, 0, 0, 1, whole or length, key if digests else None), skip)
            for start, length, key, skip in pieces
        ),
    )


def unknown_parts(
    first: Inode, offset: int, second: Inode, other_offset: int, length: int, comparable: bool = True
) -> list[tuple[int, int]] | None:
    return equality.unknown_parts(first, offset, second, other_offset, length, lambda a, b: comparable)


def test_equality_by_chunks() -> None:
    one = extents((0, 10, b"a", 0), (10, 10, b"b", 0))
    assert unknown_parts(one, 0, one, 0, 20) == []
    assert unknown_parts(one, 0, extents((0, 10, b"a", 0), (10, 10, b"c", 0)), 0, 20) is None
    assert unknown_parts(one, 12, one, 12, 5) == []
    # another chunk, but only a part of it is compared: it may be the same there
    assert unknown_parts(one, 12, extents((0, 10, b"a", 0), (10, 10, b"c", 0)), 12, 5) == [(0, 5)]
    # without digests, and with other boundaries, nothing is known to differ
    nameless = extents((0, 10, b"a", 0), (10, 10, b"c", 0), digests=False)
    assert unknown_parts(one, 0, nameless, 0, 20) == [(10, 10)]
    assert unknown_parts(one, 0, extents((0, 12, b"x", 0), (12, 8, b"y", 0)), 0, 20) == [(0, 20)]
    # the same digest under two names
    renamed = Inode(0o100644, size=10, extents=(Extent(0, 10, Chunk(b"z", 0, 0, 1, 10, b"a")),))
    assert unknown_parts(one, 0, renamed, 0, 10) == []
    # nor with digests of two kinds
    assert unknown_parts(one, 0, extents((0, 10, b"a", 0), (10, 10, b"c", 0)), 0, 20, comparable=False) == [(10, 10)]
    # holes are zeros, which a chunk may hold as well
    assert unknown_parts(extents(), 0, extents(), 0, 20) == []
    assert unknown_parts(one, 0, extents((10, 10, b"b", 0)), 0, 20) == [(0, 10)]
    # the same bytes at another place of the file
    moved = extents((0, 5, b"b", 5), whole=10)
    assert unknown_parts(one, 15, moved, 0, 5) == [] and unknown_parts(one, 14, moved, 0, 5) == [(0, 5)]


@given(st.integers(0, 2**32), st.booleans())
def test_unknown_parts_hold_every_difference(seed: int, digests: bool) -> None:
    rng = random.Random(seed)
    contents = {key: key + bytes(rng.choices(b"01", k=7)) for key in (b"a", b"b", b"c", b"d")}

    def make() -> tuple[Inode, bytes]:
        pieces, data, at = [], bytearray(), 0
        while at < 40:
            length, key, skip = rng.randint(1, 8), rng.choice([*contents, b""]), 0
            if key:
                skip = rng.randint(0, 8 - length)
                pieces.append((at, length, key, skip))
            data += contents[key][skip : skip + length] if key else bytes(length)
            at += length
        return extents(*pieces, digests=digests, whole=8), bytes(data[:40])

    (first, a), (second, b) = make(), make()
    offset, length = rng.randint(0, 10), rng.randint(1, 20)
    other = rng.randint(0, 10)
    parts = unknown_parts(first, offset, second, other, length)
    here, there = a[offset : offset + length], b[other : other + length]
    if parts is None:
        assert here != there
        return
    known = set(range(length)) - {at for start, size in parts for at in range(start, start + size)}
    assert all(here[at] == there[at] for at in known)
    assert all(x[0] + x[1] < y[0] for x, y in pairwise(parts))
