"""The fields of a tar archive: header blocks, PAX records, sparse maps. Pure functions from bytes to values.

POSIX.1-2001 pax, ustar, V7, GNU (tar(5), GNU tar manual "Tar Internals") and star's base-256 numbers. Knows nothing of
what comes before or after a block; tar_scanner.py does. Everything that is not well-formed is a FormatError.
"""

import base64
import binascii
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ckptfs.errors import FormatError
from ckptfs.model.paths import check_xattr, show
from ckptfs.model.times import BILLION, MOST
from ckptfs.settings import Limits

BLOCK = 512
_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12s")
_USTAR = b"ustar\0"  # and a version, which neither GNU tar nor Go looks at; GNU's own headers have a space here
_MAX_ID = (1 << 32) - 1


@dataclass(slots=True, eq=False, repr=False)
class Header:
    """One header block. `payload` is the size field: bytes that follow in the archive, whatever the file's size."""

    name: bytes
    mode: int
    uid: int
    gid: int
    payload: int
    mtime_ns: int
    flag: bytes
    linkname: bytes
    major: int
    minor: int
    block: bytes


def parse_header(block: bytes) -> Header | None:
    """A header block; None for the zero block that ends an archive."""
    if not any(block):
        return None
    (name, mode, uid, gid, size, mtime, checksum, flag, linkname, magic, _, _, major, minor, prefix, tail) = (
        _HEADER.unpack(block)
    )
    _check_sum(block, checksum)
    name = name.partition(b"\0")[0]
    if magic.startswith(_USTAR):
        # star keeps times behind a prefix of 131 bytes and says so at the end of the block
        prefix = prefix[:131] if tail.endswith(b"tar\0") else prefix
        prefix = prefix.partition(b"\0")[0]
        if prefix:
            name = prefix + b"/" + name
    device = flag in (b"3", b"4")
    return Header(
        name,
        number(mode) & 0o7777,
        owner(number(uid)),
        owner(number(gid)),
        number(size),
        nanoseconds(number(mtime), 0),
        flag,
        linkname.partition(b"\0")[0],
        # Other types may carry anything here.
        number(major) if device else 0,
        number(minor) if device else 0,
        block,
    )


def _check_sum(block: bytes, field: bytes) -> None:
    unsigned = sum(block) - sum(field) + 8 * 0x20
    try:
        stored = number(field)
    except FormatError:
        stored = -1
    if stored == unsigned:
        return
    # Ancient tars added signed bytes.
    signed = unsigned - 256 * (sum(b > 127 for b in block) - sum(b > 127 for b in field))
    if stored != signed:
        raise FormatError("a tar header has a wrong checksum", hint="the layer is damaged or is not a tar archive")


@lru_cache(maxsize=4096)  # owners, modes and most times are the same again and again
def number(field: bytes) -> int:
    """Octal digits padded with spaces or NULs, or GNU's base-256 (two's complement below the top bit)."""
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if field[0] & 0x40 else value
    digits = field.partition(b"\0")[0].strip(b" ") or field.strip(b" \0")
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        digits = digits.split(b" ")[0]  # some writers leave rubbish behind the separator
        if not digits.isdigit() or b"8" in digits or b"9" in digits:
            raise FormatError(f"a tar header has the number {show(field)}")
    return int(digits, 8)


def owner(value: int) -> int:
    if not 0 <= value <= _MAX_ID:
        raise FormatError(f"a tar header names the owner {value}")
    return value


def nanoseconds(seconds: int, fraction: int) -> int:
    """Whole seconds since the epoch and a positive fraction, as nanoseconds."""
    value = seconds * BILLION + fraction
    if not -MOST <= value <= MOST:
        raise FormatError(f"a tar header has the time {seconds}")
    return value


def decimal(text: bytes, what: str) -> int:
    """A PAX integer, not negative."""
    if not text.isdigit() or len(text) > 19:
        raise FormatError(f"a PAX header has {what}={show(text)}")
    return int(text)


