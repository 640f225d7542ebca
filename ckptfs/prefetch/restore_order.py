"""CRIU's order, out of the images themselves: what a restore reads next is known before it asks.

The plan of criu/restore_plan.py in terms of chunks. It is made for lazy pages, which suits both kinds of restore: first
what no restore can do without (pages that are not lazy, memory shared between tasks, memfds) and, with lazy pages, what
every process touches before it does anything: stacks and data, which are small mappings. Then the rest in the order in
which both CRIU's lazy daemon and a plain restore go through it: ascending, task by task.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile

from ckptfs.criu.restore_plan import PageRun, RestorePlan, plan_restore
from ckptfs.errors import FormatError
from ckptfs.model.node import Node
from ckptfs.model.parents import parent_images
from ckptfs.model.toc import Chunk, Inode, overlapping
from ckptfs.model.tree import Tree
from ckptfs.settings import KiB, Limits

_SHORT = 128 * KiB  # a run of lazy pages that can be a stack or the data of a program
_SMALL = 32 * KiB  # encoded: a chunk that holds little else
_FIRST = 128 * KiB  # encoded, of all such chunks: no more than 5 ms of 200 Mbit/s

_HEAD = 256 * KiB  # of what the lazy-pages daemon goes through: it reads so much before the first process has run

ReadNow = Callable[[Inode], bytes | None]


class RestoreOrder:
    """`read_now` gives a metadata file's bytes if this node has them, else None; asked once, when a plan is made."""

    def __init__(self, read_now: ReadNow, limits: Limits, *, eager_only: bool) -> None:
        self._read_now = read_now
        self._limits = limits
        self._eager_only = eager_only

    def plan(self, tree: Tree) -> Iterator[Chunk]:
        """Chunks of the pages files of every checkpoint in the tree; nothing of a checkpoint that cannot be read."""
        for directory in _checkpoints(tree):
            parents = list(_parents(tree, directory, self._limits.pre_dumps))
            files = dict(_files(directory))
            for name, parent in parents:
                files |= {f"{name}/{file}": inode for file, inode in _files(parent)}
            sizes = {name: inode.size for name, inode in files.items()}
            names = [name for name, _ in parents]
            try:
                plan = plan_restore(self._reader(files), sizes, lazy=True, parents=names, limits=self._limits)
            except FormatError:
                continue  # criu will say what is wrong with it; reading in file order is still right
            yield from _chunks(files, self._runs(plan))
            if self._eager_only:
                short = (run for run in _transfer(plan) if run.length <= _SHORT)
                small = (chunk for chunk in _chunks(files, short) if chunk.size <= _SMALL)
                yield from takewhile(_Budget(_FIRST), small)
                yield from _chunks(files, _head(_transfer(plan), _HEAD))

    def _reader(self, files: dict[str, Inode]) -> Callable[[str], bytes | None]:
        def read(name: str) -> bytes | None:
            inode = files.get(name)
            return self._read_now(inode) if inode is not None else None

        return read

    def _runs(self, plan: RestorePlan) -> Iterator[PageRun]:
        for stage in plan.stages:
            if self._eager_only and stage.name == "transfer":
                return
            for stream in stage.streams:
                yield from stream


class _Budget:
    """True for chunks as long as they are not more than `size` encoded bytes together."""

    def __init__(self, size: int) -> None:
        self._left = size

    def __call__(self, chunk: Chunk) -> bool:
        self._left -= chunk.size
        return self._left >= 0


def _transfer(plan: RestorePlan) -> Iterator[PageRun]:
    for stage in plan.stages:
        if stage.name == "transfer":
            for stream in stage.streams:
                yield from stream


def _head(runs: Iterable[PageRun], size: int) -> Iterator[PageRun]:
    """The first `size` bytes of the runs."""
    for run in runs:
        if size <= 0:
            return
        yield run._replace(length=min(run.length, size))
        size -= run.length


def _chunks(files: dict[str, Inode], runs: Iterable[PageRun]) -> Iterator[Chunk]:
    for run in runs:
        inode = files.get(run.file)
        if inode is not None:
            for extent in overlapping(inode.extents, run.offset, run.length):
                yield extent.chunk


def _checkpoints(tree: Tree) -> Iterator[Node]:
    """Directories that hold CRIU images: checkpoint/ of the root or of a pod's containers."""
    for container in [tree.root, *(node for node in tree.root.visible_children())]:
        node = container.children.get(b"checkpoint")
        if node is not None and b"inventory.img" in node.children:
            yield node


def _parents(tree: Tree, directory: Node, most: int) -> Iterator[tuple[str, Node]]:
    """(name, directory) of the checkpoints that this one was dumped on top of, nearest first, by its `parent` links."""
    for level in range(1, most + 1):
        path = parent_images(directory)
        found = tree.find(path) if path else None
        if found is None:
            return
        directory = found
        yield "/".join(["parent"] * level), directory


def _files(directory: Node) -> Iterator[tuple[str, Inode]]:
    for node in directory.visible_children():
        if node.inode is not None and node.inode.is_file:
            yield os.fsdecode(node.name), node.inode
