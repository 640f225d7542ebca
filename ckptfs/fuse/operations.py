"""FUSE requests translated into questions to an open image.

All answers are immutable: the mount is pinned to a digest, so the kernel may keep entries, attributes, absences and
pages for as long as it likes. Errors become errno in answers.py.
"""

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any, cast

import pyfuse3

from ckptfs.engine.reader import Handle
from ckptfs.fuse.answers import Answering, answers
from ckptfs.fuse.callers import Access, access_of
from ckptfs.image import OpenImage
from ckptfs.model.names import InodeNames
from ckptfs.model.node import Node
from ckptfs.model.toc import Inode
from ckptfs.model.tree import OPAQUE_XATTR
from ckptfs.settings import Limits, MiB
from ckptfs.terminal import printable

_FOREVER = 3600.0 * 24 * 365  # seconds; as nydus does: nothing ever changes under a pinned digest
# The same for a name that may get another inode. The kernel could be told to forget it (pyfuse3.invalidate_entry): that
# waits, uninterruptibly, for look-ups in the same directory, and if we are killed then neither ever ends.
_BRIEFLY = 1.0
_BLOCK = 512
DOTS = (b".", b"..")
NAME_BYTES = Limits().name_bytes
_LARGE = 1 * MiB  # smaller files are hardly worth a look at who opens them


def _may_show(xattr: bytes) -> bool:
    """Whether an attribute is the image's business; the others would act on the kernel of whoever mounts or copies it.

    trusted.overlay.* and user.overlay.* steer overlayfs (but for the mark of opaque directories, which is our own),
    security.* the node's security modules; file capabilities belong to the file.
    """
    if xattr == OPAQUE_XATTR or xattr == b"security.capability":
        return True
    return xattr.startswith(b"user.") and not xattr.startswith(b"user.overlay.")


