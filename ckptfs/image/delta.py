"""The file system delta of a checkpoint as what it is, a layer: out of the tar (and deleted.files) that engines write.

Shown in two ways: beside the tar as an overlay lower directory, and in the root file system view as the top layer. The
tar is not copied: its members' bytes are windows into the image's chunks. One name, three encodings: podman and CRI-O
write a plain tar of what was added or changed and a JSON list of what was deleted; containerd writes a gzip layer with
whiteouts under the same name.
"""

import stat
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from ckptfs.engine.scan import LayerScan
from ckptfs.errors import CkptfsError, LimitExceeded
from ckptfs.image.inner import InodeBlob, within
from ckptfs.image.opened import OpenImage
from ckptfs.image.views import DELETED, Layout, inner_tars
from ckptfs.model.paths import deleted_paths
from ckptfs.model.toc import Entry, Inode
from ckptfs.model.tree import WHITEOUT, Tree, Whiteouts

_TAR = "application/vnd.oci.image.layer.v1.tar"


class DerivedTars:
    """Directories beside the tars of a checkpoint; each is filled when somebody first looks into it."""

    def __init__(self, image: OpenImage, base: Callable[[], Awaitable[Tree | None]]) -> None:
        """`base`: what is known of the directories that the delta was taken from."""
        self._image = image
        self._base = base
        self._seen: set[bytes] = set()

    def look(self) -> None:
        """Give the tars that have become visible their directories."""
        image = self._image
        if complete := image.tree.complete():
            image.arrived = None  # what comes now is out of these tars
        if image.layout == Layout.NONE:
            return
        for path, inode in list(inner_tars(image.tree, complete=complete)):
            directory = path.removesuffix(b".tar")
            if path in self._seen:
                continue
            self._seen.add(path)
            if image.tree.find(directory) is None:
                delta = directory.rpartition(b"/")[2] == b"rootfs-diff"
                deleted = directory.removesuffix(b"rootfs-diff") + DELETED if delta else None
                base = self._base if delta else None
                Unpacked(image, image.tree, directory, inode, "overlay", deleted, base).later()


class Unpacked:
    """The members of a tar that is a file of the image, shown under `directory` of `tree` (b"": its root)."""

    def __init__(
        self,
        image: OpenImage,
        tree: Tree,
        directory: bytes,
        inode: Inode,
        whiteouts: Whiteouts,
        deleted: bytes | None = None,
        base: Callable[[], Awaitable[Tree | None]] | None = None,
    ) -> None:
        """`deleted`: the path of the list of deleted files in the image's tree, if the tar can have one.

        base   gives directories that the tar only leads through their owners and modes.
        """
        from ckptfs.layers.tar import TarFormat  # not for images without a tar inside

        self._image = image
        self._tree = tree
        self._directory = directory
        self._inode = inode
        self._whiteouts = whiteouts
        self._deleted = deleted
        self._base = base
        self._rank = image.next_rank
        if directory:
            tree.add([Entry(directory, Inode(stat.S_IFDIR | 0o755, mtime_ns=inode.mtime_ns))], self._rank)
        tree.begin(self._rank, directory)
        blob = InodeBlob(image.reader, inode, _TAR)
        layer = TarFormat().open(blob, image.fetcher.next_layer, image.options.settings)
        self._scan = LayerScan(layer, image.fetcher, self._arrived, self._ended)
        image.add_scan(self._rank, self._scan)

    def later(self) -> None:
        """Read the tar when somebody looks into the directory."""
        self._scan.dormant = True
        self._image.dormant[self._directory] = self.now

    def now(self) -> None:
        """Read the tar."""
        self._scan.dormant = False
        self._image.nursery.start_soon(self._read)

    async def _read(self) -> None:
        from ckptfs.layers.compression import MAGIC_BYTES, sniff

        image, rank = self._image, self._rank
        try:
            compression = sniff(await image.read(self._inode, 0, MAGIC_BYTES))
            if compression == "none":
                await self._scan.run()
                return
            blob = InodeBlob(image.reader, self._inode, f"{_TAR}+{compression}")
            image.add_layer(blob, rank, tree=self._tree, prefix=self._directory, whiteouts=self._whiteouts)
        except CkptfsError as error:
            image.finish(self._tree, rank, error, self.now)

    def _arrived(self, batch: list[Entry]) -> None:
        members = [within(entry, self._inode, self._directory) for entry in batch]
        self._image.add_entries(self._tree, members, self._rank, self._whiteouts)

    def _ended(self, error: CkptfsError | None) -> None:
        if error is None and self._deleted is not None:
            self._image.nursery.start_soon(self._delete, self._deleted)
        else:
            self._image.finish(self._tree, self._rank, error, self._scan.run_on)

    async def _delete(self, name: bytes) -> None:
        """The list of deleted files becomes whiteouts; what the tar has again wins."""
        failure: CkptfsError | None = None
        try:
            gone = [self._within(path) for path in await self._deleted_paths(name)]
            for path in filter(self._can_be_deleted, gone):
                if self._whiteouts == "overlay":
                    self._tree.delete(path, self._rank)
                else:
                    head, slash, last = path.rpartition(b"/")
                    mark = Entry(head + slash + WHITEOUT + last, Inode(stat.S_IFREG))
                    self._tree.add([mark], self._rank, whiteouts="merge")
            if self._base is not None:
                self._describe(await self._base(), set(gone))
        except CkptfsError as error:
            failure = error
        again = partial(self._image.nursery.start_soon, self._delete, name)
        self._image.finish(self._tree, self._rank, failure, again)

    def _within(self, path: bytes) -> bytes:
        return self._directory + b"/" + path if self._directory else path

    def _can_be_deleted(self, path: bytes) -> bool:
        """Not what a new file that is no directory hides anyway: the tar has it in place of one above."""
        while len(path := path.rpartition(b"/")[0]) > len(self._directory):
            above = self._tree.find(path)
            if above is not None and above.rank == self._rank:
                return above.inode is None or above.inode.is_dir
        return True

    def _describe(self, base: Tree | None, deleted: set[bytes]) -> None:
        """Directories that are only implied are the base's, unless they were made anew after a deletion."""
        implied, anew = [], deleted
        for node in self._tree.walk(self._directory) if base is not None else ():
            path = node.path
            if path in deleted or path.rpartition(b"/")[0] in anew:
                anew.add(path)
            elif node.inode is not None and node.inode.is_dir and not node.rank:
                implied.append(path)
        for path in implied:
            found = base.find(path[len(self._directory) + 1 :]) if base is not None else None
            if found is not None and found.inode is not None and found.inode.is_dir and found.rank:
                self._tree.add([Entry(path, replace(found.inode))], self._rank)

    async def _deleted_paths(self, name: bytes) -> list[bytes]:
        node = await self._image.find_in_checkpoint(name)
        if node is None or node.inode is None or not node.inode.is_file:
            return []
        size, limits = node.inode.size, self._image.options.settings.limits
        if size > limits.deleted_files_bytes:
            raise LimitExceeded(f"deleted.files has {size} bytes, more than {limits.deleted_files_bytes}")
        return deleted_paths(bytes(await self._image.read(node.inode, 0, size)), limits)
