"""Whatever bytes stand in the place of CRIU's images: FormatError and its kin, and nothing else, and soon."""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfs.criu import core, files, inventory, mm, namespaces, pagemap, pstree
from ckptfs.criu.images import parse_name, records
from ckptfs.criu.restore_plan import plan_restore
from ckptfs.criu.wire import Message
from ckptfs.errors import FormatError
from ckptfs.inspection.overview import inspect
from ckptfs.inspection.source import Range
from tests.support.criu_images import image, magic, record, unpack_counter, unpack_tree

PARSERS: dict[str, Callable[[bytes, str], Any]] = {
    "pstree": pstree.parse_pstree,
    "ids": pstree.parse_ids,
    "core": core.parse_core,
    "fs": core.parse_fs,
    "mm": mm.parse_mm,
    "pagemap": pagemap.parse_pagemap,
    "pagemap-shmem": pagemap.parse_pagemap,
    "files": files.parse_files,
    "fdinfo": files.parse_fdinfo,
    "inventory": inventory.parse_inventory,
    "stats-dump": inventory.parse_dump_statistics,
    "mountpoints": namespaces.parse_mountpoints,
    "utsns": namespaces.parse_uts,
    "memfd": namespaces.parse_memfds,
}
ONLY_OF_COUNTER = {"core-1.img", "mm-1.img", "pagemap-1.img", "ids-1.img", "fs-1.img"}  # process 1 is not in the tree


@cache
def real_images() -> dict[str, bytes]:
    """Every image of the corpus by name; pages only by their sizes."""
    out: dict[str, bytes] = {}
    with TemporaryDirectory() as folder:
        for root in (unpack_counter(Path(folder) / "counter"), unpack_tree(Path(folder) / "tree")):
            for path in (root / "checkpoint").iterdir():
                out[path.name] = path.read_bytes()
    return out


def consume(kind: str, data: bytes) -> None:
    """Parses as its kind is parsed, to the end."""
    try:
        if kind in PARSERS:
            found = PARSERS[kind](data, f"{kind}-1.img")
            if isinstance(found, Iterable):
                list(found)
        else:
            list(records(data, kind, f"{kind}-1.img"))
    except FormatError:
        pass


kinds = st.sampled_from(sorted({"cgroup", "tcp-stream", "ghost-file", "sk-queues", *PARSERS}))


@given(kinds, st.binary(max_size=300))
@settings(deadline=None)
def test_any_bytes(kind: str, data: bytes) -> None:
    consume(kind, data)
    if kind != "stats-dump":
        consume(kind, magic(kind) + data)
        consume(kind, magic(kind) + struct.pack("<I", len(data)) + data)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_real_images_with_damage(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(n for n in real_images() if not n.startswith(("pages", "tmpfs", "desc")))))
    raw = bytearray(real_images()[name])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(raw) - 1))
        what = data.draw(st.sampled_from(["flip", "cut", "insert", "set"]))
        if what == "flip":
            raw[position] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "set":
            raw[position] = data.draw(st.sampled_from([0, 0x7F, 0x80, 0xFF]))
        elif what == "cut":
            del raw[position:]
            raw += b"\0" * (not raw)
        else:
            raw[position:position] = data.draw(st.binary(min_size=1, max_size=12))
    parsed = parse_name(name)
    assert parsed is not None
    consume(parsed.kind, bytes(raw))


@given(st.data(), st.booleans())
@settings(deadline=None, max_examples=200)
def test_plans_of_damaged_checkpoints(data: st.DataObject, lazy: bool) -> None:
    """A plan, or FormatError; and no plan reads past the end of a file, or a byte twice."""
    images = {name: raw for name, raw in real_images().items() if "144" in name or "shmem" in name or "pages" in name}
    images["pstree.img"] = real_images()["pstree.img"]
    name = data.draw(st.sampled_from(sorted(n for n in images if n.startswith(("pstree", "mm", "pagemap", "ids")))))
    raw = bytearray(images[name])
    for _ in range(data.draw(st.integers(1, 2))):
        raw[data.draw(st.integers(8, len(raw) - 1))] = data.draw(st.integers(0, 255))
    sizes = {name: len(data) for name, data in images.items()}
    try:
        plan = plan_restore({**images, name: bytes(raw)}.get, sizes, lazy=lazy)
    except FormatError:
        return
    for run in plan.runs():
        assert 0 <= run.offset < run.offset + run.length <= sizes[run.file]
    for before, after in pairwise(sorted(plan.runs(), key=lambda run: (run.file, run.offset))):
        assert before.file != after.file or before.offset + before.length <= after.offset


