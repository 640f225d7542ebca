"""What `criu restore` reads of a checkpoint, in which order: computed from the images, without a recording.

CRIU's order is fixed by its code and follows from pstree, mm and pagemap. First come the metadata images, then the
pages, in stages that wait for one another:

    fork      pages that must be there when a task forks its children, so that they share them: mappings that the task
              has in common with its parent or a child, level by level; with lazy pages, or a parent checkpoint, all
              that the task needs at once.
    shared    shared memory and memfds: whole, with lazy pages too.
    restore   all else, each task one long read from low to high addresses. Not with lazy pages.
    transfer  only with lazy pages: what `criu lazy-pages` brings while the tasks run, task by task, ascending.

Within a stage the streams are read at the same time, each from front to back. docs/adr/0003-criu-images.md has the
measurements. A pure function: it reads metadata through a callable and starts nothing. Called by prefetch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ckptfs.criu.copy_on_write import filled_before_fork
from ckptfs.criu.images import DEFAULT_LIMITS, parse_name
from ckptfs.criu.memory import Memory
from ckptfs.criu.metadata_order import metadata_order
from ckptfs.criu.mm import Mm, parse_mm
from ckptfs.criu.pagemap import DEFAULT_PAGE_SIZE, LAZY, Pagemap, Run, parse_pagemap
from ckptfs.criu.pstree import Task, parse_ids, parse_pstree, restore_order
from ckptfs.errors import FormatError
from ckptfs.settings import Limits

Read = Callable[[str], bytes | None]
StageName = Literal["fork", "shared", "restore", "transfer"]


class PageRun(NamedTuple):
    """Bytes [offset, offset + length) of a pages file.

    file    name relative to the checkpoint directory ("pages-1.img", "../pre-checkpoint/pages-1.img").
    vaddr   address of the first page; of an offset into the object for shared memory. A run is contiguous in the file,
            not always in memory. -1 where the file could not be read into pages.
    lazy    whether CRIU may leave the pages to its lazy-pages daemon.
    task    pid; 0 for shared memory.
    """

    file: str
    offset: int
    length: int
    vaddr: int
    lazy: bool
    task: int


class Stage(NamedTuple):
    """`streams` are read at the same time, each in its order."""

    name: StageName
    streams: tuple[tuple[PageRun, ...], ...]


class RestorePlan(NamedTuple):
    """`metadata`: existing files but pages, in order. `stages`: the pages, each byte once.

    `opaque`: pages files that stand in the plan whole, because their pages are compressed or their size is wrong.
    """

    metadata: tuple[str, ...]
    stages: tuple[Stage, ...]
    opaque: tuple[str, ...] = ()

    def runs(self) -> Iterator[PageRun]:
        """All runs, streams of a stage one after another."""
        for stage in self.stages:
            for stream in stage.streams:
                yield from stream


def plan_restore(
    read: Read,
    sizes: Mapping[str, int],
    *,
    lazy: bool,
    parents: Sequence[str] = (),
    limits: Limits = DEFAULT_LIMITS,
) -> RestorePlan:
    """What `criu restore` (`--lazy-pages` where `lazy`) reads.

    read     the bytes of a metadata image by its name in the checkpoint directory, None where there is none.
    sizes    every file of the directory (and of the parents, by relative name) with its size.
    parents  directories of the parent checkpoints, nearest first: what the `parent` links lead to, relative to the
             checkpoint directory.

    FormatError when an image is not what it should be; what is only missing makes the plan shorter.
    """
    return _Planner(read, sizes, lazy, tuple(parents), limits).plan()


class _Found(NamedTuple):
    """What the images say of one task."""

    task: Task
    depth: int
    mm: Mm | None
    pagemap: Pagemap | None
    early: set[int]  # positions in mm.vmas of the mappings that are filled before the task forks


class _Planner:
    def __init__(
        self, read: Read, sizes: Mapping[str, int], lazy: bool, parents: tuple[str, ...], limits: Limits
    ) -> None:
        self._read = read
        self.sizes = sizes
        self._lazy = lazy
        self._parents = parents
        self._limits = limits
        self._owners: dict[str, str] = {}  # of pages files, the names of their pagemaps
        self.opaque: list[str] = []

    def plan(self) -> RestorePlan:
        tree = self._read("pstree.img")
        if tree is None:
            return RestorePlan(self._metadata([]), ())
        tasks = parse_pstree(tree, limits=self._limits)
        order = list(restore_order(tasks))
        spaces = {task.pid: mm for task, _ in order if (mm := self._mm(task.pid)) is not None}
        early = filled_before_fork(tasks, spaces)
        found = [
            _Found(task, depth, spaces.get(task.pid), self._pagemap(task.pid), early[task.pid]) for task, depth in order
        ]
        levels: dict[int, list[tuple[PageRun, ...]]] = defaultdict(list)
        restore: list[tuple[PageRun, ...]] = []
        transfer: list[PageRun] = []
        for one in found:
            now, later, lazily = self._private(one)
            levels[one.depth].append(now)
            restore.append(later)
            transfer.extend(lazily)
        stages = [_stage("fork", levels[depth]) for depth in sorted(levels)]
        stages += [_stage("shared", self._shared()), _stage("restore", restore), _stage("transfer", [tuple(transfer)])]
        return RestorePlan(self._metadata(tasks), tuple(stage for stage in stages if stage.streams), tuple(self.opaque))

    def _mm(self, pid: int) -> Mm | None:
        data = self._read(f"mm-{pid}.img")  # a zombie has none
        return parse_mm(data, f"mm-{pid}.img", self._limits) if data is not None else None

    def _pagemap(self, pid: int) -> Pagemap | None:
        data = self._read(f"pagemap-{pid}.img")
        return self._owner(f"pagemap-{pid}.img", data) if data is not None else None

    def _owner(self, name: str, data: bytes) -> Pagemap:
        """A pagemap, to which a pages file belongs: CRIU numbers them as it opens them (criu/image.c)."""
        pagemap = parse_pagemap(data, name, self._limits)
        if (other := self._owners.setdefault(pagemap.file, name)) != name:
            raise FormatError(f"{name}: {pagemap.file} belongs to {other} already")
        return pagemap

    def _private(self, found: _Found) -> tuple[tuple[PageRun, ...], tuple[PageRun, ...], tuple[PageRun, ...]]:
        """The runs of a task's own pages: at fork, at restore, by the lazy-pages daemon."""
        if found.pagemap is None:
            return (), (), ()
        places = _Places(self, found.pagemap, found.task.pid)
        if self._lazy or places.incremental:
            for run in found.pagemap.runs:
                places.add("transfer" if self._lazy and run.flags & LAZY else "fork", run)
        else:
            for run, early in _pieces(found, places.memory.page_size if places.memory else DEFAULT_PAGE_SIZE):
                places.add("fork" if early else "restore", run)
        return places.runs("fork"), places.runs("restore"), places.runs("transfer")

    def _shared(self) -> list[tuple[PageRun, ...]]:
        """A stream for each shared memory object, whole."""
        out = []
        for name in self.sizes:
            kind = parse_name(name)
            if kind is None or kind.kind != "pagemap-shmem" or (data := self._read(name)) is None:
                continue
            pagemap = self._owner(name, data)
            places = _Places(self, pagemap, 0)
            for run in pagemap.runs:
                places.add("shared", run)
            out.append(places.runs("shared"))
        return out

    def parent_pagemaps(self, name: str) -> Iterator[Pagemap]:
        for directory in self._parents:
            data = self._read(f"{directory}/{name}")
            if data is None:
                return
            yield parse_pagemap(data, f"{directory}/{name}", self._limits)

    def _metadata(self, tasks: Sequence[Task]) -> tuple[str, ...]:
        files: dict[int, int] = {}
        for task in tasks:
            if (data := self._read(f"ids-{task.pid}.img")) is not None:
                files[task.pid] = parse_ids(data, f"ids-{task.pid}.img", self._limits).files
        return metadata_order(self.sizes, tasks, files)


