"""What real restores of the image have read, in their order: the recorded profile, in terms of chunks and cells.

A working set is scattered: of a chunk of 256 KiB one page, mostly. Where the image tells the cells of its pages files
(16 KiB each), a chunk of which less than half is needed is taken apart, and only the cells that are needed are fetched.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from ckptfs.model.profile import Profile, Run
from ckptfs.model.toc import Chunk, Extent, Inode, overlapping
from ckptfs.model.tree import Tree

Cells = Mapping[Inode, Sequence[Extent]]  # of a file: the same bytes as its extents, in smaller pieces


class Recorded:
    """Whatever the profile names that the tree does not have is left out. The files' chunks must be known."""

    def __init__(self, profile: Profile, tree: Tree) -> None:
        self._runs: list[tuple[Inode, Run]] = []
        self._of: dict[Inode, list[Run]] = defaultdict(list)
        self._apart: Mapping[bytes, Sequence[Extent]] = {}
        inodes: dict[bytes, Inode | None] = {}
        for path in profile.paths:
            node = tree.find(path)
            inodes[path] = node.inode if node is not None else None
        for run in profile.runs:
            inode = inodes[run.path]
            if inode is not None and inode.is_file:
                self._runs.append((inode, run))
                self._of[inode].append(run)

    @property
    def files(self) -> Sequence[Inode]:
        """The files that the profile names."""
        return list(self._of)

    def spare(self, inode: Inode) -> int:
        """About how many encoded bytes of the chunks would be fetched for nothing, without cells."""
        sizes: dict[bytes, float] = {}
        for run in self._of[inode]:
            for extent in overlapping(inode.extents, run.offset, run.length):
                key, size = extent.chunk.key, extent.chunk.size
                sizes[key] = sizes.get(key, size) - size * _common(extent, run) / extent.length
        return int(sum(sizes.values()))

    def take_apart(self, cells: Cells) -> Mapping[bytes, Sequence[Extent]]:
        """Plan with cells where less than half of a chunk is needed; returns the keys of such, with all their cells."""
        needed: dict[bytes, set[bytes]] = defaultdict(set)
        inside: dict[bytes, Sequence[Extent]] = {}
        sizes: dict[bytes, int] = {}
        for inode, run in self._runs:
            if inode not in cells:
                continue
            for extent in overlapping(inode.extents, run.offset, run.length):
                key = extent.chunk.key
                if key not in inside:
                    found = list(overlapping(cells[inode], extent.start, extent.length))
                    inside[key] = found if len(found) > 1 and all(_within(cell, extent) for cell in found) else ()
                    sizes[key] = extent.chunk.size
                needed[key].update(c.chunk.key for c in overlapping(inside[key], run.offset, run.length))
        self._apart = {
            key: found
            for key, found in inside.items()
            if found and 2 * sum(c.chunk.size for c in found if c.chunk.key in needed[key]) < sizes[key]
        }
        return self._apart

    def plan(self) -> Iterator[Chunk]:
        for inode, run in self._runs:
            for extent in overlapping(inode.extents, run.offset, run.length):
                apart = self._apart.get(extent.chunk.key)
                if apart is None:
                    yield extent.chunk
                else:
                    yield from (cell.chunk for cell in overlapping(apart, run.offset, run.length))


def _common(extent: Extent, run: Run) -> int:
    return min(extent.start + extent.length, run.offset + run.length) - max(extent.start, run.offset)


def _within(inner: Extent, outer: Extent) -> bool:
    return outer.start <= inner.start and inner.start + inner.length <= outer.start + outer.length
