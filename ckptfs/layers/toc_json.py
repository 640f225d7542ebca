"""The JSON table of contents that eStargz and zstd:chunked share (CRFS lineage), from bytes to entries.

Owns every check on it: the document comes from outside, and its digest says only that it is the one that was pushed.
Differences between the dialects: containers/storage gives `endOffset` with each file and marks chunks of zeros; the
stargz snapshotter gives neither (a chunk ends where the next one begins) and has `innerOffset`. Sources:
containers/storage pkg/chunked/internal/minimal/compression.go, stargz-snapshotter estargz/types.go.
"""

import base64
import binascii
import json
import re
import stat
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.model.packed import OnlyExtent, PackedExtents, packed
from ckptfs.model.paths import check_xattr, device_number, normalise, symlink_target
from ckptfs.model.toc import Chunk, Entry, Extent, Inode
from ckptfs.settings import KiB, Limits

_KINDS = {
    "reg": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
}
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?(Z|[+-]\d\d:\d\d)\Z")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_INT = (1 << 63) - 1
_SLACK = 132 * KiB  # a zstd block, which is decoded as a whole, holds at most 128 KiB (RFC 8878, 3.1.1.2.4)
_UNUSUAL = frozenset(("chunkOffset", "chunkType", "innerOffset"))  # a file that is one chunk has none of these

# offset, inner, start in the file, length, digest; chunks of zeros are rows of length 0 that only end the one before
_Row = tuple[int, int, int, int, bytes]


def parse_toc(text: str, *, end: int, layer: int, limits: Limits) -> list[Entry]:
    """The entries of a table of contents, in its order. Payload lies in [0, end) of the blob.

    Every chunk has a digest. FormatError or LimitExceeded for whatever is not a sound table.
    """
    return _Parser(end, layer, limits).parse(text)


