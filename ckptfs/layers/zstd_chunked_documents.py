"""The documents at the end of a zstd:chunked layer: table of contents, tar-split, footer.

Sources: containers/storage pkg/chunked/internal/minimal/compression.go (FileMetadata, annotations, footer),
vbatts/tar-split tar/storage/entry.go (type 1: a payload with its crc64, type 2: bytes of the tar) and its
tar/asm/iterate.go (each header is in one segment, which begins with the padding of the payload before it). Both
documents are compressed while they are written: what is held is small. Called by zstd_chunked_writer.py only.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import zstandard

from ckptfs.layers.tar_encode import tar_type
from ckptfs.model.index_columns import Row
from ckptfs.model.times import rfc3339
from ckptfs.model.toc import Inode

ANNOTATION = "io.github.containers.zstd-chunked."

_LEVEL = 3
_SKIPPABLE = b"\x50\x2a\x4d\x18"
_MAGIC = b"GNUlInUx"
_CRFS = 1  # the only type of table of contents that there is
_TYPES = {b"0": "reg", b"1": "hardlink", b"2": "symlink", b"3": "char", b"4": "block", b"5": "dir", b"6": "fifo"}


def skippable(data: bytes) -> bytes:
    """A frame that decompressors pass over; its content begins 8 bytes in."""
    return _SKIPPABLE + len(data).to_bytes(4, "little") + data


class Document:
    """JSON that is compressed while it is written."""

    def __init__(self) -> None:
        self._stream = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
        self._parts: list[bytes] = []
        self.length = 0

    def write(self, text: str) -> None:
        data = text.encode()
        self.length += len(data)
        self._parts.append(self._stream.compress(data))

    def finish(self) -> bytes:
        """All of it, compressed; `length` is what it decompresses to."""
        self._parts.append(self._stream.flush())
        return b"".join(self._parts)


class TarSplit(Document):
    """JSON lines from which, with the files, the tar can be put together again bit for bit."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def segment(self, data: bytes) -> None:
        """Bytes of the tar that are no payload."""
        self._line({"type": 2, "payload": _base64(data)})

    def payload(self, name: bytes, size: int, crc: bytes) -> None:
        """A member; `crc` is the crc64 of its payload (Go's ISO polynomial, big-endian), b"" where it has none."""
        line: dict[str, Any] = {"type": 1}
        line |= {"name": name.decode()} if is_utf8(name) else {"name_raw": _base64(name)}
        if size:
            line["size"] = size
        self._line({**line, "payload": _base64(crc) if crc else None})

    def _line(self, entry: dict[str, Any]) -> None:
        self.write(_json({**entry, "position": self._count}) + "\n")
        self._count += 1


class TableOfContents(Document):
    def __init__(self) -> None:
        super().__init__()
        self.write('{"version":1,"entries":[')
        self._first = True

    def member(
        self,
        name: bytes,
        inode: Inode,
        link: bytes | None,
        *,
        digest: bytes = b"",
        offset: int = 0,
        end: int = 0,
        rows: Iterable[Row] = (),
    ) -> None:
        """`digest` of the whole file, b"" when it has no bytes; `rows` where it has more than one chunk."""
        kind = tar_type(inode, link)
        entry: dict[str, Any] = {"type": _TYPES[kind], "name": _text(name)}
        if link is not None or inode.target:
            entry["linkName"] = _text(inode.target if link is None else link)
        entry["mode"] = inode.mode & 0o7777
        if digest:
            entry["size"] = inode.size
        entry |= {"uid": inode.uid, "gid": inode.gid, "modtime": rfc3339(inode.mtime_ns)}
        if kind in (b"3", b"4"):
            entry |= {"devMajor": os.major(inode.rdev), "devMinor": os.minor(inode.rdev)}
        if inode.xattrs and link is None:
            entry["xattrs"] = {_text(key): _base64(inode.xattrs[key]) for key in sorted(inode.xattrs)}
        if digest:
            entry |= {"digest": f"sha256:{digest.hex()}", "offset": offset, "endOffset": end}
        pending = entry
        for start, length, at, _, chunk in rows:
            if start:
                self._entry(pending)
                pending = {"type": "chunk", "name": _text(name), "offset": at, "chunkOffset": start}
            pending["chunkSize"] = length
            pending["chunkDigest"] = f"sha256:{(chunk or _zeros_digest(length)).hex()}"
            if not chunk:
                pending["chunkType"] = "zeros"
        self._entry(pending)

    def _entry(self, entry: dict[str, Any]) -> None:
        self.write(("" if self._first else ",") + _json(entry))
        self._first = False


def closing_frames(
    position: int, toc: TableOfContents, split: TarSplit, *, name_split: bool
) -> tuple[bytes, dict[str, str]]:
    """The last three frames of a layer, which begin at `position`, and the annotations that name them.

    Without `name_split` nothing says that there is a tar-split, and readers that insist on one take the layer whole.
    """
    packed_split = split.finish()
    trailer = f',"tarSplitDigest":"sha256:{hashlib.sha256(packed_split).hexdigest()}"' if name_split else ""
    toc.write(f"]{trailer}}}\n")
    packed_toc = toc.finish()
    toc_at = position + 8
    split_at = toc_at + len(packed_toc) + 8
    numbers = (toc_at, len(packed_toc), toc.length, _CRFS, split_at, len(packed_split), split.length)
    footer = b"".join(number.to_bytes(8, "little") for number in numbers) + _MAGIC
    annotations = {
        ANNOTATION + "manifest-checksum": f"sha256:{hashlib.sha256(packed_toc).hexdigest()}",
        ANNOTATION + "manifest-position": ":".join(map(str, numbers[:4])),
    }
    if name_split:
        annotations[ANNOTATION + "tarsplit-position"] = ":".join(map(str, numbers[4:]))
    return skippable(packed_toc) + skippable(packed_split) + skippable(footer), annotations


def is_utf8(name: bytes) -> bool:
    """Whether JSON can hold the name."""
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


@cache
def _zeros_digest(length: int) -> bytes:
    return hashlib.sha256(bytes(length)).digest()


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _text(name: bytes) -> str:
    """Bytes that are no UTF-8 become lone surrogates, which only Python reads back."""
    return name.decode("utf-8", "surrogateescape")
