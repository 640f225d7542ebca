"""Reading and searching the memory of checkpointed processes, and comparing two checkpoints."""

import io
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ckptfs.criu.memory import Place
from ckptfs.criu.pagemap import LAZY, PARENT, PRESENT
from ckptfs.errors import FormatError, NotFoundError, UsageError
from ckptfs.inspection import memory as memory_module
from ckptfs.inspection import render
from ckptfs.inspection.diff import (
    ContainerChange,
    Difference,
    FileChange,
    FileFacts,
    ProcessChange,
    diff_files,
    diff_memory,
    diff_processes,
    fetch_bytes,
)
from ckptfs.inspection.memory import ProcessMemory, hex_pattern, regex_pattern, search, text_pattern
from ckptfs.inspection.overview import inspect, open_images, summarise
from ckptfs.inspection.parts import Part
from ckptfs.inspection.source import Images, LocalFiles
from ckptfs.model.toc import Chunk
from ckptfs.settings import Limits
from tests.support.criu_images import pagemap, unpack_counter, unpack_tree

P = 4096


@contextmanager
def _folder() -> Iterator[Path]:
    """A directory for one example: hypothesis runs many in one test."""
    with TemporaryDirectory() as name:
        yield Path(name)


def images(root: Path, content: dict[int, bytes], *, flags: int = PRESENT | LAZY) -> Images:
    """A checkpoint directory with one process, 5; `content` is vaddr -> bytes of whole pages, ascending."""
    root.mkdir(parents=True, exist_ok=True)
    runs = [(vaddr, len(data) // P, flags) for vaddr, data in sorted(content.items())]
    (root / "pagemap-5.img").write_bytes(pagemap(1, *runs))
    (root / "pages-1.img").write_bytes(b"".join(content[vaddr] for vaddr in sorted(content)))
    return Images(LocalFiles(root), "", Limits())


def test_reading_by_address(tmp_path: Path) -> None:
    found = ProcessMemory(images(tmp_path, {0x1000: b"a" * P, 0x3000: b"b" * 2 * P}), 5)
    assert found.read(0x1FFE, 4) == b"aa\0\0" and found.read(0x2FFE, 4) == b"\0\0bb"
    assert found.read(0x900000, 3) == b"\0\0\0" and found.read(0x1000, 0) == b""
    assert (found.size, found.page_size) == (3 * P, P)
    assert list(found.areas()) == [(0x1000, P), (0x3000, 2 * P)]
    assert found.ranges(0x1FFE, 0x2000) == [("pages-1.img", 0xFFE, 2), ("pages-1.img", P, 0xFFE)]


def test_touching_runs_are_one_area(tmp_path: Path) -> None:
    found = ProcessMemory(images(tmp_path, {0x1000: b"a" * P, 0x2000: b"b" * P, 0x4000: b"c" * P}), 5)
    assert list(found.areas()) == [(0x1000, 2 * P), (0x4000, P)]


def test_memory_of_an_incremental_checkpoint(tmp_path: Path) -> None:
    """Through the `parent` link, as criu follows it."""
    images(tmp_path / "pre-checkpoint", {0x1000: b"old!" * 1024 * 2})
    (tmp_path / "checkpoint").mkdir()
    new = (0x1000, 1, PARENT), (0x2000, 1, PRESENT)
    (tmp_path / "checkpoint" / "pagemap-5.img").write_bytes(pagemap(7, *new))
    (tmp_path / "checkpoint" / "pages-7.img").write_bytes(b"new!" * 1024)
    with pytest.raises(FormatError, match="needs a parent checkpoint"):
        ProcessMemory(open_images(LocalFiles(tmp_path)), 5)
    (tmp_path / "checkpoint" / "parent").symlink_to("../pre-checkpoint")
    found = ProcessMemory(open_images(LocalFiles(tmp_path)), 5)
    assert found.read(0x1FFC, 8) == b"old!new!" and found.size == 2 * P


def test_a_parent_that_has_less_than_was_promised(tmp_path: Path) -> None:
    """A run of 2**40 pages "in the parent" is no reason to go through 4 EiB."""
    images(tmp_path / "checkpoint" / "parent", {0x5000: b"here" * 1024})
    (tmp_path / "checkpoint" / "pagemap-5.img").write_bytes(pagemap(7, (0x1000, 1 << 40, PARENT)))
    found = ProcessMemory(open_images(LocalFiles(tmp_path)), 5)
    assert list(found.areas()) == [(0x5000, P)] and found.size == P
    assert [m.vaddr for m in search(found, text_pattern("here"))][:2] == [0x5000, 0x5004]


def test_a_process_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no memory of process 6"):
        ProcessMemory(images(tmp_path, {0x1000: b"a" * P}), 6)


# searching


def test_matches_have_addresses_and_context(tmp_path: Path) -> None:
    page = b"..needle..".ljust(P, b"-")
    found = ProcessMemory(images(tmp_path, {0x1000: page, 0x8000: page}), 5)
    matches = list(search(found, text_pattern("needle"), context=4))
    assert [m.vaddr for m in matches] == [0x1002, 0x8002]
    assert (matches[0].before, matches[0].data, matches[0].after) == (b"..", b"needle", b"..--")
    assert matches[0].to_json() == {
        "pid": 5,
        "address": "0x0000000000001002",
        "length": 6,
        "hex": b"needle".hex(),
        "text": "..needle..--",
    }


def test_matches_across_pages_but_not_across_gaps(tmp_path: Path) -> None:
    before, after = b"-" * (P - 3) + b"nee", b"dle" + b"-" * (P - 3)
    touching = ProcessMemory(images(tmp_path / "a", {0x1000: before, 0x2000: after}), 5)
    assert [m.vaddr for m in search(touching, text_pattern("needle"))] == [0x1FFD]
    apart = ProcessMemory(images(tmp_path / "b", {0x1000: before, 0x3000: after}), 5)
    assert list(search(apart, text_pattern("needle"))) == []


@given(st.integers(0, 2**32), st.integers(0, 9), st.sampled_from([b"ab", b"a+b", b"[ab]{3}", b"b.{1,6}a", b"(?:ab)+"]))
@settings(deadline=None, max_examples=60)
def test_windows_do_not_matter(seed: int, context: int, expression: bytes) -> None:
    """Searching piece by piece finds what searching the whole finds."""
    content = bytes(random.Random(seed).choices(b"ab-", weights=[2, 2, 40], k=3 * P))
    pattern = re.compile(expression, re.S)
    with pytest.MonkeyPatch.context() as patch, _folder() as folder:
        patch.setattr(memory_module, "_WINDOW", 512)
        patch.setattr(memory_module, "_LONGEST", 64)
        found = ProcessMemory(images(folder, {0x1000: content}), 5)
        matches = list(search(found, pattern, context))
    expected = [(0x1000 + m.start(), m.group()) for m in pattern.finditer(content)]
    assert [(m.vaddr, m.data) for m in matches] == expected
    for match in matches:
        at = match.vaddr - 0x1000
        assert match.before == content[max(at - context, 0) : at]
        end = at + len(match.data)
        assert content[end : end + context].startswith(match.after)


def test_patterns() -> None:
    assert text_pattern("a.b").search(b"a.b") and not text_pattern("a.b").search(b"axb")
    assert text_pattern("ü").pattern == "ü".encode()
    assert regex_pattern("a.b").search(b"axb")
    assert hex_pattern("de ad BE ef").search(b"\xde\xad\xbe\xef") and hex_pattern("2e").pattern == rb"\."
    for make, words in (
        (text_pattern, [""]),
        (regex_pattern, ["", "a*", "(", "[z-a]"]),
        (hex_pattern, ["", "d", "xy", "dea"]),
    ):
        for word in words:
            with pytest.raises(UsageError):
                make(word)


def test_real_memory(tmp_path: Path) -> None:
    found = ProcessMemory(open_images(LocalFiles(unpack_counter(tmp_path))), 1)
    # addresses as `checkpointctl memparse --search` prints them
    assert [m.vaddr for m in search(found, text_pattern("container=podman"))] == [0x7FFC95B58FC1]


# differences


def test_two_checkpoints_of_one_process(tmp_path: Path) -> None:
    content = {0x1000: bytes(random.Random(1).randbytes(600 * P)), 0x900000: b"x" * P, 0xA00000: b"gone" * 1024}
    after = dict(content)
    changed = bytearray(after[0x1000])
    for page in (0, 1, 255, 256, 599):
        changed[page * P + 7] ^= 1
    after[0x1000] = bytes(changed)
    del after[0xA00000]
    after[0xB00000] = b"new!" * 2048
    found = diff_memory(images(tmp_path / "a", content), images(tmp_path / "b", after), 5)
    assert (found.same_pages, found.changed_pages, found.added_pages, found.removed_pages) == (596, 5, 2, 1)
    assert found.changed == (
        (0x1000, 2 * P),
        (0x1000 + 255 * P, 2 * P),
        (0x1000 + 599 * P, P),
    )
    assert found.to_json()["changed"][0] == {"address": "0x0000000000001000", "length": 2 * P}


def test_what_is_known_to_be_equal_is_not_read(tmp_path: Path) -> None:
    before = images(tmp_path / "a", {0x1000: b"a" * 8 * P})
    after = images(tmp_path / "b", {0x1000: b"a" * 6 * P + b"b" * 2 * P})
    asked: list[tuple[Place, Place]] = []

    def nothing(a: Place, b: Place) -> list[tuple[int, int]]:
        asked.append((a, b))
        return []

    assert diff_memory(before, after, 5, nothing).changed_pages == 0
    assert [(a.vaddr, a.length, b.offset) for a, b in asked] == [(0x1000, 8 * P, 0)]
    assert diff_memory(before, after, 5).changed_pages == 2
    # of what is not known, whole pages are read
    assert diff_memory(before, after, 5, lambda a, b: [(6 * P - 1, 2)]).changed_pages == 1
    assert diff_memory(before, after, 5, lambda a, b: [(0, 3), (7 * P + 9, 1)]).changed == ((0x8000, P),)


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
@settings(deadline=None, max_examples=60)
def test_every_page_is_counted_once(first: set[int], second: set[int], different: set[int]) -> None:
    with _folder() as folder:
        a = images(folder / "a", {0x10000 + n * P: b"%04d" % n * 1024 for n in first})
        b = images(folder / "b", {0x10000 + n * P: (b"diff" if n in different else b"%04d" % n) * 1024 for n in second})
        found = diff_memory(a, b, 5)
    both = first & second
    assert found.changed_pages == len(both & different) and found.same_pages == len(both - different)
    assert (found.added_pages, found.removed_pages) == (len(second - first), len(first - second))
    assert sum(length for _, length in found.changed) == found.changed_pages * P


def test_pages_of_different_sizes(tmp_path: Path) -> None:
    small, large = images(tmp_path / "a", {0: b"a" * 4 * P}), images(tmp_path / "b", {0: b"a" * 4 * P})
    (tmp_path / "b" / "pagemap-5.img").write_bytes(pagemap(1, (0, 1, PRESENT)))
    with pytest.raises(FormatError, match="has pages of 4096 bytes in one checkpoint and 16384 in the other"):
        diff_memory(small, large, 5)


def test_processes_that_came_went_and_changed(tmp_path: Path) -> None:
    before = inspect(LocalFiles(unpack_tree(tmp_path))).processes
    root, cow, shm = before
    assert diff_processes(before, before) == ()
    changed = type(cow)(**{**{name: getattr(cow, name) for name in cow.__slots__}, "name": "renamed", "memory": 5})
    found = diff_processes((root, cow), (changed, shm))
    assert [(c.pid, c.status) for c in found] == [(14400, "removed"), (14401, "modified"), (14402, "added")]
    assert found[1].fields == {"command": ("tree-cow", "renamed"), "memory_size": (454656, 5)}


def test_files_that_came_went_and_changed() -> None:
    file = FileFacts("file", 0o644, 0, 0, 3, b"digest")
    before = {"same": file, "gone": file, "owner": file, "bytes": file}
    after = {
        "same": file,
        "owner": FileFacts("file", 0o600, 7, 0, 3, b"digest"),
        "bytes": FileFacts("file", 0o644, 0, 0, 3, b"other"),
        "new": file,
    }
    assert diff_files(before, after) == (
        FileChange("bytes", "modified", ("content",)),
        FileChange("gone", "removed"),
        FileChange("new", "added"),
        FileChange("owner", "modified", ("mode", "uid")),
    )


def test_what_a_second_pull_fetches() -> None:
    def chunk(key: int, size: int) -> Chunk:
        return Chunk(bytes([key]) * 32, 0, 0, size, size)

    assert fetch_bytes([chunk(1, 10), chunk(2, 20)], [chunk(2, 20), chunk(3, 30), chunk(3, 30), chunk(4, 5)]) == 35


# for people


def shown(print_it: object, *values: object, **options: object) -> str:
    console = Console(width=160, force_terminal=False, no_color=True, file=io.StringIO())
    print_it(console, *values, **options)  # type: ignore[operator]
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_an_overview_for_people(tmp_path: Path) -> None:
    files = LocalFiles(unpack_counter(tmp_path))
    text = shown(render.print_overview, inspect(files))
    for line in (
        "Engine: Podman",
        "Checkpoint size: 1.6 MiB",
        "Root fs diff size: 333.0 KiB",
        "Frozen time: 130.13 ms",
        "[1] /counter 1536 /data/out  1.6 MiB",
        "container=podman",
        "[PIPE 1] pipe[152505]",
        "/sys/fs/cgroup: cgroup from cgroup",
        "io.container.manager: libpod",
    ):
        assert line in text
    summary = shown(render.print_summaries, [("name", *summarise(files))])
    assert "f63b0282238b" in summary and "333.0 KiB" in summary


def test_a_tree_for_people(tmp_path: Path) -> None:
    found = inspect(LocalFiles(unpack_tree(tmp_path)))
    text = shown(render.print_overview, replace(found, parts=Part.EVERYTHING & ~Part.FILES))
    lines = [line for line in text.splitlines() if "/srv/ckpt/tree" in line]
    assert [line.index("[144") for line in lines] == [8, 12, 12]
    assert "UNIX STREAM ESTABLISHED (send 208.0 KiB, receive 208.0 KiB)" in text
    assert "tree-shm" in shown(render.print_memory_sizes, found.processes)


def test_nothing_from_an_image_reaches_the_terminal_raw(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07[red]x"
    container = ContainerChange(evil, (ProcessChange(1, evil, "added"),))
    difference = Difference((container,), (FileChange(evil, "removed"),), 1536)
    text = shown(render.print_difference, difference)
    assert "\x1b" not in text and "\x07" not in text
    assert r"x: process 1 \x1b]0;owned\x07[red]x" in text and "1.5 KiB" in text
    assert json.loads(json.dumps(difference.to_json()))["fetch_bytes"] == 1536
    found = ProcessMemory(images(tmp_path, {0x1000: evil.encode().ljust(P, b"\0")}), 5)
    assert "owned.[red]x" in shown(render.print_matches, search(found, text_pattern("owned"), 7))


def test_a_memory_difference_for_people(tmp_path: Path) -> None:
    found = diff_memory(images(tmp_path / "a", {0: b"a" * P}), images(tmp_path / "b", {0: b"b" * P}), 5)
    text = shown(render.print_difference, Difference((ContainerChange(memory=(found,)),)))
    assert "memory of 5: 1 pages changed, 0 added, 0 removed, 0 the same" in text


def test_hex_dumps() -> None:
    lines = list(render.hex_lines(0x1000, b"ABC\0" * 12 + b"\xff"))
    assert lines == [
        "0000000000001000  41 42 43 00 41 42 43 00 41 42 43 00 41 42 43 00  |ABC.ABC.ABC.ABC.|",
        "*",
        "0000000000001030  ff                                               |.|",
    ]