class _Parser:
    def __init__(self, end: int, layer: int, limits: Limits) -> None:
        self._end = end
        self._layer = layer
        self._limits = limits
        self._times: dict[str, int] = {}
        self._modes: dict[int, int] = {}  # a number is an object of 32 bytes: files share theirs
        self._small = PackedExtents(layer)  # of all files with one chunk
        self._entries: list[Entry] = []
        # The regular file whose chunks are being read
        self._file: Inode | None = None
        self._name = ""
        self._rows: list[_Row] = []
        self._position = 0
        self._last = 0  # endOffset
        # Files whose chunks end where the next one begins, wherever that is: the rows of the small ones in columns
        self._open: list[tuple[Inode, list[_Row]]] = []
        self._open_small = array("I")

    def parse(self, text: str) -> list[Entry]:
        count = 0
        for item in _items(text):
            count += 1
            if count > self._limits.toc_entries:
                raise LimitExceeded(f"the table of contents has more than {self._limits.toc_entries} entries")
            if type(item) is not dict:
                raise FormatError("an entry of the table of contents is not an object")
            kind = item.get("type")
            if kind == "chunk":
                self._chunk(item)
                continue
            self._finish_file()
            self._entries.append(self._entry(item, kind))
        self._finish_file()
        self._finish_open()
        return self._entries

    def _entry(self, item: Mapping[str, Any], kind: object) -> Entry:
        name = item.get("name")
        if type(name) is not str:
            raise FormatError("an entry of the table of contents has no name")
        path = normalise(_encoded(name), self._limits)
        if kind == "hardlink":
            return Entry(path, None, normalise(_encoded(item.get("linkName")), self._limits))
        file_type = _KINDS.get(kind) if type(kind) is str else None
        if file_type is None:
            raise FormatError(f"{name!r:.80} has the type {kind!r:.40}")
        if not path and file_type != stat.S_IFDIR:
            raise FormatError("the root of the table of contents is not a directory")
        modtime = item.get("modtime")
        mode = file_type | _integer(item, "mode") & 0o7777
        inode = Inode(
            self._modes.setdefault(mode, mode),
            _integer(item, "uid", 0xFFFFFFFF) if "uid" in item else 0,
            _integer(item, "gid", 0xFFFFFFFF) if "gid" in item else 0,
            mtime_ns=self._time(modtime) if modtime is not None else 0,
        )
        xattrs = item.get("xattrs")
        if xattrs is not None and (found := self._xattrs(xattrs)):
            inode.xattrs = found
        if file_type == stat.S_IFREG:
            self._begin_file(item, name, inode)
        elif file_type == stat.S_IFLNK:
            inode.target = symlink_target(_encoded(item.get("linkName")), path, self._limits)
            inode.size = len(inode.target)
        elif file_type in (stat.S_IFCHR, stat.S_IFBLK):
            inode.rdev = device_number(_integer(item, "devMajor"), _integer(item, "devMinor"), path)
        return Entry(path, inode)

    # Content: one `reg`, then a `chunk` for each chunk but the first.

    def _begin_file(self, item: Mapping[str, Any], name: str, inode: Inode) -> None:
        inode.size = size = _integer(item, "size", self._limits.file_bytes)
        if not size:
            return
        self._file, self._name = inode, name
        self._rows, self._position = [], 0
        self._last = _integer(item, "endOffset", self._end) if "endOffset" in item else 0
        length = (_integer(item, "chunkSize") if "chunkSize" in item else 0) or size
        digest = item.get("chunkDigest") or (item.get("digest") if length == size else None)
        if length == size and not item.keys() & _UNUSUAL and length <= self._limits.chunk_bytes:
            self._file = None
            self._only(inode, size, _integer(item, "offset", self._end), _digest(digest))
        else:
            self._add(item, length, digest)

    def _only(self, inode: Inode, length: int, offset: int, digest: bytes) -> None:
        """The file is one chunk, as most are: it needs a row and no object for it."""
        size = 0
        if self._last:
            size = _size((offset, 0, 0, length, digest), self._last)
        else:
            self._open_small.append(len(self._small))
        inode.extents = OnlyExtent(self._small, length, offset, size, digest)

    def _chunk(self, item: Mapping[str, Any]) -> None:
        inode = self._file
        if inode is None or item.get("name") != self._name:
            raise FormatError("the table of contents has a chunk that does not follow its file")
        length = _integer(item, "chunkSize") or inode.size - self._position
        self._add(item, length, item.get("chunkDigest"))

    def _add(self, item: Mapping[str, Any], length: int, digest: object) -> None:
        assert self._file is not None
        position = self._position
        if item.get("chunkOffset", 0) != position or length <= 0 or length > self._file.size - position:
            raise FormatError(f"the chunks of {self._name!r:.80} overlap, leave holes or leave the file")
        self._position = position + length
        offset = _integer(item, "offset", self._end)
        if item.get("chunkType") == "zeros":
            if self._last and "offset" in item:  # without endOffset they would close nothing
                self._rows.append((offset, 0, position, 0, b""))
            return
        inner = _integer(item, "innerOffset", self._limits.chunk_bytes) if "innerOffset" in item else 0
        if inner + length > self._limits.chunk_bytes:
            raise LimitExceeded(
                f"{self._name!r:.80} has a chunk of {length} bytes, more than {self._limits.chunk_bytes}",
                hint="push the image again as zstd:chunked with ckptfs push, or as plain gzip or zstd",
            )
        self._rows.append((offset, inner, position, length, _digest(digest)))

    def _finish_file(self) -> None:
        inode, self._file = self._file, None
        if inode is None:
            return
        if self._position != inode.size:
            raise FormatError(f"the chunks of {self._name!r:.80} are {self._position} bytes, the file {inode.size}")
        rows = self._rows
        if not self._last:
            self._open.append((inode, rows))
        elif rows:  # none of a file of zeros that does not say where they are
            self._place(inode, rows, [*[row[0] for row in rows[1:]], self._last])

    def _finish_open(self) -> None:
        small = self._small
        offsets = array(
            "Q", sorted({row[0] for _, rows in self._open for row in rows} | {*map(small.offset, self._open_small)})
        )

        def following(offset: int) -> int:
            at = bisect_right(offsets, offset)
            return offsets[at] if at < len(offsets) else self._end

        for at in self._open_small:
            row = small.at(at)
            offset = row.chunk.offset
            small.resize(at, _size((offset, 0, 0, row.length, b""), following(offset)))
        for inode, rows in self._open:
            self._place(inode, rows, [following(row[0]) for row in rows])

    def _place(self, inode: Inode, rows: list[_Row], ends: list[int]) -> None:
        """Extents from rows and from where their encoded bytes end."""
        extents = [self._extent(row, end) for row, end in zip(rows, ends, strict=True) if row[3]]
        inode.extents = tuple(extents) if any(row[1] for row in rows) else packed(extents)

    def _extent(self, row: _Row, end: int) -> Extent:
        offset, inner, start, length, digest = row
        chunk = Chunk(digest, self._layer, offset, _size(row, end), length, digest, inner)
        return Extent(start, length, chunk)

    # Values.

    def _time(self, text: object) -> int:
        """RFC 3339 as nanoseconds since the epoch. Entries share most of their times."""
        if type(text) is not str:
            raise FormatError(f"the table of contents has the time {text!r:.60}")
        known = self._times.get(text)
        if known is not None:
            return known
        value = rfc3339(text)
        self._times[text] = value
        return value

    def _xattrs(self, value: object) -> dict[bytes, bytes]:
        if type(value) is not dict:
            raise FormatError("the table of contents has xattrs that are not an object")
        found = {}
        for key, text in value.items():
            try:
                raw = base64.b64decode(text, validate=True) if type(text) is str else None
            except (binascii.Error, ValueError):
                raw = None
            if raw is None:
                raise FormatError(f"the table of contents has the xattr {key!r:.60} that is not base64")
            name = _encoded(key)
            check_xattr(name, raw, self._limits)
            found[name] = raw
        return found


