"""Files of an image as blobs: so that a tar (or an image) inside an image is read by the code that reads layers."""

import hashlib
from functools import partial

import trio

from ckptfs.engine.reader import Reader
from ckptfs.errors import FormatError
from ckptfs.layers.grid import segments_of, windows
from ckptfs.model.blob import DescribedBlob
from ckptfs.model.oci import ANNOTATION_SYNTHETIC, Descriptor, Digest
from ckptfs.model.toc import Entry, Inode


class InodeBlob(DescribedBlob):
    """A Blob over one file of an open image, with a synthetic digest.

    Calls come from threads that trio started (layer scans, fetches); each read waits in the event loop as any reader.
    """

    def __init__(self, reader: Reader, inode: Inode, media_type: str) -> None:
        self._reader = reader
        self._inode = inode
        name = Digest("sha256", _identity(inode))
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
        inode.extents = windows(outer.extents, segments_of(inode.extents))
    return Entry(path, inode)


def _identity(inode: Inode) -> str:
    """The same for two files only if their bytes are the same.

    A chunk without a digest is named after its place in its layer, and so are all others of the file: one of them and
    the places tell it. A header can claim 2**60 bytes, which are 2**42 chunks. Chunks with digests have come as a list.
    """
    identity = hashlib.sha256(f"inode/{inode.size}".encode())
    extents = inode.extents
    segments = segments_of(extents)
    if segments and (first := extents[0].chunk).digest is None:
        identity.update(first.key)
        for segment in segments:
            identity.update(b"%d/%d/%d;" % segment)
        return identity.hexdigest()
    for extent in extents:
        identity.update(extent.chunk.key)
        identity.update(b"%d/%d/%d;" % (extent.start, extent.length, extent.skip))
    return identity.hexdigest()
