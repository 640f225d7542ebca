"""A name in a directory of the merged tree: what it shows, and what the layers have said of it. Owned by tree.py."""

from collections.abc import Iterator

from ckptfs.model.toc import Inode

CHILDLESS: "dict[bytes, Node]" = {}  # what is no directory has this one, never changed: 64 bytes for each file else


class Node:
    """A name in a directory.

    inode     what the name shows; None while it only remembers that lower ranks are hidden.
    rank      the layer that `inode` is from; 0 for a directory that is only implied by a path below it.
    claim     the highest rank that said anything about this name.
    hide      ranks below it are hidden here and everywhere beneath.
    children  by name; only a directory's are visible.
    """

    __slots__ = ("children", "claim", "hide", "inode", "name", "parent", "rank")

    def __init__(self, name: bytes, parent: "Node | None") -> None:
        self.name = name
        self.parent = parent
        self.inode: Inode | None = None
        self.rank = 0
        self.claim = 0
        self.hide = 0
        self.children = CHILDLESS

    @property
    def path(self) -> bytes:
        parts: list[bytes] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return b"/".join(reversed(parts))

    def visible_children(self) -> Iterator["Node"]:
        return (child for child in self.children.values() if child.inode is not None)
