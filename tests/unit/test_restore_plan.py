"""Which bytes a restore reads, in which order: pagemaps, places in pages files, and the plan over a process tree."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from ckptfs.criu.copy_on_write import filled_before_fork
from ckptfs.criu.memory import Memory, Place
from ckptfs.criu.metadata_order import metadata_order
from ckptfs.criu.mm import MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_HUGETLB, REGULAR, SHADOW_STACK, parse_mm
from ckptfs.criu.pagemap import LAZY, PARENT, PRESENT, PlacedRun, Run, parse_pagemap
from ckptfs.criu.pstree import parse_pstree
from ckptfs.criu.restore_plan import PageRun, RestorePlan, plan_restore
from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.settings import Limits
from tests.support.criu_images import image, magic, mm, pagemap, record, task, unpack_tree, vma

P = 4096
EAGER, LAZILY = PRESENT, PRESENT | LAZY


def plan(images: dict[str, bytes], sizes: dict[str, int], *, lazy: bool, parents: Sequence[str] = ()) -> RestorePlan:
    every = {**{name: len(data) for name, data in images.items()}, **sizes}
    return plan_restore(images.get, every, lazy=lazy, parents=parents)


def stages(found: RestorePlan) -> list[tuple[str, list[list[tuple[str, int, int]]]]]:
    """(name, streams of (file, first page, pages)) of each stage."""
    return [
        (stage.name, [[(run.file, run.offset // P, run.length // P) for run in stream] for stream in stage.streams])
        for stage in found.stages
    ]


# pagemaps


def test_a_pagemap() -> None:
    found = parse_pagemap(pagemap(3, (0x1000, 2, EAGER), (0x5000, 1, PARENT), (0x8000, 4, LAZILY)), "pagemap-9.img")
    assert (found.pages_id, found.file, found.present_pages) == (3, "pages-3.img", 6)
    assert found.page_size(6 * P) == P
    assert list(found.placed(P)) == [PlacedRun(0x1000, 0, 2 * P, False), PlacedRun(0x8000, 2 * P, 4 * P, True)]


def test_pagemaps_of_old_criu_have_no_flags() -> None:
    data = image("pagemap", {1: 1}, {1: 0x1000, 2: 2}, {1: 0x4000, 2: 3, 3: 1}, {1: 0x8000, 2: 1, 3: 0})
    runs = parse_pagemap(data, "pagemap-1.img").runs
    assert runs == (Run(0x1000, 2, PRESENT), Run(0x4000, 3, PARENT), Run(0x8000, 1, PRESENT))


def test_fields_of_a_newer_criu_are_passed_over() -> None:
    data = image("pagemap", {1: 1}, {1: 0x1000, 2: 2, 4: EAGER, 7: b"new", 30: 1}, {6: b"x", 1: 0x9000, 2: 1, 3: 1})
    found = parse_pagemap(data, "pagemap-1.img")
    assert found.runs == (Run(0x1000, 2, PRESENT), Run(0x9000, 1, PARENT)) and not found.opaque


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (magic("pagemap"), "has no head"),
        (magic("pagemap") + b"\x09\0\0\0\x08", "has no head"),
        (pagemap(1, (0x3000, 1, 4), (0x1000, 1, 4)), "overlaps"),
        (pagemap(1, (0x1000, 2, 4), (0x2000, 1, 4)), "overlaps"),
        (pagemap(1, (0x1000, 1 << 60, 4)), "ends past the address space"),
        (pagemap(1, (0x1000, 1, 4))[:-1], "ends in the middle of a record"),
        (pagemap(1) + b"\x02\0\0\0\x08\xff", "ends in the middle of a record"),
        (pagemap(1) + b"\x02\0\0\0\x08\x01", "ends in the middle of a record"),
        (pagemap(1) + b"\x0c\0\0\0\x08" + b"\xff" * 11, "longer than 64 bits"),
        (pagemap(1) + b"\x02\0\0\0\x0f\x01", "wire type"),
    ],
)
def test_what_is_no_pagemap(data: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        parse_pagemap(data, "pagemap-1.img")


def test_runs_are_bounded() -> None:
    data = pagemap(1, (0x1000, 1, 4), (0x3000, 1, 4))
    assert len(parse_pagemap(data, "pagemap-1.img", Limits(criu_records=2)).runs) == 2
    with pytest.raises(LimitExceeded):
        parse_pagemap(data, "pagemap-1.img", Limits(criu_records=1))


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_the_page_size_is_what_fits(page: int) -> None:
    found = parse_pagemap(pagemap(1, (0x10000, 3, EAGER)), "pagemap-1.img")
    assert found.page_size(3 * page) == page


@pytest.mark.parametrize("size", [0, 3 * 4096 - 1, 3 * 8192, 4096])
def test_a_pages_file_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(FormatError, match=r"lists 3 pages, but pages-1\.img has"):
        parse_pagemap(pagemap(1, (0x1000, 3, EAGER)), "pagemap-1.img").page_size(size)


def test_unknown_flags_are_opaque() -> None:
    found = parse_pagemap(pagemap(1, (0x1000, 1, PRESENT | 8)), "pagemap-1.img")
    assert found.opaque
    with pytest.raises(FormatError, match="newer CRIU"):
        found.page_size(4096)


# memory


def test_places_through_parents() -> None:
    own = parse_pagemap(pagemap(1, (0x1000, 2, PARENT), (0x3000, 1, EAGER), (0x9000, 1, PARENT)), "pagemap-5.img")
    old = parse_pagemap(pagemap(7, (0x0, 2, EAGER), (0x2000, 1, PARENT), (0x9000, 1, EAGER)), "up/pagemap-5.img")
    oldest = parse_pagemap(pagemap(2, (0x2000, 1, EAGER)), "up/up/pagemap-5.img")
    sizes = {"pages-1.img": P, "up/pages-7.img": 3 * P, "up/up/pages-2.img": P}
    memory = Memory([own, old, oldest], sizes)
    assert list(memory.find(0x1800, 0x8000)) == [
        Place("up/pages-7.img", 1, 0x1800, P + 0x800, 0x800),
        Place("up/up/pages-2.img", 2, 0x2000, 0, P),
        Place("pages-1.img", 0, 0x3000, 0, P),
        Place("up/pages-7.img", 1, 0x9000, 2 * P, 0x800),
    ]
    assert list(memory.find(0x4000, 0x1000)) == []


def test_the_page_size_of_who_has_no_page_is_his_parents() -> None:
    own = parse_pagemap(pagemap(1, (0x10000, 2, PARENT)), "pagemap-5.img")
    old = parse_pagemap(pagemap(7, (0x10000, 2, EAGER)), "up/pagemap-5.img")
    memory = Memory([own, old], {"pages-1.img": 0, "up/pages-7.img": 2 * 16384})
    assert memory.page_size == 16384
    assert list(memory.find(0x10000, 0x8000)) == [Place("up/pages-7.img", 1, 0x10000, 0, 0x8000)]
    other = parse_pagemap(pagemap(1, (0x10000, 1, EAGER), (0x14000, 1, PARENT)), "pagemap-5.img")
    with pytest.raises(FormatError, match="different sizes"):
        Memory([other, old], {"pages-1.img": P, "up/pages-7.img": 2 * 16384})


def test_memory_whose_files_are_missing() -> None:
    own = parse_pagemap(pagemap(1, (0x1000, 1, PARENT)), "pagemap-5.img")
    with pytest.raises(FormatError, match="needs a parent checkpoint"):
        Memory([own], {})
    with pytest.raises(FormatError, match=r"needs pages-1\.img"):
        Memory([parse_pagemap(pagemap(1, (0x1000, 1, EAGER)), "pagemap-5.img")], {})


# copy on write


def test_mappings_that_may_be_shared() -> None:
    anonymous, file = {"flags": 0x22, "status": 0x201}, {"flags": 0x02, "status": 0x41}
    parent = mm(
        vma(0x1000, 0x2000, **anonymous),
        vma(0x3000, 0x4000, **file, shmid=1),
        vma(0x5000, 0x6000, **anonymous),
        vma(0x8000, 0x9000, flags=0x01, status=0x101),
        vma(0xA000, 0xB000, flags=0x22 | MAP_HUGETLB, status=0x201),
        vma(0xC000, 0xD000, **anonymous),
        vma(0xF000, 0x10000, flags=0x22 | MAP_GROWSDOWN, status=0x201),
    )
    child = mm(
        vma(0x1000, 0x2000, **anonymous),  # shared
        vma(0x3000, 0x4000, **file, shmid=2),  # of another file
        vma(0x5000, 0x7000, **anonymous),  # longer
        vma(0x8000, 0x9000, flags=0x01, status=0x101),  # not private
        vma(0xA000, 0xB000, flags=0x22 | MAP_HUGETLB, status=0x201),  # huge
        vma(0xC000, 0xD000, flags=0x22 ^ MAP_ANONYMOUS, status=0x201),  # not anonymous
        vma(0xF000, 0x10000, **anonymous),  # does not grow
    )
    tasks = parse_pstree(image("pstree", task(1), task(2, 1)))
    spaces = {1: parse_mm(parent, "mm-1.img"), 2: parse_mm(child, "mm-2.img")}
    assert filled_before_fork(tasks, spaces) == {1: {0}, 2: {0}}
    other_program = {1: spaces[1], 2: spaces[2]._replace(executable=5)}
    assert filled_before_fork(tasks, other_program) == {1: set(), 2: set()}
    assert filled_before_fork(tasks, {2: spaces[2]}) == {1: set(), 2: set()}  # the parent is a zombie


def test_mappings_filled_early_for_their_own_sake() -> None:
    space = mm(
        vma(0x1000, 0x2000),
        vma(0x2000, 0x3000, flags=0x22 | MAP_GROWSDOWN),
        vma(0x4000, 0x5000, flags=0x22 | MAP_GROWSDOWN),
        vma(0x6000, 0x7000, status=REGULAR | SHADOW_STACK),
        vma(0x8000, 0x9000, status=1 << 16),  # VMA_AREA_GUARD
    )
    tasks = parse_pstree(image("pstree", task(1)))
    assert filled_before_fork(tasks, {1: parse_mm(space, "mm-1.img")}) == {1: {1, 3}}


# the plan


def single() -> tuple[dict[str, bytes], dict[str, int]]:
    images = {
        "pstree.img": image("pstree", task(5)),
        "ids-5.img": image("ids", {1: 2, 2: 2, 3: 2, 4: 1}),
        "mm-5.img": mm(vma(0x1000, 0x9000), vma(0x10000, 0x20000)),
        "pagemap-5.img": pagemap(1, (0x1000, 2, EAGER), (0x4000, 3, LAZILY), (0x10000, 1, EAGER), (0x12000, 2, LAZILY)),
    }
    return images, {"pages-1.img": 8 * P}


def test_a_single_process_plain() -> None:
    found = plan(*single(), lazy=False)
    assert stages(found) == [
        ("restore", [[("pages-1.img", 0, 2), ("pages-1.img", 2, 3), ("pages-1.img", 5, 1), ("pages-1.img", 6, 2)]])
    ]
    assert next(found.runs()) == PageRun("pages-1.img", 0, 2 * P, 0x1000, False, 5)
    assert [run.lazy for run in found.runs()] == [False, True, False, True]


def test_a_single_process_lazily() -> None:
    assert stages(plan(*single(), lazy=True)) == [
        ("fork", [[("pages-1.img", 0, 2), ("pages-1.img", 5, 1)]]),
        ("transfer", [[("pages-1.img", 2, 3), ("pages-1.img", 6, 2)]]),
    ]


def family() -> tuple[dict[str, bytes], dict[str, int]]:
    """A parent, two children (the younger has a mapping of its own), shared memory, and a zombie."""
    both = vma(0x1000, 0x3000)
    images = {
        "pstree.img": image("pstree", task(1), task(2, 1), task(3, 1), task(4, 1)),
        "mm-1.img": mm(both, vma(0x8000, 0x9000)),
        "mm-2.img": mm(both),
        "mm-3.img": mm(both, vma(0x20000, 0x24000)),
        "pagemap-1.img": pagemap(1, (0x1000, 2, LAZILY), (0x8000, 1, LAZILY)),
        "pagemap-2.img": pagemap(2, (0x1000, 2, LAZILY)),
        "pagemap-3.img": pagemap(3, (0x1000, 1, EAGER), (0x20000, 4, LAZILY)),
        "pagemap-shmem-77.img": pagemap(4, (0, 2, EAGER)),
    }
    return images, {"pages-1.img": 3 * P, "pages-2.img": 2 * P, "pages-3.img": 5 * P, "pages-4.img": 2 * P}


def test_a_family_plain() -> None:
    assert stages(plan(*family(), lazy=False)) == [
        ("fork", [[("pages-1.img", 0, 2)]]),
        ("fork", [[("pages-3.img", 0, 1)], [("pages-2.img", 0, 2)]]),
        ("shared", [[("pages-4.img", 0, 2)]]),
        ("restore", [[("pages-1.img", 2, 1)], [("pages-3.img", 1, 4)]]),
    ]


def test_a_family_lazily() -> None:
    assert stages(plan(*family(), lazy=True)) == [
        ("fork", [[("pages-3.img", 0, 1)]]),
        ("shared", [[("pages-4.img", 0, 2)]]),
        ("transfer", [[("pages-1.img", 0, 3), ("pages-3.img", 1, 4), ("pages-2.img", 0, 2)]]),
    ]


@pytest.mark.parametrize("lazy", [False, True])
def test_every_page_is_in_the_plan_once(lazy: bool) -> None:
    images, sizes = family()
    read = sorted((run.file, run.offset, run.offset + run.length) for run in plan(images, sizes, lazy=lazy).runs())
    assert all(a[2] <= b[1] for a, b in pairwise(read) if a[0] == b[0])
    assert sum(end - start for _, start, end in read) == sum(sizes.values())


@pytest.mark.parametrize("lazy", [False, True])
def test_an_incremental_checkpoint(lazy: bool) -> None:
    images, _ = single()
    images["pagemap-5.img"] = pagemap(1, (0x1000, 2, PARENT), (0x4000, 3, PARENT | LAZY), (0x10000, 1, EAGER))
    images["../pre-checkpoint/pagemap-5.img"] = pagemap(1, (0x1000, 2, EAGER), (0x4000, 4, LAZILY))
    files = {"pages-1.img": P, "../pre-checkpoint/pages-1.img": 6 * P}
    found = stages(plan(images, files, lazy=lazy, parents=["../pre-checkpoint"]))
    old = "../pre-checkpoint/pages-1.img"
    if lazy:
        assert found == [("fork", [[("pages-1.img", 0, 1), (old, 0, 2)]]), ("transfer", [[(old, 2, 3)]])]
    else:
        assert found == [("fork", [[("pages-1.img", 0, 1), (old, 0, 2), (old, 2, 3)]])]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "pages",
    [
        pagemap(1, (0x1000, 2, PRESENT | 8)),  # a flag of a newer CRIU
        pagemap(1, (0x1000, 900, EAGER)),  # more pages than the file has
        pagemap(1, (0x1000, 8, EAGER), (0x10000, 1, PARENT)),  # a parent that is not there
    ],
)
def test_pages_that_cannot_be_told_apart_are_read_whole(pages: bytes, lazy: bool) -> None:
    images, sizes = single()
    found = plan({**images, "pagemap-5.img": pages}, sizes, lazy=lazy)
    assert found.opaque == ("pages-1.img",)
    assert list(found.runs()) == [PageRun("pages-1.img", 0, 8 * P, -1, False, 5)]


def test_what_is_missing_makes_the_plan_shorter() -> None:
    images, sizes = single()
    assert plan({}, sizes, lazy=False) == RestorePlan((), ())
    assert plan(images, {}, lazy=False).stages == ()
    without_mm = {name: data for name, data in images.items() if name != "mm-5.img"}
    assert plan(without_mm, sizes, lazy=False).stages == plan(images, sizes, lazy=False).stages


def test_what_is_wrong_is_refused() -> None:
    images, sizes = single()
    with pytest.raises(FormatError, match=r"pagemap-5\.img"):
        plan({**images, "pagemap-5.img": b"x" * 20}, sizes, lazy=False)


def test_the_order_of_metadata(tmp_path: Path) -> None:
    """As inotify saw criu 4.1.1 open them for the same kind of tree (docs/adr/0003-criu-images.md)."""
    folder = unpack_tree(tmp_path) / "checkpoint"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    found = plan_restore(lambda name: (folder / name).read_bytes() if name in sizes else None, sizes, lazy=False)
    assert " ".join(found.metadata) == (
        "inventory.img pstree.img ids-14400.img ids-14401.img ids-14402.img memfd.img files.img core-14400.img "
        "timens-0.img seccomp.img pipes-data.img sk-queues.img mm-14400.img fdinfo-2.img fs-14400.img mm-14402.img "
        "fdinfo-4.img fs-14402.img mm-14401.img fdinfo-3.img fs-14401.img pagemap-14400.img core-14402.img "
        "pagemap-14402.img core-14401.img pagemap-14401.img pagemap-shmem-1399.img pagemap-shmem-1400.img"
    )


def test_the_order_of_a_containers_metadata() -> None:
    """As inotify saw runc 1.1.5 restore a podman container, but for the tmpfs, whose order is that of the mounts."""
    expected = (
        "descriptors.json inventory.img pstree.img ids-1.img files.img cgroup.img mountpoints-13.img core-1.img "
        "timens-0.img utsns-12.img ipcns-var-11.img tmpfs-dev-42.tar.gz.img tmpfs-dev-45.tar.gz.img seccomp.img "
        "mm-1.img fdinfo-2.img fs-1.img pagemap-1.img"
    )
    names = [*sorted(expected.split()), "pages-1.img", "stats-dump", "../pre-checkpoint/mm-1.img"]
    tasks = parse_pstree(image("pstree", task(1)))
    assert " ".join(metadata_order(names, tasks, {1: 2})) == expected
    assert metadata_order(["dump.log", "future-1.img", "mm-9.img", "mm-1.img"], tasks, {}) == (
        "mm-1.img",
        "mm-9.img",
        "dump.log",
        "future-1.img",
    )


def test_a_record_of_no_pages_is_no_run() -> None:
    data = pagemap(1) + record({1: 0x1000, 2: 0, 4: EAGER}) + record({1: 0x1000, 2: 1, 4: EAGER})
    assert parse_pagemap(data, "pagemap-1.img").runs == (Run(0x1000, 1, EAGER),)