def pax_time(text: bytes) -> int:
    """A PAX time in nanoseconds: decimal seconds, perhaps negative, perhaps with a fraction."""
    negative = text.startswith(b"-")
    whole, _, fraction = text[negative:].partition(b".")
    if not whole.isdigit() or len(whole) > 19 or not (fraction + b"0").isdigit():
        raise FormatError(f"a PAX header has the time {show(text)}")
    value = nanoseconds(int(whole), int((fraction + b"000000000")[:9]))
    return -value if negative else value


def pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The (keyword, value) pairs of an extended header, `LENGTH KEYWORD=VALUE\\n` each, in order."""
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 12)
        digits = data[at:space]
        if space < 0 or not digits.isdigit():
            raise FormatError("a PAX record has no length")
        end = at + int(digits)
        equals = data.find(b"=", space, end)
        if end > len(data) or equals < 0 or equals == space + 1 or data[end - 1 : end] != b"\n":
            raise FormatError("a PAX record is not LENGTH KEYWORD=VALUE")
        yield data[space + 1 : equals], data[equals + 1 : end - 1]
        at = end


def pax_xattrs(records: Sequence[tuple[bytes, bytes]], limits: Limits) -> dict[bytes, bytes]:
    """Extended attributes: SCHILY.xattr.* are raw; LIBARCHIVE.xattr.* are base64 and stand behind them."""
    found: dict[bytes, bytes] = {}
    for keyword, value in records:
        if keyword.startswith(b"LIBARCHIVE.xattr."):
            from urllib.parse import unquote_to_bytes  # rare, and 3 ms of every mount otherwise

            try:
                raw = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
            except binascii.Error:
                raise FormatError(f"a PAX header has {show(keyword)} that is not base64") from None
            found[unquote_to_bytes(keyword[17:])] = raw
    for keyword, value in records:
        if keyword.startswith(b"SCHILY.xattr."):
            # GNU tar escapes the two characters that the keyword of a record could not hold.
            found[keyword[13:].replace(b"%3D", b"=").replace(b"%25", b"%")] = value
    for name, value in found.items():
        check_xattr(name, value, limits)
    return found


# Sparse files: the map is a list of (offset in the file, bytes), the payload those bytes one after another.

SparseMap = list[tuple[int, int]]


def gnu_sparse_block(data: bytes, where: int, count: int) -> SparseMap:
    """`count` pairs of 12-byte numbers at `where`; an empty pair ends the list."""
    found: SparseMap = []
    for at in range(where, where + 24 * count, 24):
        if not data[at + 12]:
            break
        found.append((number(data[at : at + 12]), number(data[at + 12 : at + 24])))
    return found


def pax_sparse_map(records: Sequence[tuple[bytes, bytes]]) -> SparseMap | None:
    """The map that PAX sparse formats 0.0 and 0.1 keep in the extended header; None when it has none."""
    numbers: list[bytes] = []
    present = False
    for keyword, value in records:
        if keyword == b"GNU.sparse.map":
            numbers, present = (value.split(b",") if value else []), True
        elif keyword in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            if (len(numbers) % 2 == 0) != (keyword == b"GNU.sparse.offset"):
                raise FormatError("a PAX header has a sparse map out of order")
            numbers.append(value)
            present = True
        elif keyword == b"GNU.sparse.numblocks":
            present = True
    return sparse_pairs(numbers) if present else None


def sparse_pairs(numbers: Sequence[bytes]) -> SparseMap:
    if len(numbers) % 2:
        raise FormatError("a sparse map has an odd number of numbers")
    values = [decimal(text, "a sparse map") for text in numbers]
    return list(zip(values[::2], values[1::2], strict=True))


def check_sparse(sparse: SparseMap, size: int, payload: int) -> SparseMap:
    """The map without its empty pieces; FormatError unless sorted, inside the file and using the whole payload."""
    at = used = 0
    kept: SparseMap = []
    for offset, length in sparse:
        if offset < at or length < 0 or offset + length > size:
            raise FormatError("a sparse map is not sorted, overlaps, or leaves the file")
        at = offset + length
        used += length
        if length:
            kept.append((offset, length))
    if used != payload:
        raise FormatError(f"a sparse map places {used} bytes, the archive has {payload}")
    return kept
