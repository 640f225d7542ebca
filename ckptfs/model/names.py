"""The names of inodes, for people: recordings, logs and status speak of files, the kernel of numbers.

Owns one map, made when somebody asks and again when the tree has grown.
"""

from ckptfs.model.tree import Tree


class InodeNames:
    """The first path of every inode of a tree."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._paths: dict[int, bytes] = {}
        self._known = -1  # inodes that the tree had when the map was made

    def path(self, ino: int) -> bytes:
        """b"" for an inode that is not in the tree."""
        if ino not in self._paths and len(self._tree.inodes) != self._known:
            self._known = len(self._tree.inodes)
            for node in self._tree.walk():
                if node.inode is not None:
                    self._paths.setdefault(node.inode.ino, node.path)
        return self._paths.get(ino, b"")
