"""TarScanner: a push parser that turns the bytes of a tar archive into entries.

Owns the order of things in an archive: which block follows which, and what an extended header changes. It never holds
payload, never seeks and knows no blob: whoever has the bytes (tar.py, stream.py, nested archives) feeds it or tells it
what was skipped. One thread at a time.
"""

import stat
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Protocol

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.layers.tar_header import (
    BLOCK,
    Header,
    SparseMap,
    check_sparse,
    decimal,
    gnu_sparse_block,
    number,
    owner,
    parse_header,
    pax_records,
    pax_sparse_map,
    pax_time,
    pax_xattrs,
    sparse_pairs,
)
from ckptfs.model.paths import device_number, normalise, show, symlink_target
from ckptfs.model.toc import Entry, Extent, Inode
from ckptfs.settings import Limits

_FILE_FLAGS = {
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"D": stat.S_IFDIR,  # GNU's incremental archives: a directory whose payload lists it
    b"6": stat.S_IFIFO,
}
# As in GNU tar and Go, a size in these headers counts no payload.
_NO_PAYLOAD = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
_GLOBAL_KEYS = frozenset((b"uid", b"gid", b"mtime"))
_NOTHING: Mapping[bytes, bytes] = {}
_FIXED_KEYS = frozenset((b"path", b"linkpath", b"size"))

Records = Sequence[tuple[bytes, bytes]]


class Placement(Protocol):
    """Where the archive's bytes lie, for those who will read them: `Grid`, or a file that is itself an archive."""

    def extents(self, segments: Sequence[tuple[int, int, int]]) -> Sequence[Extent]:
        """File bytes [start, start + length) lie at `position` of the archive, for each (start, length, position).

        Segments are sorted, not empty and do not overlap. Must not cost more than a few bytes for each of them.
        """


