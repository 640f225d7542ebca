"""The `parent` link of a directory of CRIU images: what it was dumped on top of (criu/image.c: open_parent).

Looks at names and targets of links only, not at what is in an image.
"""

import posixpath

from ckptfs.model.node import Node


def parent_link(directory: Node) -> bytes | None:
    """The target of the link; None without one."""
    link = directory.children.get(b"parent")
    return link.inode.target if link is not None and link.inode is not None else None


def parent_images(directory: Node) -> bytes | None:
    """Where the link leads, as a path in the tree; None without one. There may be nothing."""
    link = parent_link(directory)
    return posixpath.normpath(posixpath.join(directory.path, link)) if link else None
