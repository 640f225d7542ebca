"""Reading flatbuffers that come from outside: tables, strings and vectors, each bounds-checked, all of it on a budget.

The format lets many references point to one place, so a small buffer can describe a huge tree: whoever reads pays for
every table and every byte of text from one budget. Field numbers are the order of fields in the schema. The project's
own reader because the `flatbuffers` package trusts its input (negative offsets wrap around) and needs generated code.
"""

import struct
from collections.abc import Iterator

from ckptfs.errors import FormatError, LimitExceeded

_U16, _U32, _I32, _I64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<i"), struct.Struct("<q")


class Buffer:
    """The bytes, and what may still be read from them: `tables` tables and `text` bytes of strings."""

    def __init__(self, data: bytes, *, tables: int, text: int) -> None:
        self.data = data
        self._tables = tables
        self._text = text

    def root(self) -> "Table":
        return self.table_at(self.reference(0))

    def reference(self, at: int) -> int:
        """Where the reference at `at` points to; references only point forward."""
        if at < 0 or at + 4 > len(self.data):
            raise _damaged()
        (distance,) = _U32.unpack_from(self.data, at)
        return int(at + distance)

    def table_at(self, at: int) -> "Table":
        self._tables -= 1
        if self._tables < 0:
            raise LimitExceeded("the flatbuffer describes more tables than ckptfs reads")
        data = self.data
        if at < 0 or at + 4 > len(data):
            raise _damaged()
        vtable = at - _I32.unpack_from(data, at)[0]
        if vtable < 0 or vtable + 4 > len(data):
            raise _damaged()
        (size,) = _U16.unpack_from(data, vtable)
        if size < 4 or vtable + size > len(data):
            raise _damaged()
        return Table(self, at, vtable, size)

    def bytes_at(self, at: int, *, counted: bool = True) -> memoryview:
        """A string, or a vector of bytes."""
        start, length = self.vector_at(at, 1)
        if counted:
            self._text -= length
            if self._text < 0:
                raise LimitExceeded("the flatbuffer describes more text than ckptfs reads")
        return memoryview(self.data)[start : start + length]

    def vector_at(self, at: int, width: int) -> tuple[int, int]:
        """Where the items of a vector begin, and how many there are."""
        if at < 0 or at + 4 > len(self.data):
            raise _damaged()
        (count,) = _U32.unpack_from(self.data, at)
        if at + 4 + count * width > len(self.data):
            raise _damaged()
        return at + 4, int(count)


class Table:
    """One table; a field that it does not have reads as 0, b"" or nothing."""

    __slots__ = ("_at", "_buffer", "_size", "_vtable")

    def __init__(self, buffer: Buffer, at: int, vtable: int, size: int) -> None:
        """`vtable`, of `size` bytes, says where the fields are: looked up one by one, for it may have 32 766."""
        self._buffer = buffer
        self._at = at
        self._vtable = vtable
        self._size = size

    def number(self, field: int, kind: struct.Struct, default: int = 0) -> int:
        at = self._place(field)
        if not at:
            return default
        if at + kind.size > len(self._buffer.data):
            raise _damaged()
        return int(kind.unpack_from(self._buffer.data, at)[0])

    def int64(self, field: int) -> int:
        return self.number(field, _I64)

    def int32(self, field: int) -> int:
        return self.number(field, _I32)

    def uint32(self, field: int) -> int:
        return self.number(field, _U32)

    def string(self, field: int) -> bytes:
        at = self._place(field)
        return bytes(self._buffer.bytes_at(self._buffer.reference(at))) if at else b""

    def data(self, field: int) -> memoryview:
        """A vector of bytes, not copied and not counted."""
        at = self._place(field)
        return self._buffer.bytes_at(self._buffer.reference(at), counted=False) if at else memoryview(b"")

    def table(self, field: int) -> "Table | None":
        at = self._place(field)
        return self._buffer.table_at(self._buffer.reference(at)) if at else None

    def count(self, field: int) -> int:
        """How many references a vector holds."""
        at = self._place(field)
        return self._buffer.vector_at(self._buffer.reference(at), 4)[1] if at else 0

    def tables(self, field: int) -> "Iterator[Table]":
        for at in self._references(field):
            yield self._buffer.table_at(at)

    def strings(self, field: int) -> Iterator[bytes]:
        for at in self._references(field):
            yield bytes(self._buffer.bytes_at(at))

    def _references(self, field: int) -> Iterator[int]:
        at = self._place(field)
        if at:
            start, count = self._buffer.vector_at(self._buffer.reference(at), 4)
            for item in range(start, start + 4 * count, 4):
                yield self._buffer.reference(item)

    def _place(self, field: int) -> int:
        """Where the field stands; 0 for none."""
        place = 4 + 2 * field
        if place + 2 > self._size:
            return 0
        (offset,) = _U16.unpack_from(self._buffer.data, self._vtable + place)
        return self._at + int(offset) if offset else 0


def _damaged() -> FormatError:
    return FormatError("the flatbuffer has a reference that leaves it")
