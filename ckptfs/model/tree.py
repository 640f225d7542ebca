"""The merged file tree of an image, built from layers in any order and while they are still being read.

Layers arrive as streams of entries that may interleave: each has a rank, higher hides lower. Adding is commutative over
ranks, so a tree is right at every moment for the layers that have finished; `settled` tells whether an answer can still
change. Only one thread may touch a tree. Whiteouts follow image-spec layer.md: `.wh.NAME` hides NAME and `.wh..wh..opq`
the whole content of lower ranks, never of their own.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from typing import Literal

from ckptfs.errors import FormatError
from ckptfs.model.hidden import Hidden
from ckptfs.model.node import CHILDLESS, Node
from ckptfs.model.paths import show
from ckptfs.model.symlinks import Symlinks
from ckptfs.model.toc import Entry, Inode
from ckptfs.settings import Limits

ROOT_INO = 1
Whiteouts = Literal["merge", "overlay", "plain"]
WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
# overlayfs reads the first only with CAP_SYS_ADMIN, and the second when mounted with userxattr
OPAQUE_XATTR = b"trusted.overlay.opaque" if os.geteuid() == 0 else b"user.overlay.opaque"
_AUFS = b".wh..wh."  # aufs' own files (.wh..wh.plnk, .wh..wh.aufs): metadata of a graph driver, never content


class Tree:
    def __init__(self, *, limits: Limits | None = None) -> None:
        self.inodes: dict[int, Inode] = {}
        self.directories: dict[int, Node] = {}
        self._next_ino = ROOT_INO
        self._limits = limits or Limits()
        self._open: dict[int, bytes] = {}  # rank -> prefix, of layers that are still arriving
        self._undescribed: dict[int, bytes] = {}  # the same, of those whose first entry may describe that directory
        self._hidden = Hidden()
        self._symlinks: dict[int, Symlinks] = {}  # rank -> the layer's own, while it is arriving
        self._opaque: dict[int, list[bytes]] = {}  # rank -> opaque directories of a layer shown as overlayfs has it
        self._awaited: dict[int, dict[bytes, list[bytes]]] = {}  # rank -> target path -> link paths
        # (directory, rank): what the layer has put there since it last had a file in its place
        self._below_file: dict[tuple[Node, int], set[bytes]] = {}
        self._parent_path: bytes | None = None  # the last parent looked up: tars list a directory's files together
        self._parent_rank = -1
        self._parent = self.root = Node(b"", None)
        self._imply(self.root)

    # -- building ------------------------------------------------------------------------------------------------------

    def begin(self, rank: int, prefix: bytes = b"") -> None:
        """A layer starts to arrive; all its paths lie under `prefix`. Ranks are 1 and up, and unique."""
        self._open[rank] = prefix
        self._symlinks[rank] = Symlinks(self._limits, prefix)
        if prefix:
            self._undescribed[rank] = prefix

    def add(self, entries: Iterable[Entry], rank: int, *, whiteouts: Whiteouts = "merge") -> None:
        """Entries of one layer, in archive order; a repeated path replaces the earlier one.

        whiteouts: "merge" applies them to lower ranks; "overlay" shows them as overlayfs has them in a lower directory
        (a character device 0:0; an xattr on an opaque directory); "plain" takes them for files like others.
        """
        symlinks = self._symlinks.get(rank)
        for listed in entries:
            entry = symlinks.follow(listed) if symlinks is not None else listed
            path, inode = entry.path, entry.inode
            if WHITEOUT in path and whiteouts != "plain":
                parent, _, name = path.rpartition(b"/")
                if name.startswith(WHITEOUT):
                    if whiteouts == "merge":
                        self._whiteout(parent, name, rank)
                    else:
                        self._overlay_whiteout(parent, name, rank)
                    continue
            if entry.link is not None:
                self._link(path, entry.link, rank)
            elif inode is not None:
                if inode.target:
                    inode.mode = stat.S_IFLNK | 0o777  # Linux has no others, whatever a header says
                if OPAQUE_XATTR in inode.xattrs:  # only `finish` says so: no header, nor the tree that it was in before
                    inode.xattrs = {key: value for key, value in inode.xattrs.items() if key != OPAQUE_XATTR}
                self._place(path, inode, rank)
            self._undescribed.pop(rank, None)

    def finish(self, rank: int) -> None:
        """The layer is complete. FormatError when it has hard links to files that do not exist."""
        self._open.pop(rank, None)
        self._symlinks.pop(rank, None)
        self._undescribed.pop(rank, None)
        self._parent_path = None
        for path in self._opaque.pop(rank, ()):
            node = self.find(path)
            if node is not None and node.inode is not None and node.inode.is_dir:
                node.inode.xattrs = {**node.inode.xattrs, OPAQUE_XATTR: b"y"}
        # What a link across layers leads to is known when all of them are here, its own too; each is asked for once.
        for waiting in sorted(rank for rank in self._awaited if not any(r <= rank for r in self._open)):
            for target in list(self._awaited[waiting]):
                inode = self._find_below(target, waiting)
                if inode is not None:
                    self._place(target, inode, waiting, alias=True)
            if self._awaited[waiting]:
                target, names = next(iter(self._awaited.pop(waiting).items()))
                raise FormatError(
                    f"hard link {show(names[0])} points to {show(target)}, which the image does not have",
                    hint="the layer is damaged: push the image again",
                )
        if not self._open:
            self._hidden.clear()
            self._below_file.clear()

    # -- asking --------------------------------------------------------------------------------------------------------

    def settled(self, path: bytes, node: Node | None) -> bool:
        """Whether what `path` shows now (`node`, None for nothing) is what it will show when all layers are there.

        A directory that is only implied may still be described by a lower layer, or by what is known of a delta's base.
        That the layer which implies it describes it later, no tool does: that is not waited for, see `lasting`.
        """
        for rank, prefix in self._open.items():
            inside = not prefix or path == prefix or path.startswith(prefix + b"/")
            if inside and (node is None or node.inode is None or node.claim < rank):
                return False
            if inside and node is not None and not node.rank and (prefix or rank < node.claim):
                return False
        return True

    def replaceable(self, node: Node) -> bool:
        """Whether a repeated entry further on in the node's own layer can still put another inode in its place.

        That is not waited for: no tool that makes layers writes any.
        """
        return node.claim in self._open

    def described(self, directory: Node) -> bool:
        """Whether its owner, mode and time are those of the layer it stands for, as far as a first entry tells."""
        return not self._undescribed or directory.path not in self._undescribed.values()

    def marked(self, directory: Node) -> bool:
        """Whether it is known if the directory is opaque: a list of deleted files comes after all entries."""
        return not any(self._open[rank] for rank in self.open_ranks(directory.path))

    def lasting(self, directory: Node) -> bool:
        """Whether owner, mode and time of a directory can change no more: it may be implied until it is described."""
        if not self._open:
            return True
        return self.described(directory) and all(rank <= directory.rank for rank in self.open_ranks(directory.path))

    @property
    def closed(self) -> bool:
        """Whether nothing arrives any more."""
        return not self._open

    def complete(self, path: bytes = b"") -> bool:
        """Whether all names in the directory `path` are known."""
        return not self.open_ranks(path)

    def open_ranks(self, path: bytes) -> list[int]:
        """The layers that are still arriving and could have something at or under `path`."""
        return [r for r, p in self._open.items() if not p or path == p or path.startswith(p + b"/")]

    def find(self, path: bytes) -> Node | None:
        """The visible node at a relative path, without following symlinks; None when there is none."""
        node = self.root
        if path:
            for name in path.split(b"/"):
                if node.inode is None or not node.inode.is_dir:
                    return None
                child = node.children.get(name)
                if child is None:
                    return None
                node = child
        return node if node.inode is not None else None

    def walk(self, top: bytes = b"") -> Iterator[Node]:
        """All visible nodes under `top`, it included, parents first, names sorted."""
        start = self.find(top)
        stack = [start] if start is not None else []
        while stack:
            node = stack.pop()
            yield node
            if node.inode is not None and node.inode.is_dir:
                stack.extend(sorted(node.visible_children(), key=lambda n: n.name, reverse=True))

    def move(self, source: bytes, target: bytes) -> None:
        """Show the directory `source` under the name `target` in the root instead; b"" moves all that the root has.

        Only for a complete tree that nobody has looked at yet. FormatError when the name is taken.
        """
        node = self.find(source)
        if node is None or node.inode is None or target in self.root.children:
            raise FormatError(f"the image has a file {show(target)} where a directory is expected")
        if node is self.root:
            moved = Node(target, self.root)
            self._imply(moved)
            moved.children, self.root.children = self.root.children, {target: moved}
            for child in moved.children.values():
                child.parent = moved
                if child.inode is not None and child.inode.is_dir and moved.inode is not None:
                    moved.inode.nlink += 1
            if moved.inode is not None and self.root.inode is not None:
                attributes = self.root.inode
                moved.inode.mode, moved.inode.uid, moved.inode.gid = attributes.mode, attributes.uid, attributes.gid
                moved.inode.mtime_ns, moved.inode.xattrs = attributes.mtime_ns, attributes.xattrs
                attributes.nlink = 3
        elif node.parent is not None:
            del node.parent.children[node.name]
            if node.parent.inode is not None:
                node.parent.inode.nlink -= 1
            node.name, node.parent = target, self.root
            self.root.children[target] = node
            if self.root.inode is not None:
                self.root.inode.nlink += 1
        self._parent_path = None

    # -- the merge -----------------------------------------------------------------------------------------------------

    def _directory(self, path: bytes, rank: int) -> Node | None:
        """The node of a parent directory, implied where it is new; None when a higher rank hides it."""
        if path == self._parent_path and rank == self._parent_rank:
            return self._parent
        node = self.root
        for name in path.split(b"/") if path else ():
            if rank < node.hide:
                return None
            if self._below_file:
                self._note(node, name, rank)
            child = node.children.get(name)
            if child is None:
                child = node.children[name] = Node(name, node)
            elif rank < child.hide:
                return None
            if child.inode is None or not child.inode.is_dir:
                self._imply(child)
            child.claim = max(child.claim, rank)
            node = child
        if rank < node.hide:
            return None
        self._parent_path, self._parent_rank, self._parent = path, rank, node
        return node

    def _place(self, path: bytes, inode: Inode, rank: int, *, alias: bool = False) -> None:
        """Let `path` show `inode`. `alias`: only resolves waiting hard links, the name itself stays as it is."""
        waiting = self._awaited.get(rank)
        links = waiting.pop(path, ()) if waiting else ()
        if not alias:
            self._claim(path, inode, rank)
        pending = [(link, inode) for link in links]
        while pending:  # a link may itself be the target of others: iterative, chains can be long
            link, target = pending.pop()
            self._claim(link, target, rank)
            if waiting:
                pending.extend((further, target) for further in waiting.pop(link, ()))

    def _claim(self, path: bytes, inode: Inode, rank: int) -> None:
        if not path:
            if inode.is_dir and rank >= self.root.rank:
                self._show(self.root, inode, rank)
            return
        parent_path, _, name = path.rpartition(b"/")
        parent = self._directory(parent_path, rank)
        if parent is None:
            self._hidden.add(path, rank, inode)
            return
        if self._below_file:
            self._note(parent, name, rank)
        node = parent.children.get(name)
        if node is None:
            node = parent.children[name] = Node(name, parent)
        if rank < node.hide:
            self._hidden.add(path, rank, inode)
            return
        if inode.is_dir:
            if node.inode is None or not node.inode.is_dir or rank >= node.rank:
                self._show(node, inode, rank)
        elif rank >= node.claim:
            if self._open and node.inode is not None and node.rank != rank:
                self._hidden.add(path, node.rank, node.inode)
            if node.inode is not None or node.children:  # else it is new: nothing is below, and the parent stays known
                self._hide_below(node, rank, own=True)
            self._show(node, inode, rank)
        else:  # a higher rank has a directory here; it keeps only what is not below this file
            self._hidden.add(path, rank, inode)
            self._hide_below(node, rank, own=True, only=self._below_file.get((node, rank)))
            self._below_file[node, rank] = set()
        node.claim = max(node.claim, rank)

    def _note(self, directory: Node, name: bytes, rank: int) -> None:
        names = self._below_file.get((directory, rank))
        if names is not None:
            names.add(name)

    def _whiteout(self, parent_path: bytes, name: bytes, rank: int) -> None:
        if name.startswith(_AUFS) and name != OPAQUE:
            return
        parent = self._directory(parent_path, rank)
        if parent is None:
            return
        if name == OPAQUE:
            self._hide_below(parent, rank)
            return
        target = name[len(WHITEOUT) :]
        if not target or target in (b".", b".."):
            raise FormatError(f"whiteout {show(name)} names nothing")
        node = parent.children.get(target)
        if node is None:
            node = parent.children[target] = Node(target, parent)
        self._hide_below(node, rank)
        if node.claim < rank:
            self._hide(node)
            node.claim = rank

    def _overlay_whiteout(self, parent_path: bytes, name: bytes, rank: int) -> None:
        if name == OPAQUE:
            if not self._marked_above(parent_path + b"/" + name, rank):
                self._directory(parent_path, rank)  # it may be all that the layer says of the directory
                self._opaque.setdefault(rank, []).append(parent_path)
        elif not name.startswith(_AUFS):
            self.delete(parent_path + b"/" + name[len(WHITEOUT) :] if parent_path else name[len(WHITEOUT) :], rank)

    def delete(self, path: bytes, rank: int) -> None:
        """Show overlayfs's mark of a deleted file at `path`; a directory that the layer makes again becomes opaque."""
        node = self.find(path)
        if node is None and not self._marked_above(path, rank):
            self._place(path, Inode(stat.S_IFCHR), rank)
        self._opaque.setdefault(rank, []).append(path)

    def _marked_above(self, path: bytes, rank: int) -> bool:
        """Whether `rank` marks a directory above `path` as deleted: what was in it needs no mark of its own."""
        while (node := self.find(path := path.rpartition(b"/")[0])) is None and path:
            pass
        inode = node.inode if node is not None and node.rank == rank else None
        return inode is not None and stat.S_ISCHR(inode.mode) and not inode.rdev

    def _hide_below(self, node: Node, rank: int, *, own: bool = False, only: Iterable[bytes] | None = None) -> None:
        """Forget under `node` all that is of ranks below `rank` (and of `rank` too with `own`).

        only  names in `node` below which there can be anything of it, where that is known.
        """
        if not own and node.hide >= rank:
            return
        node.hide = max(node.hide, rank)
        self._parent_path = None
        stack = [node]
        while stack:
            directory = stack.pop()
            names = list(directory.children) if only is None or directory is not node else only
            for name in names:
                child = directory.children.get(name)
                if child is None:
                    continue
                if child.claim < rank or (own and child.claim == rank):
                    self._drop(child)
                    del directory.children[name]
                    continue
                child.hide = max(child.hide, rank)
                if child.inode is not None and child.inode.is_dir:
                    if 0 < child.rank < rank or (own and child.rank == rank):
                        self._imply(child)
                    stack.append(child)
        if 0 < node.rank < rank + own and node.inode is not None and node.inode.is_dir and node.claim >= rank:
            self._imply(node)

    def _drop(self, node: Node) -> None:
        stack = [node]
        while stack:
            victim = stack.pop()
            stack.extend(victim.children.values())
            self._hide(victim)

    def _hide(self, node: Node) -> None:
        inode = node.inode
        if inode is None:
            return
        if inode.is_dir:
            self.directories.pop(inode.ino, None)
            if node.parent is not None and node.parent.inode is not None:
                node.parent.inode.nlink -= 1
        elif self._open:
            self._hidden.add(node.path, node.rank, inode)
        inode.nlink -= 1
        if inode.is_dir or inode.nlink == 0:
            self.inodes.pop(inode.ino, None)
        node.inode = None
        node.rank = 0

    def _imply(self, node: Node) -> None:
        """`node` becomes a directory that no entry describes: owned by root, 0755, time 0."""
        self._show(node, Inode(stat.S_IFDIR | 0o755), 0)

    def _show(self, node: Node, inode: Inode, rank: int) -> None:
        old = node.inode
        if old is not None and old.is_dir and inode.is_dir:
            # The kernel may know the directory by its number: keep it, take over what describes it.
            inode.ino, inode.nlink = old.ino, old.nlink
            self.inodes[inode.ino] = inode
            node.inode, node.rank = inode, rank
            return
        if old is not None:
            self._hide(node)
        if inode.is_dir:
            inode.ino, inode.nlink = self._number(), 2
            self.directories[inode.ino] = node
            if node.children is CHILDLESS:
                node.children = {}
            if node.parent is not None and node.parent.inode is not None:
                node.parent.inode.nlink += 1
        elif inode.ino == 0:
            inode.ino, inode.nlink = self._number(), 1
        else:
            inode.nlink += 1
        self.inodes[inode.ino] = inode
        node.inode, node.rank = inode, rank
        if not inode.is_dir:
            node.hide = max(node.hide, rank)

    def _number(self) -> int:
        number = self._next_ino
        self._next_ino += 1
        return number

    # -- hard links ----------------------------------------------------------------------------------------------------

    def _link(self, path: bytes, target: bytes, rank: int) -> None:
        if path == target:
            raise FormatError(f"hard link {show(path)} points to itself", hint="the layer is damaged")
        inode = self._find_at(target, rank)
        if inode is None:
            self._awaited.setdefault(rank, {}).setdefault(target, []).append(path)
        elif inode.is_dir:
            raise FormatError(f"hard link {show(path)} points to the directory {show(target)}")
        else:
            self._place(path, inode, rank)

    def _find_at(self, path: bytes, rank: int) -> Inode | None:
        """The inode that layer `rank` itself has at `path`."""
        node = self.find(path)
        if node is not None and node.rank == rank:
            return node.inode
        return self._hidden.at(path, rank)

    def _find_below(self, path: bytes, rank: int) -> Inode | None:
        """The inode that the layers below `rank` show at `path`: a link across layers copies up when extracted."""
        node = self.find(path)
        if node is not None and node.rank < rank and node.inode is not None and not node.inode.is_dir:
            return node.inode
        return self._hidden.below(path, rank)
