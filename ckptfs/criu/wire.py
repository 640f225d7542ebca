"""One protobuf message (proto2 wire format), for the field numbers that the modules beside this one know.

Owns varints, packed lists and the words of the error messages. Never knows what a field means: the decoders of
images ask for fields by number, as CRIU's .proto files number them. Called by the modules of this package, and where
containerd is spoken to (restore/containerd_api.py).
"""

from collections.abc import Iterator

from ckptfs.errors import FormatError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MASK64 = (1 << 64) - 1
_KNOWN_NUMBERS = 255  # CRIU's highest is 128; others are skipped, so that a hostile message makes no millions of lists


def varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position` and the position after it; IndexError past the end, ValueError past 64 bits."""
    byte = data[position]
    position += 1
    if byte < 0x80:
        return byte, position
    value, shift = byte & 0x7F, 7
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MASK64, position
        shift += 7
        if shift > 63:
            raise ValueError("a number longer than 64 bits")


def encoded(number: int) -> bytes:
    """What `varint` reads."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


class Message:
    """The fields of one message by number. `what` names it in errors ("mm-1.img, record 1")."""

    __slots__ = ("_fields", "what")

    def __init__(self, data: bytes, what: str) -> None:
        self.what = what
        self._fields: dict[int, list[int | bytes]] = {}
        try:
            self._parse(data)
        except IndexError:
            raise FormatError(f"{what} ends in the middle of a field") from None
        except ValueError as error:
            raise FormatError(f"{what} has {error}") from None

    def _parse(self, data: bytes) -> None:
        fields, position, end = self._fields, 0, len(data)
        value: int | bytes
        while position < end:
            tag, position = varint(data, position)
            kind, number = tag & 7, tag >> 3
            if kind == _VARINT:
                value, position = varint(data, position)
            elif kind == _BYTES:
                length, start = varint(data, position)
                position = start + length
                if position > end:
                    raise IndexError
                value = data[start:position]
            elif kind in (_FIXED64, _FIXED32):
                start, position = position, position + (8 if kind == _FIXED64 else 4)
                if position > end:
                    raise IndexError
                value = int.from_bytes(data[start:position], "little")
            else:
                raise ValueError(f"a field of wire type {kind}")
            if number == 0:
                raise ValueError("a field numbered 0")
            if number <= _KNOWN_NUMBERS:
                fields.setdefault(number, []).append(value)

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def uint(self, number: int, default: int | None = None) -> int:
        """An unsigned number (bool and enum too); FormatError where it is absent and has no default."""
        values = self._fields.get(number)
        if values is None:
            if default is None:
                raise self._missing(number)
            return default
        value = values[-1]  # protobuf: the last one wins
        if not isinstance(value, int):
            raise self._kind(number, "a number")
        return value

    def flag(self, number: int) -> bool:
        return self.uint(number, 0) != 0

    def uints(self, number: int) -> list[int]:
        """A repeated number, packed or not."""
        out: list[int] = []
        for value in self._fields.get(number, ()):
            if isinstance(value, int):
                out.append(value)
                continue
            position = 0
            try:
                while position < len(value):
                    one, position = varint(value, position)
                    out.append(one)
            except (IndexError, ValueError):
                raise self._kind(number, "a list of numbers") from None
        return out

    def raw(self, number: int, default: bytes | None = None) -> bytes:
        values = self._fields.get(number)
        if values is None:
            if default is None:
                raise self._missing(number)
            return default
        value = values[-1]
        if not isinstance(value, bytes):
            raise self._kind(number, "bytes")
        return value

    def text(self, number: int, default: str | None = None) -> str:
        """A string, always printable: bytes that are not UTF-8 become \\xNN."""
        if default is not None and number not in self._fields:
            return default
        return self.raw(number).decode("utf-8", "backslashreplace")

    def texts(self, number: int) -> list[str]:
        """A repeated string."""
        out = []
        for value in self._fields.get(number, ()):
            if not isinstance(value, bytes):
                raise self._kind(number, "bytes")
            out.append(value.decode("utf-8", "backslashreplace"))
        return out

    def message(self, number: int) -> "Message":
        return Message(self.raw(number), f"{self.what}, field {number}")

    def messages(self, number: int) -> Iterator["Message"]:
        """A repeated message."""
        for value in self._fields.get(number, ()):
            if not isinstance(value, bytes):
                raise self._kind(number, "a message")
            yield Message(value, f"{self.what}, field {number}")

    def _missing(self, number: int) -> FormatError:
        return FormatError(f"{self.what} has no field {number}")

    def _kind(self, number: int, expected: str) -> FormatError:
        return FormatError(f"{self.what}: field {number} is not {expected}")
