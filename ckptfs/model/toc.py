"""What a layer contains: entries, inodes, and where the bytes of each file lie.

A file's bytes are `Extent`s, each a window into a `Chunk`. A chunk is what is fetched, decoded, verified and cached as
one. Gaps between extents are holes and read as zeros. Both are named tuples: they are made by the ten thousand, and a
frozen dataclass takes five times as long to make.
"""

import bisect
import hashlib
import stat
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

from ckptfs.errors import IntegrityError

UNKNOWN = -2  # the layer of chunks that stand for what has not been learnt yet (index_table.py): it has none such
_NO_XATTRS: Mapping[bytes, bytes] = {}
_TYPES = {stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "symlink", stat.S_IFCHR: "char"}
_TYPES |= {stat.S_IFBLK: "block", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket"}


class Chunk(NamedTuple):
    """The unit of fetch, decode, verify and cache.

    key     32 bytes, its name in every cache. The digest of the decoded bytes where the format tells one, so that equal
            chunks of different images are one; otherwise `derived_key`.
    layer   position of its layer in the fetcher's list of layers.
    offset, size  the encoded bytes, in the layer's blob; for a streamed layer (`Layer.sequential`) positions in the
            decoded stream.
    length  decoded bytes; the last chunk of a grid may turn out shorter.
    digest  of the decoded bytes, as its layer has them (chunk_digest.py), or None when only the transport vouches for
            them.
    inner   decoded bytes of the encoded unit that come before this chunk (eStargz `innerOffset`).
    """

    key: bytes
    layer: int
    offset: int
    size: int
    length: int
    digest: bytes | None = None
    inner: int = 0


def derived_key(layer_digest: str, offset: int, inner: int = 0, kind: str = "raw") -> bytes:
    """The key of a chunk that has no digest: its place in an immutable blob."""
    return hashlib.sha256(f"ckptfs/{kind}/{layer_digest}/{offset}/{inner}".encode()).digest()


class Extent(NamedTuple):
    """File bytes [start, start + length) are chunk bytes [skip, skip + length)."""

    start: int
    length: int
    chunk: Chunk
    skip: int = 0


@dataclass(slots=True, eq=False, repr=False)
class Inode:
    """One file: what stat(2), readlink(2), getxattr(2) and read(2) answer.

    mode holds type and permissions as in st_mode; times are nanoseconds; xattr names are whole (b"user.x").
    extents are sorted by start and do not overlap. `ino` and `nlink` are given by the tree that the inode stands in.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    target: bytes = b""
    xattrs: Mapping[bytes, bytes] = field(default_factory=lambda: _NO_XATTRS)
    extents: Sequence[Extent] = ()
    ino: int = 0
    nlink: int = 1

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def type_name(self) -> str:
        """As commands tell it."""
        return _TYPES.get(stat.S_IFMT(self.mode), "?")


class Entry(NamedTuple):
    """One entry of a layer: a path and either an inode or, for a hard link, the path that it links to.

    Paths are bytes, relative, without '.', '..', empty parts or a trailing slash; the root itself is b"".
    Whiteouts are ordinary entries here (names b".wh.*"); model.tree gives them their meaning.
    """

    path: bytes
    inode: Inode | None
    link: bytes | None = None


def prefixed(entries: Sequence[Entry], prefix: bytes) -> Sequence[Entry]:
    """The entries as they are called under the directory `prefix`."""
    if not prefix:
        return entries
    head = prefix + b"/"
    return [
        Entry(head + e.path if e.path else prefix, e.inode, None if e.link is None else head + e.link) for e in entries
    ]


class MadeExtents(Sequence[Extent]):
    """Extents that are made when they are asked for; finding one by offset must not make others."""

    __slots__ = ()

    @abstractmethod
    def index_at(self, offset: int) -> int:
        """Number of the last extent that starts at or before `offset`; -1 when there is none."""

    @abstractmethod
    def at(self, index: int) -> Extent:
        """Extent number `index`, from 0; there is one."""

    def stored(self) -> Iterable[tuple[bytes, int, int]]:
        """See `stored`."""
        return _stored(self)

    @overload
    def __getitem__(self, index: int) -> Extent: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Extent]: ...
    def __getitem__(self, index: int | slice) -> Extent | Sequence[Extent]:
        count = len(self)
        if isinstance(index, slice):
            return [self.at(i) for i in range(*index.indices(count))]
        if index < 0:
            index += count
        if not 0 <= index < count:
            raise IndexError(index)
        return self.at(index)


def index_at(extents: Sequence[Extent], offset: int) -> int:
    """Number of the last extent that starts at or before `offset`; -1 when there is none."""
    if isinstance(extents, MadeExtents):
        return extents.index_at(offset)
    return bisect.bisect_right(extents, offset, key=_start) - 1


def stored(extents: Sequence[Extent]) -> Iterable[tuple[bytes, int, int]]:
    """Key, layer and encoded bytes of each extent's chunk; where they are columns, no chunk is made for that."""
    return extents.stored() if isinstance(extents, MadeExtents) else _stored(extents)


def _stored(extents: Iterable[Extent]) -> Iterator[tuple[bytes, int, int]]:
    for extent in extents:
        chunk = extent.chunk
        yield chunk.key, chunk.layer, chunk.size


def overlapping(extents: Sequence[Extent], offset: int, length: int) -> Iterator[Extent]:
    """The extents that overlap file bytes [offset, offset + length), whole."""
    end = offset + length
    made = extents if isinstance(extents, MadeExtents) else None
    for index in range(max(index_at(extents, offset), 0), len(extents)):
        extent = made.at(index) if made is not None else extents[index]
        if extent.start >= end:
            return
        if extent.start + extent.length > offset:
            yield extent


def piece_of(data: bytes | bytearray | memoryview, skip: int, length: int) -> memoryview:
    """Bytes [skip, skip + length) of a decoded chunk, as an extent names them. IntegrityError when it is too short."""
    piece = memoryview(data)[skip : skip + length]
    if len(piece) != length:
        raise IntegrityError(f"a chunk is {length - len(piece)} bytes shorter than the file that it holds")
    return piece


def slice_extents(extents: Sequence[Extent], offset: int, length: int) -> Iterator[Extent]:
    """The part [offset, offset + length) of a file as extents of a file of its own, starting at 0.

    This is how a member of a tar inside an image becomes a file without being copied.
    """
    end = offset + length
    for extent in overlapping(extents, offset, length):
        lo = max(extent.start, offset)
        hi = min(extent.start + extent.length, end)
        yield Extent(lo - offset, hi - lo, extent.chunk, extent.skip + lo - extent.start)


def _start(extent: Extent) -> int:
    return extent.start