class _Places:
    """Collects, stage by stage, where the memory of one task or object lies in the pages files."""

    def __init__(self, planner: "_Planner", pagemap: Pagemap, task: int) -> None:
        self._task = task
        self._out: dict[StageName, dict[int, list[PageRun]]] = defaultdict(lambda: defaultdict(list))
        parents = tuple(planner.parent_pagemaps(pagemap.name))
        self.incremental = bool(parents)
        self.memory: Memory | None = None
        try:
            self.memory = Memory((pagemap, *parents), planner.sizes)
        except FormatError:
            if size := planner.sizes.get(pagemap.file, 0):
                planner.opaque.append(pagemap.file)
                whole = PageRun(pagemap.file, 0, size, -1, False, task)
                self._out["fork" if task else "shared"][0].append(whole)

    def add(self, stage: StageName, run: Run) -> None:
        if self.memory is None:
            return
        lazy = bool(run.flags & LAZY)
        for place in self.memory.find(run.vaddr, run.pages * self.memory.page_size):
            runs = self._out[stage][place.level]
            if runs and runs[-1].offset + runs[-1].length == place.offset and runs[-1].lazy == lazy:
                runs[-1] = runs[-1]._replace(length=runs[-1].length + place.length)  # CRIU reads them in one go, too
            else:
                runs.append(PageRun(place.file, place.offset, place.length, place.vaddr, lazy, self._task))

    def runs(self, stage: StageName) -> tuple[PageRun, ...]:
        """The checkpoint's own file first, then its parents': each is read to its end (criu/pagemap.c)."""
        levels = self._out[stage]
        return tuple(run for level in sorted(levels) for run in levels[level])


def _stage(name: StageName, streams: Sequence[tuple[PageRun, ...]]) -> Stage:
    return Stage(name, tuple(stream for stream in streams if stream))


def _pieces(found: _Found, page_size: int) -> Iterator[tuple[Run, bool]]:
    """The runs cut at the bounds of mappings, each with whether its mapping is filled before the task forks."""
    runs, vmas, position = found.pagemap.runs if found.pagemap else (), found.mm.vmas if found.mm else (), 0
    if not found.early:
        yield from ((run, False) for run in runs)
        return
    for run in runs:
        vaddr, end = run.vaddr, run.vaddr + run.pages * page_size
        while vaddr < end and position < len(vmas):
            vma = vmas[position]
            if vma.end <= vaddr:
                position += 1
                continue
            stop = min(end, vma.end)
            yield Run(vaddr, (stop - vaddr) // page_size, run.flags), position in found.early
            vaddr = stop
