"""Tables of chunks that are in a layer and not in the index: the place, the parts, and how they are written and read.

The table of a file of 4 GiB is 0.6 MB, of which a restore with lazy pages needs a few rows before its first tick. It is
therefore written in parts of a few hundred rows, each a zstd frame of columns with a digest of its own in the index:
two levels of a hash tree. Who needs all of it reads all parts at once, as a table without parts.

Bytes in, values out. A part says how much of the file it stands for before it has been read, so that one can be looked
up without the others.
"""

import base64
import binascii
import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple

import zstandard

from ckptfs.errors import FormatError, IntegrityError, LimitExceeded
from ckptfs.model.index_columns import ROW_BYTES, ColumnReader, ColumnWriter, Row
from ckptfs.model.oci import Digest
from ckptfs.model.packed import PackedExtents
from ckptfs.model.toc import UNKNOWN, Chunk, Extent, MadeExtents
from ckptfs.settings import Limits

PART_ROWS = 256  # 64 MiB of pages: 9 KB to read for the first page of them, 70 bytes in the index
_LEVEL = 9
_DIGEST = 32
_NUMBERS = 4  # of a part in the index, besides its digest


class Part(NamedTuple):
    """`size` bytes of a table: `rows` rows for `length` bytes of the file.

    encoded  bytes of the frames of its chunks in the blob.
    """

    size: int
    rows: int
    length: int
    encoded: int
    digest: bytes

    def check(self, data: bytes) -> None:
        """IntegrityError unless these are its bytes."""
        if hashlib.sha256(data).digest() != self.digest:
            raise IntegrityError("a part of a table of chunks is damaged")


class Table(NamedTuple):
    """The columns of one file, outside the document: bytes [offset, offset + size) of its layer's blob."""

    offset: int
    size: int
    digest: Digest
    rows: int
    parts: Sequence[Part] = ()

    def to_json(self) -> list[Any]:
        return [self.offset, self.size, str(self.digest), self.rows]

    def parts_to_json(self) -> list[Any]:
        """The digests of all parts, and their numbers one after another."""
        numbers = [number for part in self.parts for number in part[:_NUMBERS]]
        return [base64.b64encode(b"".join(part.digest for part in self.parts)).decode(), numbers]

    @classmethod
    def from_json(cls, value: object, parts: object, end: int, file_size: int, limits: Limits) -> "Table":
        """`parts` is None for a table in one piece. FormatError unless all of it lies in [0, end) and fits the file."""
        if not isinstance(value, list) or len(value) != 4 or not isinstance(value[2], str):
            raise FormatError("the index has a table of chunks without place or digest")
        offset, size, rows = (_number(value[at], most) for at, most in ((0, end), (1, end), (3, limits.toc_entries)))
        if size > limits.toc_compressed_bytes:
            raise LimitExceeded(f"the index has a table of chunks of {size} bytes")
        if offset + size > end:
            raise FormatError("the index has a table of chunks outside its layer")
        found = _parts(parts, size, rows, file_size) if parts is not None else ()
        return cls(offset, size, Digest.parse(value[2]), rows, found)

    def extents(
        self, data: bytes, file_size: int, layer: int, position: int, end: int, limits: Limits
    ) -> Sequence[Extent]:
        """What `data`, all of the table, says of a file whose frames begin at `position` and end before `end`."""
        self.digest.check(data, "a table of chunks")
        if not self.parts:
            return _read(data, self.rows, file_size, layer, position, end, limits)
        whole = PackedExtents(layer)
        at = start = 0
        for part in self.parts:
            piece = data[at : at + part.size]
            whole.extend(read_part(part, piece, layer, position, end, limits), start)
            at, start, position = at + part.size, start + part.length, position + part.encoded
        return whole


def read_part(part: Part, data: bytes, layer: int, position: int, end: int, limits: Limits) -> PackedExtents:
    """The extents of one part, as if the file began with it; its frames begin at `position`."""
    part.check(data)
    return _read(data, part.rows, part.length, layer, position, min(position + part.encoded, end), limits)


def encode_table(rows: Iterable[Row]) -> bytes:
    """The columns of one file, compressed: what a `Table` points to."""
    columns = ColumnWriter()
    columns.add(rows)
    return zstandard.ZstdCompressor(level=_LEVEL).compress(columns.encode())


def encode_parts(rows: Iterable[Row]) -> tuple[bytes, tuple[Part, ...]]:
    """The same in parts."""
    pieces, parts = [], []
    left = iter(rows)
    while some := list(islice(left, PART_ROWS)):
        piece = encode_table(some)
        lengths = sum(row[1] for row in some), sum(row[3] for row in some)
        parts.append(Part(len(piece), len(some), *lengths, hashlib.sha256(piece).digest()))
        pieces.append(piece)
    return b"".join(pieces), tuple(parts)


