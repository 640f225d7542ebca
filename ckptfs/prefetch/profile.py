"""What real restores of the image have read, in their order: the recorded profile, in terms of chunks."""

from collections.abc import Iterator

from ckptfs.model.profile import Profile
from ckptfs.model.toc import Chunk, Inode, overlapping
from ckptfs.model.tree import Tree


class Recorded:
    """Whatever the profile names that the image does not have is left out."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def files(self, tree: Tree) -> Iterator[Inode]:
        """The files that the profile names."""
        for path in self._profile.paths:
            node = tree.find(path)
            if node is not None and node.inode is not None and node.inode.is_file:
                yield node.inode

    def plan(self, tree: Tree) -> Iterator[Chunk]:
        inodes: dict[bytes, Inode | None] = {}
        for run in self._profile.runs:
            if run.path not in inodes:
                node = tree.find(run.path)
                inodes[run.path] = node.inode if node is not None else None
            inode = inodes[run.path]
            if inode is not None and inode.is_file:
                for extent in overlapping(inode.extents, run.offset, run.length):
                    yield extent.chunk