class Operations(Answering):
    """Read-only operations over one image."""

    def __init__(self, image: OpenImage, base: int = 0) -> None:
        """`base` is added to the image's inode numbers: several images can be shown by one session."""
        super().__init__(image.errors)
        self.image = image
        self._tree = image.tree
        self.names = InodeNames(image.tree)
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, list[tuple[bytes, Node]]] = {}
        self._next_handle = base + 1
        self._base = base
        self.references = 0  # how often the kernel has been told of an inode and has not forgotten it
        # As an extraction by an ordinary user gives it: checkpoints are 0600, root's would be closed to who mounted.
        self._owner = None if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        image.distrusted = self._distrusted

    @property
    def handles(self) -> Collection[Handle]:
        """The files that are open."""
        return self._handles.values()

    def subject(self, operation: str, arguments: Sequence[Any]) -> tuple[str, str]:
        if operation == "read":
            number, offset, size = arguments
            handle = self._handles[number]
            handle.path = handle.path or self.names.path(handle.inode.ino)
            return printable(os.fsdecode(handle.path)), f" at {offset} ({min(size, handle.inode.size - offset)} bytes)"
        path = self.names.path(arguments[0] - self._base)
        if operation == "lookup":
            path = path + b"/" + arguments[1] if path else arguments[1]
        return printable(os.fsdecode(path or b"/")), ""

    # -- for the session -----------------------------------------------------------------------------------------------

    def first_file(self) -> bytes:
        usual = (self._tree.find(path) for path in (b"checkpoint/inventory.img", b"config.dump"))
        for node in chain(filter(None, usual), self._tree.walk()):
            if node.inode is not None and node.inode.is_file and self._tree.settled(path := node.path, node):
                return path
        return b""

    def quiesce(self) -> None:
        self.image.quiesce()

    async def drained(self) -> None:
        await self.image.reader.counters.drained()

    # -- names ---------------------------------------------------------------------------------------------------------

    @answers
    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        directory = self._directory(parent)
        if name == b".":
            return self._told(self._inode(parent))
        if name == b"..":
            up = directory.parent or directory
            return self._told(cast("Inode", up.inode))
        if len(name) > NAME_BYTES:
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        node = await self.image.lookup(directory, name)
        if node is None or node.inode is None:
            # Number 0 is a negative entry that the kernel keeps: CRIU asks for a dozen images that do not exist.
            absent = pyfuse3.EntryAttributes()
            absent.st_ino = 0
            absent.entry_timeout = _FOREVER
            return absent
        told = self._told(node.inode)
        if self._tree.replaceable(node):
            told.entry_timeout = _BRIEFLY
        return told

    @answers
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if (directory := self._tree.directories.get(inode - self._base)) is not None:
            await self.image.describe(directory)
        return self.attributes(self._inode(inode))

    @answers
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        found = self._inode(inode)
        if not stat.S_ISLNK(found.mode):
            raise pyfuse3.FUSEError(errno.EINVAL)
        return found.target

    @answers
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        directory = self._directory(inode)
        number = self._number()
        listing = [(node.name, node) for node in await self.image.listing(directory)]
        self._listings[number] = [(b".", directory), (b"..", directory.parent or directory), *listing]
        return number

    @answers
    async def readdir(self, handle: int, start: int, token: Any) -> None:
        listing = self._listings[handle]
        for position in range(start, len(listing)):
            name, node = listing[position]
            if node.inode is None:
                continue
            if not pyfuse3.readdir_reply(token, name, self.attributes(node.inode), position + 1):
                return
            self.references += name not in DOTS  # the kernel knows these two

    @answers
    async def releasedir(self, handle: int) -> None:
        self._listings.pop(handle, None)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    @answers
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise pyfuse3.FUSEError(errno.EROFS)
        found = self._inode(inode)
        if not found.is_file:
            raise pyfuse3.FUSEError(errno.EINVAL)
        number = self._number()
        handle = self._handles[number] = await self.image.open(found)
        handle.pid = ctx.pid
        access = await access_of(ctx.pid) if found.size >= _LARGE else Access.CACHED
        handle.paging = access is Access.LAZILY
        return pyfuse3.FileInfo(fh=number, keep_cache=True, direct_io=access is not Access.CACHED)

    @answers
    async def read(self, handle: int, offset: int, size: int) -> bytes:
        # pyfuse3 takes any buffer and sends it as it is; a copy into bytes would cost as much as the request.
        return cast("bytes", await self.image.reader.serve(self._handles[handle], offset, size))

    @answers
    async def flush(self, handle: int) -> None:
        return None

    @answers
    async def release(self, handle: int) -> None:
        self._handles.pop(handle, None)

    # -- the rest ------------------------------------------------------------------------------------------------------

    @answers
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if name == OPAQUE_XATTR and (directory := self._tree.directories.get(inode - self._base)) is not None:
            await self.image.mark(directory)
        value = self._inode(inode).xattrs.get(name)
        if value is None or not _may_show(name):
            raise pyfuse3.FUSEError(errno.ENODATA)
        return value

    @answers
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        if (directory := self._tree.directories.get(inode - self._base)) is not None:
            await self.image.mark(directory)
        return [name for name in self._inode(inode).xattrs if _may_show(name)]

    @answers
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        out = pyfuse3.StatvfsData()
        out.f_bsize = out.f_frsize = 4096
        out.f_blocks = (sum(inode.size for inode in self._tree.inodes.values()) + 4095) // 4096
        out.f_files = len(self._tree.inodes)
        out.f_namemax = NAME_BYTES
        return out

    @answers
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        if mode & os.W_OK:
            raise pyfuse3.FUSEError(errno.EROFS)
        return True  # default_permissions: the kernel has judged by mode and owner already

    async def forget(self, inode_list: Any) -> None:
        """Nothing to free: inodes live as long as the image is open."""
        self.references -= sum(count for _, count in inode_list)

    # -- translation ---------------------------------------------------------------------------------------------------

    def _number(self) -> int:
        self._next_handle += 1
        return self._next_handle

    def _inode(self, number: int) -> Inode:
        inode = self._tree.inodes.get(number - self._base)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return inode

    def _directory(self, number: int) -> Node:
        node = self._tree.directories.get(number - self._base)
        if node is None:
            known = number - self._base in self._tree.inodes
            raise pyfuse3.FUSEError(errno.ENOTDIR if known else errno.ESTALE)
        return node

    def _distrusted(self, layer: int) -> None:
        """What was read of a layer may be wrong: the kernel forgets its pages. From a thread, since it waits for reads.

        Uninterruptibly: reads of other layers, which may hang, must not be among them. If we are killed meanwhile
        neither ever ends.
        """
        numbers = [
            self._base + number
            for number, inode in self._tree.inodes.items()
            if any(extent.chunk.layer == layer for extent in inode.extents)
        ]

        def forget() -> None:
            for number in numbers:
                with contextlib.suppress(OSError):
                    pyfuse3.invalidate_inode(number)

        threading.Thread(target=forget, name="invalidate", daemon=True).start()

    def _told(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """Attributes for a lookup, by which the kernel gets to know the inode."""
        self.references += 1
        return self.attributes(inode)

    def attributes(self, inode: Inode) -> pyfuse3.EntryAttributes:
        out = pyfuse3.EntryAttributes()
        out.st_ino = self._base + inode.ino
        out.generation = 0
        out.entry_timeout = out.attr_timeout = _FOREVER
        out.st_mode = inode.mode
        out.st_nlink = inode.nlink
        out.st_uid, out.st_gid = self._owner or (inode.uid, inode.gid)
        out.st_rdev = inode.rdev
        out.st_size = len(inode.target) if stat.S_ISLNK(inode.mode) else inode.size
        out.st_blksize = 4096
        out.st_blocks = (
            (sum(e.length for e in inode.extents) + _BLOCK - 1) // _BLOCK
            if len(inode.extents) < 64
            else (inode.size + _BLOCK - 1) // _BLOCK
        )
        out.st_atime_ns = out.st_mtime_ns = out.st_ctime_ns = inode.mtime_ns
        directory = self._tree.directories.get(inode.ino)
        if directory is not None and not self._tree.lasting(directory):
            out.attr_timeout = 0.0
        return out
