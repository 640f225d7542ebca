"""CRIU's order, out of the images themselves: what a restore reads next is known before it asks.

The plan of criu/restore_plan.py in terms of chunks. It is made for lazy pages, which suits both kinds of restore: first
what no restore can do without (pages that are not lazy, memory shared between tasks, memfds), then the rest in the
order in which both CRIU's lazy daemon and a plain restore go through it: ascending, task by task.
"""

import os
from collections.abc import Callable, Iterator

from ckptfs.criu.restore_plan import PageRun, RestorePlan, plan_restore
from ckptfs.errors import FormatError
from ckptfs.model.toc import Chunk, Inode, overlapping
from ckptfs.model.tree import Node, Tree

ReadNow = Callable[[Inode], bytes | None]


class RestoreOrder:
    """`read_now` gives a metadata file's bytes if this node has them, else None; asked once, when a plan is made."""

    def __init__(self, read_now: ReadNow, *, eager_only: bool) -> None:
        self._read_now = read_now
        self._eager_only = eager_only

    def plan(self, tree: Tree) -> Iterator[Chunk]:
        """Chunks of the pages files of every checkpoint in the tree; nothing of a checkpoint that cannot be read."""
        for directory in _checkpoints(tree):
            files = {os.fsdecode(path): inode for path, inode in _files(directory)}
            try:
                plan = plan_restore(
                    self._reader(files), {name: inode.size for name, inode in files.items()}, lazy=True, parents=()
                )
            except FormatError:
                continue  # criu will say what is wrong with it; reading in file order is still right
            for run in self._runs(plan):
                inode = files.get(run.file)
                if inode is not None:
                    for extent in overlapping(inode.extents, run.offset, run.length):
                        yield extent.chunk

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


def _checkpoints(tree: Tree) -> Iterator[Node]:
    """Directories that hold CRIU images: checkpoint/ of the root or of a pod's containers."""
    for container in [tree.root, *(node for node in tree.root.visible_children())]:
        node = container.children.get(b"checkpoint")
        if node is not None and b"inventory.img" in node.children:
            yield node


def _files(directory: Node) -> Iterator[tuple[bytes, Inode]]:
    for node in directory.visible_children():
        if node.inode is not None and node.inode.is_file:
            yield node.name, node.inode
