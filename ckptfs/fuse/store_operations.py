"""FUSE requests to an additional layer store: two levels of directories, and below them the layers of open images.

DIR/<base64 of a reference>/<digest of a layer>/{diff,info,blob}, as containers/storage looks them up; nothing is asked
of a registry before the second level. An image's inodes have its slot in their upper bits, and what is asked of them is
handed on to its own `Operations`. An image stays open as long as the kernel knows an inode of it.
Its user counts layers in a way of its own (drivers/overlay/overlay.go: notifyUseAdditionalLayer,
notifyReleaseAdditionalLayer): creating `use` in a layer's directory is one more user, removing the directory one less,
and both want ENOENT for an answer.
"""

import errno
import os
import stat
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NoReturn

import pyfuse3

from ckptfs.engine.reader import Handle
from ckptfs.fuse.answers import Answering, answers
from ckptfs.fuse.operations import DOTS, NAME_BYTES, Operations
from ckptfs.image.layer_directories import DIFF, INFO, ROOT_MODE
from ckptfs.image.layer_store import LayerStore, StoredImage, digest_of, name_of, reference_of
from ckptfs.model.oci import Reference
from ckptfs.model.toc import Inode
from ckptfs.model.tree import OPAQUE_XATTR, ROOT_INO

_SLOT = 40  # bits of an inode number below the slot: no image has so many inodes
_SECOND = 1.0  # that the kernel may keep the name of a layer: an image that broke is opened anew after that
_USE = b"use"
# overlayfs asks for the first, and in a user namespace for the second
_OPAQUE = (b"trusted.overlay.opaque", b"user.overlay.opaque")


