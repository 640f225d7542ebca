"""Files of an image as blobs: so that a tar (or an image) inside an image is read by the code that reads layers."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial

import trio

from ckptfs.engine.reader import Reader
from ckptfs.errors import FormatError
from ckptfs.model.blob import DescribedBlob
from ckptfs.model.oci import ANNOTATION_SYNTHETIC, Descriptor, Digest
from ckptfs.model.toc import Entry, Extent, Inode, slice_extents


class InodeBlob(DescribedBlob):
    """A Blob over one file of an open image, with a synthetic digest.

    Calls come from threads that trio started (layer scans, fetches); each read waits in the event loop as any reader.
    """

    def __init__(self, reader: Reader, inode: Inode, media_type: str) -> None:
        self._reader = reader
        self._inode = inode
        identity = hashlib.sha256(f"inode/{inode.size}".encode())
        for extent in inode.extents:
            identity.update(extent.chunk.key)
            identity.update(b"%d/%d/%d;" % (extent.start, extent.length, extent.skip))
        name = Digest("sha256", identity.hexdigest())
        super().__init__(Descriptor(media_type, name, inode.size, {ANNOTATION_SYNTHETIC: "file"}))

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        if offset + length > self._inode.size:
            raise FormatError(f"a range ends {offset + length - self._inode.size} bytes past the end of a file")
        read = partial(self._reader.read, inside=True)
        return bytes(trio.from_thread.run(read, self._inode, offset, length))


def within(entry: Entry, outer: Inode, prefix: bytes) -> Entry:
    """A member of a tar that is the file `outer`, as an entry of the image; its bytes are windows into outer's."""
    head = prefix + b"/" if prefix else b""
    path = head + entry.path if entry.path else prefix
    if entry.link is not None:
        return Entry(path, None, head + entry.link)
    inode = entry.inode
    if inode is not None and inode.extents:
        inode.extents = tuple(_translate(inode.extents, outer))
    return Entry(path, inode)


def _translate(extents: Sequence[Extent], outer: Inode) -> Iterator[Extent]:
    for extent in extents:
        position = extent.chunk.offset + extent.skip
        for piece in slice_extents(outer.extents, position, extent.length):
            yield Extent(extent.start + piece.start, piece.length, piece.chunk, piece.skip)