def _size(row: _Row, end: int) -> int:
    """Of the encoded bytes: what the chunk can need at most; up to `end` there may be headers of many other files."""
    if end <= row[0]:
        raise FormatError("the table of contents has a chunk without bytes, or chunks out of order")
    most = row[1] + row[3]
    return min(end - row[0], most + (most >> 8) + _SLACK)


def rfc3339(text: str) -> int:
    """Nanoseconds since the epoch; FormatError for what is no time."""
    match = _TIME.match(text)
    try:
        if match is None:
            raise ValueError(text)
        whole, fraction, zone = match.groups()
        moment = datetime.fromisoformat(whole + ("+00:00" if zone == "Z" else zone))
    except ValueError:
        raise FormatError(f"the table of contents has the time {text!r:.60}") from None
    since = moment - _EPOCH
    return (since.days * 86400 + since.seconds) * 1_000_000_000 + int((fraction or "0").ljust(9, "0"))


def _integer(item: Mapping[str, Any], key: str, most: int = _MAX_INT) -> int:
    """Absent and null are 0."""
    value = item.get(key)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= most:
        raise FormatError(f"the table of contents has {key} = {value!r:.40}")
    return value


def _encoded(text: object) -> bytes:
    """JSON has no bytes: names that are not UTF-8 come as lone surrogates (PEP 383) from tools that keep them."""
    if type(text) is not str:
        raise FormatError("the table of contents has a name that is not a string")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise FormatError(f"the table of contents has the name {text!r:.80}") from None


def _digest(text: object) -> bytes:
    if type(text) is str and len(text) == 71 and text.startswith("sha256:"):
        try:
            found = bytes.fromhex(text[7:])
        except ValueError:
            found = b""
        if len(found) == 32:
            return found
    raise FormatError(f"a chunk in the table of contents has the digest {text!r:.80}", hint="it has to be a sha256")


# JSON, one entry at a time: 100 000 entries as dicts all at once would be 100 MB.


def _items(text: str) -> Iterator[object]:
    """The items of `entries` in the document, in order. FormatError unless it is an object of version 1."""
    try:
        yield from _top_level(text)
    except (ValueError, RecursionError, IndexError) as error:
        raise FormatError(f"the table of contents is not JSON ({type(error).__name__})") from None


def _top_level(text: str) -> Iterator[object]:
    value = _DECODER.raw_decode
    seen = set()
    at = _expect(text, 0, "{")
    more = True
    while more:
        key, at = value(text, at)
        if type(key) is not str or key in seen:
            raise FormatError(f"the table of contents has {key!r:.40} twice, or as a key")
        seen.add(key)
        at = _expect(text, at, ":")
        if key == "entries" and not text.startswith("null", at):  # what Go makes of a layer without any
            at = _expect(text, at, "[")
            items = text[at] != "]"
            at += not items
            while items:
                item, at = value(text, at)
                yield item
                if text.startswith(",{", at):  # nothing to look at, as most writers leave no spaces
                    at += 1
                else:
                    items, at = _separated(text, at, "]")
        else:
            field, at = value(text, at)
            if key == "version" and field != 1:
                raise FormatError(f"the table of contents has version {field!r:.40}", hint="ckptfs reads version 1")
        more, at = _separated(text, at, "}")
    if not {"version", "entries"} <= seen:
        raise FormatError("the table of contents has no version or no entries")


def _expect(text: str, at: int, character: str) -> int:
    """The position behind `character` and the spaces around it."""
    at = _behind_space(text, at)
    if text[at] != character:
        raise ValueError(text[at])
    return _behind_space(text, at + 1)


def _separated(text: str, at: int, closing: str) -> tuple[bool, int]:
    """Whether a comma follows and not the closing bracket, and the position behind it."""
    at = _behind_space(text, at)
    if text[at] == closing:
        return False, at + 1
    return True, _expect(text, at, ",")


def _behind_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


_DECODER = json.JSONDecoder(parse_constant=_refuse)
