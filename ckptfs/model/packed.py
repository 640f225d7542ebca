"""Extents of a large file without an object for each: columns of numbers and digests, objects made when asked for.

A pages file of 4 GiB has 17 000 chunks or 262 144 cells; those are 100 MB as objects and 15 MB as columns. The files of
an image that have one chunk each share columns as well: 136 bytes for each instead of 410. Readers see an ordinary
sequence of Extent.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from ckptfs.model.toc import Chunk, Extent, MadeExtents

_DIGEST = 32
_FEW = 64  # chunks of a file that stay objects; more are kept as columns, which take 16 times less memory


class PackedExtents(MadeExtents):
    """Extents that are whole chunks with digests, in file order. Rows are appended, only sizes can be told later."""

    __slots__ = ("_digests", "_lengths", "_offsets", "_sizes", "_starts", "layer")

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self._starts = array("Q")
        self._lengths = array("I")
        self._offsets = array("Q")
        self._sizes = array("I")
        self._digests = bytearray()

    @classmethod
    def from_columns(
        cls, layer: int, lengths: "array[int]", sizes: "array[int]", offset: int, digests: bytes
    ) -> "PackedExtents":
        """Chunks that follow one another in the file from 0, and in the blob from `offset`."""
        packed = cls(layer)
        packed._starts = array("Q", accumulate(lengths, initial=0))
        packed._offsets = array("Q", accumulate(sizes, initial=offset))
        packed._starts.pop()
        packed._offsets.pop()
        packed._lengths, packed._sizes, packed._digests = lengths, sizes, bytearray(digests)
        return packed

    def append(self, start: int, length: int, offset: int, size: int, digest: bytes) -> None:
        """File bytes [start, start + length) are the blob's frame [offset, offset + size), with this digest decoded."""
        self._starts.append(start)
        self._lengths.append(length)
        self._offsets.append(offset)
        self._sizes.append(size)
        self._digests += digest

    def offset(self, index: int) -> int:
        """Of the frame of a row, in the blob."""
        return self._offsets[index]

    def resize(self, index: int, size: int) -> None:
        """Set the size of the frame of a row, for which it has not been known."""
        self._sizes[index] = size

    def extend(self, other: "PackedExtents", start: int) -> None:
        """The rows of another file's beginning, as they are where the file goes on at `start`."""
        self._starts.extend(row + start for row in other._starts)
        self._lengths += other._lengths
        self._offsets += other._offsets
        self._sizes += other._sizes
        self._digests += other._digests

    def __len__(self) -> int:
        return len(self._starts)

    def index_at(self, offset: int) -> int:
        return bisect_right(self._starts, offset) - 1

    def __iter__(self) -> Iterator[Extent]:
        return map(self.at, range(len(self)))

    def stored(self) -> Iterable[tuple[bytes, int, int]]:
        return map(self.stored_at, range(len(self)))

    def stored_at(self, i: int) -> tuple[bytes, int, int]:
        """Key, layer and encoded bytes of the chunk of a row."""
        return bytes(self._digests[_DIGEST * i : _DIGEST * (i + 1)]), self.layer, self._sizes[i]

    def at(self, i: int) -> Extent:
        digest = bytes(self._digests[_DIGEST * i : _DIGEST * (i + 1)])
        length = self._lengths[i]
        chunk = Chunk(digest, self.layer, self._offsets[i], self._sizes[i], length, digest)
        return Extent(self._starts[i], length, chunk)


class OnlyExtent(MadeExtents):
    """The only extent of a file, which begins with it: a row that stands in columns among those of other files."""

    __slots__ = ("_at", "_columns")

    def __init__(self, columns: PackedExtents, length: int, offset: int, size: int, digest: bytes) -> None:
        """Appends the row: the file's first `length` bytes are the blob's frame [offset, offset + size)."""
        self._columns = columns
        self._at = len(columns)
        columns.append(0, length, offset, size, digest)

    def __len__(self) -> int:
        return 1

    def index_at(self, offset: int) -> int:
        return 0 if offset >= 0 else -1

    def __iter__(self) -> Iterator[Extent]:
        return iter((self._columns.at(self._at),))

    def stored(self) -> Iterable[tuple[bytes, int, int]]:
        return (self._columns.stored_at(self._at),)

    def at(self, index: int) -> Extent:
        return self._columns.at(self._at)


def packed(extents: Sequence[Extent]) -> Sequence[Extent]:
    """Extents that are whole chunks with digests, as columns if they are many."""
    if len(extents) <= _FEW:
        return tuple(extents)
    columns = PackedExtents(extents[0].chunk.layer)
    for start, length, chunk, _ in extents:
        columns.append(start, length, chunk.offset, chunk.size, chunk.key)
    return columns
