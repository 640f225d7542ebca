"""Everything, in the order in which a restore is likely to want it: so that in the end the node has the whole image."""

import re
from collections.abc import Iterator

from ckptfs.model.node import Node
from ckptfs.model.toc import Chunk
from ckptfs.model.tree import Tree
from ckptfs.settings import Sizes

_PAGES = re.compile(rb"pages-(\d+)\.img\Z")
_SMALL = Sizes().small_file


class Metadata:
    """CRIU's images apart from the pages, and the dumps beside them: small, and all are read before the first page.

    CRIU opens about 25 of them one after another (criu/cr-restore.c, measured in docs/); one by one that is 25 round
    trips, together it is one or two requests. An image without CRIU's images has none, however small its files are.
    """

    def plan(self, tree: Tree) -> Iterator[Chunk]:
        for directory in _directories(tree):
            for node in sorted(directory.visible_children(), key=lambda node: node.name):
                inode = node.inode
                if inode is not None and inode.is_file and inode.size <= _SMALL and not _PAGES.match(node.name):
                    for extent in inode.extents:
                        yield extent.chunk


class Background:
    """The whole image: metadata, then pages files by number, then everything else by size."""

    def plan(self, tree: Tree) -> Iterator[Chunk]:
        yield from Metadata().plan(tree)
        files = [node for node in _files(tree) if node.inode is not None]
        for node in sorted(files, key=_urgency):
            if node.inode is not None:
                for extent in node.inode.extents:
                    yield extent.chunk


def _urgency(node: Node) -> tuple[int, int]:
    match = _PAGES.match(node.name)
    if match:
        return 0, int(match[1])
    return 1, node.inode.size if node.inode is not None else 0


def _directories(tree: Tree) -> list[Node]:
    """Those that hold CRIU's images, and those that these lie in."""
    images = [node for node in tree.directories.values() if b"inventory.img" in node.children]
    around = [node.parent for node in images if node.parent is not None]
    return sorted(dict.fromkeys([*images, *around]), key=lambda node: node.path)


def _files(tree: Tree) -> Iterator[Node]:
    return (node for node in tree.walk() if node.inode is not None and node.inode.is_file)