def test_two_pagemaps_of_one_pages_file() -> None:
    images = {name: raw for name, raw in real_images().items() if "shmem" in name or "pages" in name}
    images["pstree.img"] = real_images()["pstree.img"]
    mine, others = [name for name in images if name.startswith("pagemap-shmem")][:2]
    sizes = {name: len(data) for name, data in images.items()}
    with pytest.raises(FormatError, match=r"pages-\d+.img belongs to pagemap-"):
        plan_restore({**images, mine: images[others]}.get, sizes, lazy=False)


class InMemory:
    """CheckpointFiles of a dictionary."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def list(self, directory: str) -> Sequence[str]:
        return ["checkpoint/"] if not directory else [path.partition("/")[2] for path in self.files]

    def size(self, path: str) -> int | None:
        return len(self.files[path]) if path in self.files else None

    def read(self, path: str, offset: int, length: int) -> bytes:
        assert offset + length <= len(self.files[path])
        return self.files[path][offset : offset + length]

    def expect(self, ranges: Sequence[Range]) -> None:
        pass


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_inspection_of_damaged_checkpoints(data: st.DataObject) -> None:
    """An overview that is JSON, or FormatError; and nothing is read past the end of a file."""
    files = {f"checkpoint/{name}": raw for name, raw in real_images().items() if name not in ONLY_OF_COUNTER}
    path = data.draw(st.sampled_from(sorted(path for path in files if "pages" not in path)))
    raw = bytearray(files[path])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = inspect(InMemory({**files, path: bytes(raw)}))
    except FormatError:
        return
    json.dumps(found.to_json())


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_messages_of_any_bytes(data: bytes) -> None:
    try:
        message = Message(data, "it")
    except FormatError:
        return
    for number in range(1, 20):
        for ask in (message.uint, message.text, message.raw, message.message):
            try:
                ask(number)
            except FormatError:
                continue


def test_a_record_cannot_make_millions_of_objects() -> None:
    """Field numbers that nobody knows are passed over: a hostile record would make a list for each."""
    fields = b"".join(bytes([number & 0x7F | 0x80, number >> 7 | 0x40]) + b"\0" for number in range(0x100, 0x1FFF, 8))
    message = Message(fields, "it")
    assert not any(number in message for number in range(4000))


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 17 << 20])
def test_sizes_that_are_not_there(size: int) -> None:
    with pytest.raises(FormatError):
        list(records(magic("pstree") + struct.pack("<I", size) + b"x" * 100, "pstree", "pstree.img"))


def test_mappings_that_contradict_each_other() -> None:
    """Ends before starts, overlaps, the end of the address space: a plan all the same."""
    top = (1 << 64) - 4096
    vmas = [{1: a, 2: b, 3: 0, 4: 0, 5: 3, 6: 0x22, 7: 0x201, 8: 0} for a, b in ((9, 3), (top, top + 4096), (0, top))]
    space = image("mm", {**dict.fromkeys(range(1, 13), 0), 14: vmas})  # type: ignore[dict-item]
    images = {
        "pstree.img": image("pstree", {1: 1, 2: 0, 3: 1, 4: 1}, {1: 2, 2: 1, 3: 1, 4: 1}),
        "mm-1.img": space,
        "mm-2.img": space,
        "pagemap-1.img": image("pagemap", {1: 1}) + record({1: top, 2: 1, 4: 4}),
        "pagemap-2.img": image("pagemap", {1: 2}) + record({1: 1, 2: 3, 4: 6}),
    }
    sizes = {"pages-1.img": 4096, "pages-2.img": 3 * 4096}
    for lazy in (False, True):
        for run in plan_restore(images.get, sizes, lazy=lazy).runs():
            assert run.offset + run.length <= sizes[run.file]