class TarScanner:
    """Feed it the archive from the front; it gives each entry as soon as its headers are complete.

    `at` is the position of the next byte to be fed; `wanted` the first one that matters: bytes in between may be fed
    or skipped. `end` is the archive's length where it is known: what reaches beyond it is refused at once.
    """

    def __init__(self, placement: Placement, limits: Limits, end: int | None = None) -> None:
        self.at = 0
        self.wanted = 0
        self.finished = False
        self._placement = placement
        self._limits = limits
        self._end = end
        self._count = 0
        self._between = True  # at the edge of an entry, where an archive may end without its zero blocks
        self._partial = bytearray()
        self._ready: list[Entry] = []
        self._parser = self._archive()
        self._need = next(self._parser)

    def feed(self, data: bytes | memoryview) -> list[Entry]:
        """Take the bytes at `at`; the entries that are known now. After the end of the archive they are ignored."""
        view = memoryview(data)
        start, self.at = self.at, self.at + len(view)
        while not self.finished:
            low = self.wanted + len(self._partial) - start
            if low >= len(view):
                break
            piece = view[low : low + self._need - len(self._partial)]
            if len(self._partial) + len(piece) < self._need:
                self._partial += piece
                break
            block = bytes(self._partial) + piece if self._partial else bytes(piece)
            self._partial.clear()
            self.wanted += len(block)
            try:
                self._need = self._parser.send(block)
            except StopIteration:
                self.finished = True
        ready, self._ready = self._ready, []
        return ready

    def skip_to(self, position: int) -> None:
        """The bytes up to `position` will not be fed; it must not lie beyond `wanted`."""
        if self._partial or not self.at <= position <= self.wanted:
            raise ValueError(f"cannot skip from {self.at} to {position}, byte {self.wanted} is wanted")
        self.at = position

    def close(self) -> None:
        """The archive ends at `at`: FormatError if something is missing."""
        if not self.finished and (self._partial or self.wanted > self.at or not self._between):
            raise FormatError(f"the tar archive is cut off after {self.at} bytes")

    # The grammar. Each generator is resumed with the bytes that it asked for, which lie at `wanted` before that.

    def _archive(self) -> Generator[int, bytes, None]:
        globals_: dict[bytes, bytes] = {}
        records: Records = ()
        long_name: bytes | None = None
        long_link: bytes | None = None
        while True:
            header = parse_header((yield BLOCK))
            if header is None:
                return
            self._between = False
            if header.flag in b"xXgLK":
                data = yield from self._extension(header)
                if header.flag == b"L":
                    long_name = data.partition(b"\0")[0]
                elif header.flag == b"K":
                    long_link = data.partition(b"\0")[0]
                elif header.flag == b"g":
                    globals_.update(_global_records(data))
                else:
                    records = list(pax_records(data))
                continue
            if header.flag == b"V":  # GNU volume label
                self._skip(header.payload)
            elif header.flag in (b"M", b"N"):
                raise FormatError("the tar archive is one volume of several, or older than GNU tar 1.11")
            else:
                if long_name is not None:
                    header.name = long_name
                if long_link is not None:
                    header.linkname = long_link
                yield from self._entry(header, globals_, records)
            records, long_name, long_link = (), None, None
            self._between = True

    def _extension(self, header: Header) -> Generator[int, bytes, bytes]:
        """The payload of a header that describes the next one."""
        if not 0 <= header.payload <= self._limits.pax_header_bytes:
            raise LimitExceeded(f"a tar extension header has {header.payload} bytes")
        if not header.payload:
            return b""
        self._check_end(header.payload)
        padded = yield header.payload + -header.payload % BLOCK
        return padded[: header.payload]

    def _entry(self, header: Header, globals_: Mapping[bytes, bytes], records: Records) -> Generator[int, bytes, None]:
        self._counted(1)
        pax = {**globals_, **dict(records)} if records or globals_ else _NOTHING
        if pax:
            _apply(pax, header)
        if header.payload < 0 or header.payload > self._limits.file_bytes:
            raise FormatError(f"the tar entry {show(header.name)} has the size {header.payload}")
        payload = 0 if header.flag in _NO_PAYLOAD else header.payload

        if header.flag == b"1":
            path = normalise(header.name, self._limits)
            self._ready.append(Entry(path, None, normalise(header.linkname, self._limits)))
            return
        # Every other letter is a regular file, as POSIX wants; before POSIX, a slash made it a directory.
        kind = _FILE_FLAGS.get(header.flag, stat.S_IFREG)
        if kind == stat.S_IFREG and b"GNU.sparse.name" not in pax and header.name.endswith(b"/"):
            kind = stat.S_IFDIR
        name = pax.get(b"GNU.sparse.name") or header.name
        path = normalise(name, self._limits)
        if not path and kind != stat.S_IFDIR:
            raise FormatError(f"the tar entry {show(name)} is the root and not a directory")
        inode = Inode(kind | header.mode, header.uid, header.gid, mtime_ns=header.mtime_ns)
        if records and (xattrs := pax_xattrs(records, self._limits)):
            inode.xattrs = xattrs
        if kind == stat.S_IFREG:
            yield from self._content(header, pax, records, inode)
        else:
            if kind == stat.S_IFLNK:
                inode.target = symlink_target(header.linkname, path, self._limits)
                inode.size = len(inode.target)
            elif kind in (stat.S_IFCHR, stat.S_IFBLK):
                inode.rdev = device_number(header.major, header.minor, path)
            self._skip(payload)
        self._ready.append(Entry(path, inode))

    def _content(
        self, header: Header, pax: Mapping[bytes, bytes], records: Records, inode: Inode
    ) -> Generator[int, bytes, None]:
        """Size and extents of a regular file; leaves `wanted` behind its payload."""
        sparse: SparseMap | None
        size = payload = header.payload
        if header.flag == b"S":
            size, sparse = yield from self._gnu_sparse(header.block)
        else:
            sparse = pax_sparse_map(records) if records else None
            if sparse is not None or b"GNU.sparse.major" in pax:
                size = decimal(pax.get(b"GNU.sparse.realsize") or pax.get(b"GNU.sparse.size", b""), "GNU.sparse.size")
            if b"GNU.sparse.major" in pax and sparse is None:
                before = self.wanted
                sparse = yield from self._pax_sparse_1(payload)
                payload -= self.wanted - before
        if not 0 <= size <= self._limits.file_bytes:
            raise FormatError(f"the tar entry {show(header.name)} has the size {size}")
        pieces: Iterable[tuple[int, int]]
        if sparse is None:
            pieces = ((0, size),) if size else ()
        else:
            self._counted(len(sparse))
            pieces = check_sparse(sparse, size, payload)
        segments = []
        position = self.wanted
        for start, length in pieces:
            segments.append((start, length, position))
            position += length
        self._skip(payload)
        inode.size = size
        inode.extents = self._placement.extents(segments)

    def _gnu_sparse(self, block: bytes) -> Generator[int, bytes, tuple[int, SparseMap]]:
        """Old GNU format: four pieces in the header, 21 in each block that follows while byte 482 or 504 says so."""
        size, sparse, more = number(block[483:495]), gnu_sparse_block(block, 386, 4), block[482]
        blocks: list[bytes] = []
        while more:
            if (len(blocks) + 1) * BLOCK > self._limits.pax_header_bytes:
                raise LimitExceeded("the map of a sparse file is longer than any tool writes")
            block = yield BLOCK
            blocks.append(block)
            more = block[504]
        for block in blocks:  # only now: what is refused costs nothing
            sparse += gnu_sparse_block(block, 0, 21)
        return size, sparse

    def _pax_sparse_1(self, payload: int) -> Generator[int, bytes, SparseMap]:
        """Format 1.0: the map stands before the data, decimal numbers in lines, padded to a block."""
        text = bytearray()
        lines, wanted = 0, 1
        while lines < wanted:
            if len(text) + BLOCK > min(payload, self._limits.pax_header_bytes):
                raise LimitExceeded("the map of a sparse file is longer than its payload, or than any tool writes")
            block = yield BLOCK
            if not lines and b"\n" in block:
                wanted = 1 + 2 * decimal(bytes(text) + block.partition(b"\n")[0], "a sparse map")
            text += block
            lines += block.count(b"\n")
        return sparse_pairs(bytes(text).split(b"\n", wanted)[1:wanted])

    # Bookkeeping.

    def _skip(self, payload: int) -> None:
        if payload < 0:  # of a volume label: the scan would go back, for ever
            raise FormatError(f"a tar entry at byte {self.wanted} has the size {payload}")
        self._check_end(payload)
        self.wanted += payload + -payload % BLOCK

    def _check_end(self, payload: int) -> None:
        if self._end is not None and self.wanted + payload > self._end:
            raise FormatError(f"a tar entry at byte {self.wanted} reaches {payload} bytes further, beyond the archive")

    def _counted(self, more: int) -> None:
        self._count += more
        if self._count > self._limits.toc_entries:
            raise LimitExceeded(f"the tar archive has more than {self._limits.toc_entries} entries")


def _apply(pax: Mapping[bytes, bytes], header: Header) -> None:
    """The header as its extended headers change it; an empty value takes a keyword back."""
    header.name = pax.get(b"path") or header.name
    header.linkname = pax.get(b"linkpath") or header.linkname
    if text := pax.get(b"uid"):
        header.uid = owner(decimal(text, "uid"))
    if text := pax.get(b"gid"):
        header.gid = owner(decimal(text, "gid"))
    if text := pax.get(b"mtime"):
        header.mtime_ns = pax_time(text)
    if text := pax.get(b"size"):
        header.payload = decimal(text, "size")


def _global_records(data: bytes) -> dict[bytes, bytes]:
    """What a global header may change for all that follows. A path or a size for everybody is an attack."""
    found = {}
    for keyword, value in pax_records(data):
        if keyword in _FIXED_KEYS or keyword.startswith(b"GNU.sparse."):
            raise FormatError(f"a global PAX header sets {show(keyword)}")
        if keyword in _GLOBAL_KEYS:
            found[keyword] = value
    return found
