"""Chunks as columns: lengths, sizes and digests, as model/index.py keeps them in its document and in tables.

    n x u32 length (bit 31: zeros) | n x u32 size | a digest for each row that has one      little-endian

The frames of one file follow one another in the blob, so a row needs no offset. Rows come from outside: nothing is
believed before it was added up. Knows no document.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.packed import PackedExtents
from ckptfs.model.toc import Extent
from ckptfs.settings import Limits

ROW_BYTES = 40  # at most
_ZEROS = 1 << 31
_DIGEST = 32

# (start in the file, length, offset in the blob, size there, digest); zeros have the digest b"".
Row = tuple[int, int, int, int, bytes]


class ColumnWriter:
    def __init__(self) -> None:
        self._lengths = array("I")
        self._sizes = array("I")
        self._digests = bytearray()

    def add(self, rows: Iterable[Row], *, digests: bool = True) -> None:
        """The rows of one file. Without `digests` they come with the file's content and can be computed."""
        for _, length, _, size, digest in rows:
            self._lengths.append(length if digest else length | _ZEROS)
            self._sizes.append(size)
            if digests:
                self._digests += digest

    def encode(self) -> bytes:
        return _bytes(self._lengths) + _bytes(self._sizes) + self._digests


class ColumnReader:
    """Hands out the rows of file after file, and at the end of the columns what comes behind them."""

    def __init__(self, data: bytes, position: int, rows: int, limits: Limits) -> None:
        self._data = data
        self._limits = limits
        self._at = 0
        self._lengths = _array(data, position, rows)
        self._sizes = _array(data, position + 4 * rows, rows)
        self.position = position + 8 * rows  # of the next digest

    def extents(self, rows: int, size: int, layer: int, offset: int, end: int) -> PackedExtents:
        """The next `rows` rows as the extents of a file of `size` bytes, whose frames lie in [offset, end)."""
        lengths, sizes, zeros = self._take(rows, size, offset, end)
        if not zeros:
            digests = self._take_digests(rows)
            return PackedExtents.from_columns(layer, lengths, sizes, offset, digests)
        packed = PackedExtents(layer)
        start = 0
        for length, encoded in zip(lengths, sizes, strict=True):
            if length & _ZEROS:
                length &= ~_ZEROS
            else:
                packed.append(start, length, offset, encoded, self._take_digests(1))
            start, offset = start + length, offset + encoded
        return packed

    def extents_of(
        self, content: bytes, rows: int, layer: int, offset: int, end: int, chunk_digest: ChunkDigest
    ) -> Sequence[Extent]:
        """The same for a file whose content is known: the digests are computed. Every chunk counts, zeros too."""
        lengths, sizes, _ = self._take(rows, len(content), offset, end)
        packed = PackedExtents(layer)
        start = 0
        for length, encoded in zip(lengths, sizes, strict=True):
            length &= ~_ZEROS
            packed.append(start, length, offset, encoded, chunk_digest.of(content[start : start + length]))
            start, offset = start + length, offset + encoded
        return packed

    def coming(self, rows: int, offset: int) -> list[Row]:
        """The next `rows` rows as they were written, zeros too, without taking them."""
        out: list[Row] = []
        start, position = 0, self.position
        part = slice(self._at, self._at + rows)
        for length, size in zip(self._lengths[part], self._sizes[part], strict=True):
            digest = b"" if length & _ZEROS else self._data[position : position + _DIGEST]
            length &= ~_ZEROS
            out.append((start, length, offset, size, digest))
            start, offset, position = start + length, offset + size, position + len(digest)
        return out

    def finished(self) -> None:
        """FormatError unless all rows were taken."""
        if self._at != len(self._lengths):
            raise FormatError("the index has more chunks than its files have")

    def _take(self, rows: int, size: int, offset: int, end: int) -> tuple["array[int]", "array[int]", bool]:
        if rows > len(self._lengths) - self._at:
            raise FormatError("the index has fewer chunks than its files say")
        part = slice(self._at, self._at + rows)
        self._at += rows
        lengths, sizes = self._lengths[part], self._sizes[part]
        zeros = bool(rows) and max(lengths) >= _ZEROS
        plain = [length & ~_ZEROS for length in lengths] if zeros else lengths
        if rows and (min(plain) == 0 or min(sizes) == 0):
            raise FormatError("the index has an empty chunk")
        if rows and max(plain) > self._limits.chunk_bytes:
            raise LimitExceeded(f"the index has a chunk of {max(plain)} bytes, more than {self._limits.chunk_bytes}")
        if sum(plain) != size:
            raise FormatError(f"the index has chunks for {sum(plain)} bytes of a file of {size}")
        if offset + sum(sizes) > end:
            raise FormatError("the index has chunks that lie outside their layer")
        return lengths, sizes, zeros

    def _take_digests(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count * _DIGEST
        if self.position > len(self._data):
            raise FormatError("the index ends in the middle of its digests")
        return self._data[start : self.position]


def _array(data: bytes, position: int, count: int) -> "array[int]":
    piece = data[position : position + 4 * count]
    if len(piece) != 4 * count:
        raise FormatError("the index ends in the middle of its columns")
    values = array("I", piece)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _bytes(values: "array[int]") -> bytes:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()
