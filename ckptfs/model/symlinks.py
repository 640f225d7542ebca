"""Paths of a layer that lead through its own symbolic links: after `lib -> usr`, `lib/x` is `usr/x`.

So it is wherever a layer is unpacked, by tar, podman or containerd: by itself, in the order of the archive, and without
leaving its root. Links of other layers lead nowhere: there `lib/x` is a directory over the link, as overlayfs has it.
Directories that a link leads to and that are not there are implied, as by containerd; podman and tar refuse the layer.
"""

from typing import TypeAlias

from ckptfs.errors import FormatError
from ckptfs.model.paths import normalise, show
from ckptfs.model.toc import Entry
from ckptfs.settings import Limits

_Links: TypeAlias = "dict[bytes, bytes | _Links]"  # a directory: the targets of links, and directories with links below


class Symlinks:
    """Of one layer, whose entries all pass through `follow`: 100 000 in 0.02 s, in 0.16 s if every tenth is a link."""

    def __init__(self, limits: Limits, prefix: bytes = b"") -> None:
        """`prefix`: the directory that the layer is shown in, which is its root."""
        self._limits = limits
        self._prefix = prefix + b"/" if prefix else b""
        self._top: _Links = {}
        self._last: bytes | None = None  # the last directory asked for: where it is, and the links there if any
        self._where = b""
        self._here: _Links | None = None

    def follow(self, entry: Entry) -> Entry:
        """The entry where it is unpacked. The last part of a path is never followed, that of a hard link's neither."""
        inode, link = entry.inode, entry.link
        target = inode.target if inode is not None else b""
        if not (target or self._top) or not entry.path.startswith(self._prefix):
            return entry
        if link is not None:
            link, found = self._find(link)
            target = found if isinstance(found, bytes) else b""
        path, found = self._find(entry.path)
        if target:
            self._set(path, target)
        elif isinstance(found, bytes) or (found is not None and (inode is None or not inode.is_dir)):
            self._set(path, None)
        return entry if path == entry.path and link == entry.link else Entry(path, inode, link)

    def _find(self, path: bytes) -> "tuple[bytes, bytes | _Links | None]":
        """The path without links on its way, and what is known at its end."""
        inside = path[len(self._prefix) :]
        directory, _, name = inside.rpartition(b"/")
        if directory != self._last:
            self._where, self._here = self._walk(directory)
            self._last = directory
        found = self._here.get(name) if self._here is not None else None
        if self._where == directory:
            return path, found
        there = self._where + b"/" + name if self._where else name
        return self._prefix + normalise(there, self._limits), found

    def _walk(self, directory: bytes) -> "tuple[bytes, _Links | None]":
        ahead = directory.split(b"/")[::-1] if directory else []
        way: list[bytes] = []
        levels: list[_Links | None] = [self._top]
        links, names = 0, len(ahead)  # both bounded: no chain is much dearer than a long path
        while ahead:
            name = ahead.pop()
            if name == b"..":
                if way:  # above the root is the root
                    way.pop()
                    levels.pop()
            elif name and name != b".":
                here = levels[-1]
                found = here.get(name) if here is not None else None
                if isinstance(found, bytes):
                    if found.startswith(b"/"):
                        way, levels = [], [self._top]
                    links, names = links + 1, names + found.count(b"/") + 1
                    if links > self._limits.path_links or names > self._limits.path_depth:
                        raise FormatError(f"the path {show(directory)} leads through links in a circle, or too many")
                    ahead += found.split(b"/")[::-1]
                else:
                    way.append(name)
                    levels.append(found)
        return b"/".join(way), levels[-1]

    def _set(self, path: bytes, target: bytes | None) -> None:
        """A link comes to be at `path`; None: what was there is gone, with all below."""
        *above, name = path[len(self._prefix) :].split(b"/")
        here = self._top
        for part in above:
            below = here.setdefault(part, {})
            assert isinstance(below, dict)  # links on the way have been followed
            here = below
        if target is None:
            del here[name]
        else:
            here[name] = target
        self._last = None