class StoreOperations(Answering):
    """Operations over a LayerStore."""

    def __init__(self, store: LayerStore, started_ns: int) -> None:
        super().__init__(store.errors)
        self._store = store
        self._time_ns = started_ns
        self._images: dict[int, Operations] = {}
        self._references: dict[int, tuple[bytes, Reference]] = {}  # the first level: inode -> name, reference
        self._known: dict[int, int] = {}  # how often the kernel was told of them
        self._numbers: dict[bytes, int] = {}
        self._next = ROOT_INO + 1
        self._listings: dict[int, list[tuple[bytes, pyfuse3.EntryAttributes]]] = {}

    # -- for the session -----------------------------------------------------------------------------------------------

    def first_file(self) -> bytes:
        return b""

    def quiesce(self) -> None:
        for stored in self._store.images():
            stored.image.quiesce()

    async def drained(self) -> None:
        await self._store.reads.drained()

    def handles(self, stored: StoredImage) -> Collection[Handle]:
        """The files of the image that are open."""
        operations = self._images.get(stored.slot)
        return operations.handles if operations is not None else ()

    # -- names ---------------------------------------------------------------------------------------------------------

    @answers
    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if parent == ROOT_INO:
            if (reference := reference_of(name)) is None:
                raise pyfuse3.FUSEError(errno.ENOENT)
            number = self._reference(name, reference)  # whether there is such an image, its layers tell
            self._told(number)
            return self._directory(number)
        if parent in self._references:
            _, reference = self._references[parent]
            if (digest := digest_of(name)) is None or (stored := await self._store.find(reference, digest)) is None:
                raise pyfuse3.FUSEError(errno.ENOENT)
            found = await self._operations(stored).lookup(self._number(stored, ROOT_INO), name, ctx)
            found.entry_timeout = _SECOND
            return found
        operations, layer = self._owner(parent), self._layer(parent)
        if layer is not None and name == _USE:
            raise pyfuse3.FUSEError(errno.ENOENT)  # and the kernel keeps no negative entry
        if layer is not None and name == DIFF:
            await self._stored(parent).directories.readable(layer)
        return await operations.lookup(parent, name, ctx)

    @answers
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if inode == ROOT_INO or inode in self._references:
            return self._directory(inode)
        return await self._owner(inode).getattr(inode, ctx)

    @answers
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._owner(inode).readlink(inode, ctx)

    @answers
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        if inode != ROOT_INO and inode not in self._references:
            if self._layer(inode) is not None:  # `info` is made when it is looked for
                stored = self._stored(inode)
                await stored.image.lookup(stored.image.tree.directories[inode - self._number(stored, 0)], INFO)
            return await self._owner(inode).opendir(inode, ctx)
        number, self._next = self._next, self._next + 1
        self._listings[number] = self._listing(inode)
        return number

    @answers
    async def readdir(self, handle: int, start: int, token: Any) -> None:
        if handle >> _SLOT:
            await self._owner(handle).readdir(handle, start, token)
            return
        listing = self._listings[handle]
        for position in range(start, len(listing)):
            name, attributes = listing[position]
            if not pyfuse3.readdir_reply(token, name, attributes, position + 1):
                return
            if name in DOTS:
                continue
            if attributes.st_ino >> _SLOT:
                self._owner(attributes.st_ino).references += 1
            else:
                self._told(attributes.st_ino)

    @answers
    async def releasedir(self, handle: int) -> None:
        if handle >> _SLOT:
            await self._owner(handle).releasedir(handle)
        else:
            self._listings.pop(handle, None)

    # -- users ---------------------------------------------------------------------------------------------------------

    @answers
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        layer = self._layer(parent)
        if layer is None or name != _USE or (digest := digest_of(layer)) is None:
            raise pyfuse3.FUSEError(errno.EROFS)
        await self._store.use(self._stored(parent).reference, digest)
        raise pyfuse3.FUSEError(errno.ENOENT)

    @answers
    async def rmdir(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        if parent not in self._references or (digest := digest_of(name)) is None:
            raise pyfuse3.FUSEError(errno.EROFS)
        await self._store.release(self._references[parent][1], digest)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def _refuse(self, *_: Any) -> NoReturn:
        """Nothing here is written. (The mount is not read-only: the kernel would not hand on the above.)"""
        raise pyfuse3.FUSEError(errno.EROFS)

    mknod = mkdir = unlink = symlink = rename = link = _refuse  # type: ignore[assignment]
    setattr = setxattr = removexattr = write = _refuse  # type: ignore[assignment]

    # -- bytes, and the rest -------------------------------------------------------------------------------------------

    @answers
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        operations, stored = self._owner(inode), self._stored(inode)
        found = stored.image.tree.inodes.get(inode - self._number(stored, 0))
        if found is not None and found.is_file and stored.directories.prepare(found):
            self._store.read(stored)
        return await operations.open(inode, flags, ctx)

    @answers
    async def read(self, handle: int, offset: int, size: int) -> bytes:
        return await self._images[handle >> _SLOT].read(handle, offset, size)

    @answers
    async def flush(self, handle: int) -> None:
        return None

    @answers
    async def release(self, handle: int) -> None:
        await self._images[handle >> _SLOT].release(handle)

    @answers
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if not inode >> _SLOT:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return await self._owner(inode).getxattr(inode, OPAQUE_XATTR if name in _OPAQUE else name, ctx)

    @answers
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return await self._owner(inode).listxattr(inode, ctx) if inode >> _SLOT else []

    @answers
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        out = pyfuse3.StatvfsData()
        out.f_bsize = out.f_frsize = 4096
        out.f_blocks = sum(stored.image.image_bytes for stored in self._store.images()) // 4096
        out.f_files = sum(len(stored.image.tree.inodes) for stored in self._store.images())
        out.f_namemax = NAME_BYTES
        return out

    @answers
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # default_permissions: the kernel has judged by mode and owner already

    async def forget(self, inode_list: Any) -> None:
        for inode, count in inode_list:
            if inode >> _SLOT:
                if (operations := self._images.get(inode >> _SLOT)) is not None:
                    await operations.forget([(inode, count)])
            elif inode in self._known:
                self._known[inode] -= count
                if self._known[inode] <= 0:
                    name, _ = self._references.pop(inode)
                    del self._known[inode], self._numbers[name]

    # -- translation ---------------------------------------------------------------------------------------------------

    def _reference(self, name: bytes, reference: Reference) -> int:
        """The number of an image's directory."""
        inode = self._numbers.get(name)
        if inode is None:
            inode, self._next = self._next, self._next + 1
            self._numbers[name], self._references[inode] = inode, (name, reference)
        return inode

    def _told(self, inode: int) -> None:
        """The kernel is told of one of our own directories."""
        if inode != ROOT_INO:
            self._known[inode] = self._known.get(inode, 0) + 1

    def _listing(self, inode: int) -> list[tuple[bytes, pyfuse3.EntryAttributes]]:
        """What is open: of the store its images, of an image its layers."""
        listing = {b".": self._directory(inode), b"..": self._directory(ROOT_INO)}
        if inode == ROOT_INO:
            found = {name_of(stored.reference): stored.reference for stored in self._store.images()}
            listing |= {name: self._directory(self._reference(name, found[name])) for name in found}
        for stored in self._store.images(self._references[inode][1]) if inode != ROOT_INO else ():
            for node in stored.image.tree.root.visible_children():
                if node.inode is not None:
                    listing[node.name] = self._operations(stored).attributes(node.inode)
                    listing[node.name].entry_timeout = _SECOND
        return sorted(listing.items(), key=lambda entry: entry[0])

    def _operations(self, stored: StoredImage) -> Operations:
        operations = self._images.get(stored.slot)
        if operations is None:
            for slot in [slot for slot in self._images if self._store.image(slot) is None]:
                del self._images[slot]  # closed: the kernel knew nothing of it any more
            operations = self._images[stored.slot] = _LayerOperations(stored.image, self._number(stored, 0))
            stored.held = partial(_held, operations)
        return operations

    def _number(self, stored: StoredImage, inode: int) -> int:
        return (stored.slot << _SLOT) + inode

    def _owner(self, number: int) -> Operations:
        """Who answers for an inode, or for a handle, of an image."""
        operations = self._images.get(number >> _SLOT)
        if operations is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return operations

    def _stored(self, inode: int) -> StoredImage:
        stored = self._store.image(inode >> _SLOT)
        if stored is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return stored

    def _layer(self, inode: int) -> bytes | None:
        """The name of the layer whose directory this is; None where it is no such directory."""
        stored = self._store.image(inode >> _SLOT)
        if stored is None:
            return None
        node = stored.image.tree.directories.get(inode - self._number(stored, 0))
        return stored.directories.layer(node) if node is not None else None

    def _directory(self, inode: int) -> pyfuse3.EntryAttributes:
        """The attributes of a directory that is ours."""
        out = pyfuse3.EntryAttributes()
        out.st_ino, out.generation = inode, 0
        out.entry_timeout = out.attr_timeout = _SECOND
        out.st_mode, out.st_nlink = stat.S_IFDIR | 0o755, 2
        out.st_uid, out.st_gid = os.geteuid(), os.getegid()
        out.st_size, out.st_blksize, out.st_blocks = 0, 4096, 0
        out.st_atime_ns = out.st_mtime_ns = out.st_ctime_ns = self._time_ns
        return out


class _LayerOperations(Operations):
    """Operations over the layers of one image."""

    def attributes(self, inode: Inode) -> pyfuse3.EntryAttributes:
        out = super().attributes(inode)
        node = self._tree.directories.get(inode.ino)
        if node is not None and node.name == DIFF and node.parent is not None and node.parent.parent is self._tree.root:
            out.st_mode, out.st_uid, out.st_gid = ROOT_MODE, os.geteuid(), os.getegid()
        return out


def _held(operations: Operations) -> bool:
    return operations.references > 0 or bool(operations.handles)