class PartedExtents(MadeExtents):
    """The extents of a file of which some parts of the table are known.

    In the place of each other part is one chunk of the layer UNKNOWN, as long as all of it, which no cache and no
    registry has: nothing can be read there before `learn` was called. `start` of it is where the part begins.
    """

    __slots__ = ("_firsts", "_known", "_layer", "_name", "_positions", "_starts", "_table")

    def __init__(self, table: Table, layer: int, position: int) -> None:
        parts = table.parts
        self._table = table
        self._layer = layer
        self._name = f"ckptfs/part/{layer}/{position}"
        self._starts = array("Q", accumulate((part.length for part in parts), initial=0))
        self._positions = array("Q", accumulate((part.encoded for part in parts), initial=position))
        self._firsts = array("Q", range(len(parts) + 1))
        self._known: list[PackedExtents | None] = [None] * len(parts)

    def part_at(self, offset: int) -> int:
        """The number of the part that has the file's byte at `offset`."""
        return min(max(bisect_right(self._starts, offset) - 1, 0), len(self._known) - 1)

    def known(self, number: int) -> bool:
        return self._known[number] is not None

    @property
    def whole(self) -> bool:
        """Whether all parts are known: then these are the file's extents like others."""
        return None not in self._known

    def learn(self, number: int, data: bytes, end: int, limits: Limits) -> None:
        """Take in what the bytes of part `number` say. IntegrityError, FormatError."""
        part, position = self._table.parts[number], self._positions[number]
        found = PackedExtents(self._layer)
        found.extend(read_part(part, data, self._layer, position, end, limits), self._starts[number])
        self._known[number] = found
        counts = (1 if known is None else len(known) for known in self._known)
        self._firsts = array("Q", accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self._firsts[-1]

    def index_at(self, offset: int) -> int:
        number = self.part_at(offset)
        known = self._known[number]
        return self._firsts[number] + (known.index_at(offset) if known is not None else 0)

    def at(self, index: int) -> Extent:
        number = bisect_right(self._firsts, index) - 1
        known = self._known[number]
        if known is not None:
            return known.at(index - self._firsts[number])
        start, length = self._starts[number], self._starts[number + 1] - self._starts[number]
        key = hashlib.sha256(f"{self._name}/{number}".encode()).digest()
        return Extent(start, length, Chunk(key, UNKNOWN, 0, 0, length, key))


def decompress(data: bytes, limit: int) -> bytes:
    """One zstd frame of at most `limit` bytes, whole. FormatError, LimitExceeded, IntegrityError."""
    try:
        size = zstandard.frame_content_size(data)
        if size < 0:
            raise FormatError("the index does not say how large it is")
        if size > limit:
            raise LimitExceeded(f"the index has {size} bytes, more than {limit}")
        body = zstandard.ZstdDecompressor().decompress(data, max_output_size=limit)
    except zstandard.ZstdError as error:
        raise FormatError(f"the index is not zstd ({error})") from None
    if len(body) != size:
        raise IntegrityError("the index is cut short")
    return body


def _read(data: bytes, rows: int, file_size: int, layer: int, position: int, end: int, limits: Limits) -> PackedExtents:
    columns = ColumnReader(decompress(data, rows * ROW_BYTES), 0, rows, limits)
    extents = columns.extents(rows, file_size, layer, position, end)
    columns.finished()
    return extents


def _parts(value: object, size: int, rows: int, file_size: int) -> tuple[Part, ...]:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str) or type(value[1]) is not list:
        raise FormatError("the index has a table of chunks whose parts are no list")
    try:
        digests = base64.b64decode(value[0], validate=True)
    except (binascii.Error, ValueError):
        raise FormatError("the index has parts of a table without digests") from None
    numbers = value[1]
    count = len(digests) // _DIGEST
    if len(digests) % _DIGEST or len(numbers) != count * _NUMBERS or not 0 < count <= rows:
        raise FormatError("the index has parts of a table without digests")
    found = []
    for n in range(count):
        a, b, c, d = numbers[n * _NUMBERS : (n + 1) * _NUMBERS]
        digest = digests[n * _DIGEST : (n + 1) * _DIGEST]
        part = Part(_number(a, size), _number(b, rows), _number(c, file_size), _number(d, 1 << 62), digest)
        if not part.rows or not part.length:
            raise FormatError("the index has an empty part of a table")
        found.append(part)
    if (sum(p.size for p in found), sum(p.rows for p in found), sum(p.length for p in found)) != (
        size,
        rows,
        file_size,
    ):
        raise FormatError("the index has parts of a table that are not all of it")
    return tuple(found)


def _number(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise FormatError(f"the index has {str(value)[:40]} in a table of chunks")
    return value
