"""Tar archives: made block by block, for what no honest tool would write, and read as layers."""

import gzip
import io
import struct
import tarfile
from collections.abc import Mapping

import pytest

from ckptfs.errors import FormatError
from ckptfs.model.toc import Entry
from tests.support.blobs import TAR, ScannedLayer, blob_of

BLOCK = 512
END = bytes(2 * BLOCK)


def header(
    name: bytes,
    size: int | bytes = 0,
    flag: bytes = b"0",
    *,
    link: bytes = b"",
    mode: int = 0o644,
    uid: int | bytes = 0,
    mtime: int | bytes = 0,
    magic: bytes = b"ustar\x0000",
    device: tuple[int | bytes, int | bytes] = (0, 0),
    prefix: bytes = b"",
) -> bytes:
    """A header block with a right checksum; numbers as bytes are taken as they are, others become octal or base-256."""
    block = bytearray(
        struct.pack(
            "100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12s",
            name,
            _number(mode, 8),
            _number(uid, 8),
            _number(0, 8),
            _number(size, 12),
            _number(mtime, 12),
            b" " * 8,
            flag,
            link,
            magic,
            b"",
            b"",
            _number(device[0], 8),
            _number(device[1], 8),
            prefix,
            b"",
        )
    )
    return with_checksum(block)


def with_checksum(block: bytes | bytearray) -> bytes:
    changed = bytearray(block)
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def _number(value: int | bytes, width: int) -> bytes:
    if isinstance(value, bytes):
        return value
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return bytes((0x80 if value >= 0 else 0xFF,)) + (value & ((1 << 8 * (width - 1)) - 1)).to_bytes(width - 1, "big")


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: bytes, data: bytes = b"", **fields: object) -> bytes:
    return header(name, len(data), **fields) + padded(data)  # type: ignore[arg-type]


def record(keyword: bytes, value: bytes) -> bytes:
    """One PAX record; its length counts its own digits."""
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def pax(records: list[tuple[bytes, bytes]], flag: bytes = b"x") -> bytes:
    return member(b"pax", b"".join(record(*pair) for pair in records), flag=flag)


def gnu_long(text: bytes) -> bytes:
    return member(b"././@LongLink", text + b"\0", flag=b"L", magic=b"ustar  \0")


def gnu_sparse(name: bytes, size: int, pieces: list[tuple[int, int]], payload: bytes) -> bytes:
    """Old GNU format: four pieces in the header, 21 in each block that follows."""
    block = bytearray(header(name, len(payload), b"S", magic=b"ustar  \0"))
    block[345:] = bytes(BLOCK - 345)
    block[483:495] = _number(size, 12)
    block[386:482] = _pairs(pieces[:4]).ljust(96, b"\0")
    block[482] = len(pieces) > 4
    blocks = [with_checksum(block)]
    for at in range(4, len(pieces), 21):
        extension = bytearray(_pairs(pieces[at : at + 21]).ljust(BLOCK, b"\0"))
        extension[504] = len(pieces) > at + 21
        blocks.append(bytes(extension))
    return b"".join(blocks) + padded(payload)


def _pairs(pieces: list[tuple[int, int]]) -> bytes:
    return b"".join(_number(number, 12) for piece in pieces for number in piece)


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """As an honest tool would write it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def entries(data: bytes) -> list[Entry]:
    return ScannedLayer.of(blob_of(data)).entries


def refused(data: bytes, match: str = ".") -> None:
    """Refused as plain tar and in the stream, whose end the scanner does not know."""
    with pytest.raises(FormatError, match=match):
        entries(data)
    with pytest.raises(FormatError, match=match):
        ScannedLayer.of(blob_of(gzip.compress(data), TAR + "+gzip"))
