"""Members in, a tar+zstd layer out, in the zstd:chunked dialect of containers/storage.

    tar headers | chunk | chunk | ...    each a zstd frame of its own; a plain tar for who only decompresses
    skippable: columns of chunks (model/index.py), for very large files
    skippable: table of contents (JSON, zstd) | skippable: tar-split (JSON lines, zstd) | skippable: footer, 64 bytes

Sources: containers/storage pkg/chunked/internal/minimal/compression.go for the frames, the annotations and the footer;
vbatts/tar-split tar/storage/entry.go and tar/asm/iterate.go for the tar-split. Streams: a payload is held 1 MiB at a
time, whatever its size. Compression runs in a few threads, the bytes come out in order and are the same every time (for
one version of libzstd). Reads no checkpoint and knows no registry; called by push/.
"""

import base64
import hashlib
import json
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import chain, repeat
from threading import local
from typing import Any, Protocol

import zstandard
from fastcrc import crc64

from ckptfs.errors import FormatError
from ckptfs.layers.tar_encode import END, encode_header, padding, tar_name, tar_type
from ckptfs.model.index import Table, encode_table
from ckptfs.model.index_columns import Row
from ckptfs.model.oci import Descriptor, Digest
from ckptfs.model.packed import PackedExtents
from ckptfs.model.toc import Inode
from ckptfs.settings import KiB, MiB

MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+zstd"
ANNOTATION = "io.github.containers.zstd-chunked."

_LEVEL = 3  # 256 KiB frames of process memory: ratio 6.7 at 500 MB/s a core; levels above 3 cost 3x the time for 4 %
_BATCH = 1 * MiB  # decoded bytes that are one piece of work for a compressing thread
_IN_FLIGHT = 8  # batches: bounds the memory, keeps two threads busy
_ZERO_RUN = 32 * MiB  # longest "zeros" chunk: readers bound the length of a chunk
_SKIPPABLE = b"\x50\x2a\x4d\x18"
_MAGIC = b"GNUlInUx"
_CRFS = 1  # the only type of table of contents that there is
_TYPES = {b"0": "reg", b"1": "hardlink", b"2": "symlink", b"3": "char", b"4": "block", b"5": "dir", b"6": "fifo"}
_NO_DIGEST = bytes(32)  # in the column of digests: a chunk of zeros
GRID = 256 * KiB  # chunk of a file that nobody cut
TABLE_ROWS = 8192  # a file with more chunks has its columns in the layer too: fewer always fit into the inline index


class Payload(Protocol):
    """Bytes of a member, front to back; what open(path, "rb", buffering=0) gives."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One member to write. `link`: a hard link to that path, `inode` being the target's.

    `cuts` are the lengths of the file's chunks, in order; the last is what is left. Without cuts every 256 KiB.
    """

    path: bytes
    inode: Inode
    link: bytes | None = None
    payload: Callable[[], Payload] | None = None
    cuts: Callable[[], Iterable[int]] | None = None


@dataclass(slots=True)
class WrittenFile:
    """Where the bytes of one regular file lie. Frames follow one another from `offset` on; `table`: model/index.py."""

    path: bytes
    inode: Inode
    offset: int
    digest: bytes = b""
    lengths: "array[int]" = field(default_factory=lambda: array("I"))
    sizes: "array[int]" = field(default_factory=lambda: array("I"))
    digests: bytearray = field(default_factory=bytearray)
    table: Table | None = None

    def rows(self) -> Iterator[Row]:
        """The file's chunks, in order."""
        start, offset = 0, self.offset
        for i, (length, size) in enumerate(zip(self.lengths, self.sizes, strict=True)):
            digest = bytes(self.digests[32 * i : 32 * i + 32])
            yield start, length, offset, size, b"" if digest == _NO_DIGEST else digest
            start, offset = start + length, offset + size

    def extents(self, layer: int) -> PackedExtents:
        """As extents of layer number `layer`; zeros are gaps."""
        packed = PackedExtents(layer)
        for start, length, offset, size, digest in self.rows():
            if digest:
                packed.append(start, length, offset, size, digest)
        return packed


@dataclass(frozen=True, slots=True)
class WrittenLayer:
    """`diff_id` is the sha256 of the uncompressed tar, `tar_size` its length; `files` in the order of the archive."""

    descriptor: Descriptor
    diff_id: Digest
    tar_size: int
    files: tuple[WrittenFile, ...]


def write_layer(
    members: Iterable[Member],
    write: Callable[[bytes], object],
    *,
    annotations: dict[str, str] | None = None,
    threads: int = 2,
    progress: Callable[[int], object] | None = None,
) -> WrittenLayer:
    """Write `members` in the given order through `write`. `progress` is told of payload bytes as they are done.

    A path may come once only (tar-split's rule). FormatError when a payload is shorter than its inode says.
    """
    with ThreadPoolExecutor(threads, "compress") as pool:
        writer = _Writer(write, pool, progress or (lambda _: None))
        try:
            for member in members:
                writer.add(member)
            return writer.finish(annotations or {})
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_threads = local()


def _compressor() -> zstandard.ZstdCompressor:
    compressor: zstandard.ZstdCompressor | None = getattr(_threads, "compressor", None)
    if compressor is None:  # a ZstdCompressor must not be used by two threads at once
        compressor = _threads.compressor = zstandard.ZstdCompressor(level=_LEVEL)
    return compressor


def _encode(batch: memoryview, cuts: list[int]) -> list[tuple[int, bytes, bytes]]:
    """(length, frame, sha256 or zeros) of each chunk of a batch. Runs in the pool."""
    out = []
    at = 0
    for length in cuts:
        chunk = batch[at : at + length]
        at += length
        zeros = chunk[0] == 0 and bytes(chunk) == bytes(length)
        digest = _NO_DIGEST if zeros else hashlib.sha256(chunk).digest()
        out.append((length, _compressor().compress(chunk), digest))
    return out


class _Document:
    """A JSON document that is compressed while it is written: only its compressed bytes are held."""

    def __init__(self) -> None:
        self._stream = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
        self._parts: list[bytes] = []
        self.length = 0

    def write(self, text: str) -> None:
        data = text.encode()
        self.length += len(data)
        self._parts.append(self._stream.compress(data))

    def finish(self) -> bytes:
        self._parts.append(self._stream.flush())
        return b"".join(self._parts)


class _Writer:
    def __init__(
        self, write: Callable[[bytes], object], pool: ThreadPoolExecutor, progress: Callable[[int], object]
    ) -> None:
        self._write = write
        self._pool = pool
        self._progress = progress
        self._blob = hashlib.sha256()
        self._tar = hashlib.sha256()
        self._position = 0
        self._tar_size = 0
        self._pending = b""  # padding of the last payload: goes out with the next header, as tar-split wants it
        self._names: set[bytes] = set()
        self._clean = True  # every name is UTF-8: JSON can say it
        self._split = _Document()
        self._split_entries = 0
        self._toc = _Document()
        self._toc.write('{"version":1,"entries":[')
        self._first = True
        self._files: list[WrittenFile] = []

    def add(self, member: Member) -> None:
        inode, link = member.inode, member.link
        name = tar_name(member.path, inode, link)
        if name in self._names:
            raise FormatError(f"{_show(name)} comes twice", hint="a layer holds each path once")
        self._names.add(name)
        self._clean = self._clean and all(map(_is_utf8, (name, link or inode.target, *inode.xattrs)))
        header = encode_header(member.path, inode, link)
        self._segment(self._pending + header)
        self._pending = b""
        size = inode.size if inode.is_file and link is None else 0
        written = WrittenFile(member.path, inode, self._position)
        crc = self._payload(member, written) if size else b""
        self._tar_split(
            {
                "type": 1,
                **_split_name(name),
                **({"size": size} if size else {}),
                "payload": _base64(crc) if crc else None,
            }
        )
        self._contents(name, member, written)
        if size:
            self._pending = bytes(padding(size))
        if inode.is_file and link is None:
            self._files.append(written)

    def finish(self, annotations: dict[str, str]) -> WrittenLayer:
        self._segment(self._pending + END)
        split, split_length = self._split.finish(), self._split.length
        digest = f',"tarSplitDigest":"{Digest.of(split)}"' if self._clean else ""
        self._toc.write(f"]{digest}}}\n")
        for file in self._files:
            if len(file.lengths) > TABLE_ROWS:
                table = encode_table(file.rows())
                file.table = Table(self._position + 8, len(table), Digest.of(table), len(file.lengths))
                self._out(_skippable(table))
        toc, toc_length = self._toc.finish(), self._toc.length
        toc_at = self._position + 8
        self._out(_skippable(toc))
        split_at = self._position + 8
        self._out(_skippable(split))
        numbers = (toc_at, len(toc), toc_length, _CRFS, split_at, len(split), split_length)
        self._out(_skippable(b"".join(n.to_bytes(8, "little") for n in numbers) + _MAGIC))
        notes = {
            ANNOTATION + "manifest-checksum": str(Digest.of(toc)),
            ANNOTATION + "manifest-position": f"{toc_at}:{len(toc)}:{toc_length}:{_CRFS}",
        }
        if self._clean:
            notes[ANNOTATION + "tarsplit-position"] = f"{split_at}:{len(split)}:{split_length}"
        return WrittenLayer(
            Descriptor(MEDIA_TYPE, Digest("sha256", self._blob.hexdigest()), self._position, {**annotations, **notes}),
            Digest("sha256", self._tar.hexdigest()),
            self._tar_size,
            tuple(self._files),
        )

    # -- payloads ------------------------------------------------------------------------------------------------------

    def _payload(self, member: Member, written: WrittenFile) -> bytes:
        """Cut, compress and write one payload; returns its crc64 (big-endian, as Go's hash.Sum)."""
        if member.payload is None:
            raise FormatError(f"{_show(member.path)} has a size but no payload")
        whole = hashlib.sha256()
        crc: int | None = None
        flying: deque[Future[list[tuple[int, bytes, bytes]]]] = deque()
        source = member.payload()
        try:
            for cuts in _batches(member.cuts() if member.cuts else (), member.inode.size):
                batch = memoryview(bytearray(sum(cuts)))
                _read_exactly(source, batch, member.path)
                flying.append(self._pool.submit(_encode, batch, cuts))
                self._tar.update(batch)
                whole.update(batch)
                crc = crc64.go_iso(batch, crc)
                if len(flying) >= _IN_FLIGHT:
                    self._collect(flying.popleft(), written)
            while flying:
                self._collect(flying.popleft(), written)
        finally:
            source.close()
        self._tar_size += member.inode.size
        written.digest = whole.digest()
        return (crc or 0).to_bytes(8, "big")

    def _collect(self, future: Future[list[tuple[int, bytes, bytes]]], written: WrittenFile) -> None:
        done = 0
        frames = []
        lengths, sizes, digests = written.lengths, written.sizes, written.digests
        for length, frame, digest in future.result():
            frames.append(frame)
            done += length
            if digest == _NO_DIGEST and digests[-32:] == digest and lengths[-1] + length <= _ZERO_RUN:
                lengths[-1] += length
                sizes[-1] += len(frame)
            else:
                lengths.append(length)
                sizes.append(len(frame))
                digests += digest
        self._out(b"".join(frames))
        self._progress(done)

    # -- documents -----------------------------------------------------------------------------------------------------

    def _contents(self, name: bytes, member: Member, written: WrittenFile) -> None:
        inode, link = member.inode, member.link
        kind = tar_type(inode, link)
        entry: dict[str, Any] = {"type": _TYPES[kind], "name": _text(name)}
        if link is not None or inode.target:
            entry["linkName"] = _text(inode.target if link is None else link)
        entry["mode"] = inode.mode & 0o7777
        if written.digest:
            entry["size"] = inode.size
        entry["uid"], entry["gid"] = inode.uid, inode.gid
        entry["modtime"] = _rfc3339(inode.mtime_ns)
        if kind in (b"3", b"4"):
            entry["devMajor"], entry["devMinor"] = os.major(inode.rdev), os.minor(inode.rdev)
        if inode.xattrs and link is None:
            entry["xattrs"] = {_text(key): _base64(inode.xattrs[key]) for key in sorted(inode.xattrs)}
        if written.digest:
            entry["digest"] = f"sha256:{written.digest.hex()}"
            entry["offset"] = written.offset
            entry["endOffset"] = written.offset + sum(written.sizes)
        if len(written.lengths) < 2:
            self._entry(entry)
            return
        for start, length, offset, _, digest in written.rows():
            if start:
                entry = {"type": "chunk", "name": _text(name), "offset": offset, "chunkOffset": start}
            entry["chunkSize"] = length
            entry["chunkDigest"] = f"sha256:{(digest or _zeros_digest(length)).hex()}"
            if not digest:
                entry["chunkType"] = "zeros"
            self._entry(entry)

    def _entry(self, entry: dict[str, Any]) -> None:
        self._toc.write(("" if self._first else ",") + _json(entry))
        self._first = False

    def _segment(self, data: bytes) -> None:
        """Bytes of the tar that are no payload: a frame of their own, and a tar-split segment."""
        self._tar.update(data)
        self._tar_size += len(data)
        self._out(_compressor().compress(data))
        self._tar_split({"type": 2, "payload": _base64(data)})

    def _tar_split(self, entry: dict[str, Any]) -> None:
        self._split.write(_json({**entry, "position": self._split_entries}) + "\n")
        self._split_entries += 1

    def _out(self, data: bytes) -> None:
        self._blob.update(data)
        self._position += len(data)
        self._write(data)


@cache
def _zeros_digest(length: int) -> bytes:
    return hashlib.sha256(bytes(length)).digest()


def _batches(cuts: Iterable[int], size: int) -> Iterator[list[int]]:
    """Chunk lengths that sum up to `size`, in lists of about _BATCH bytes; cuts that end early go on as the grid."""
    batch: list[int] = []
    total = 0
    for cut in chain(cuts, repeat(GRID)):
        length = min(cut, size)
        batch.append(length)
        total += length
        size -= length
        if total >= _BATCH or not size:
            yield batch
            batch, total = [], 0
        if not size:
            return


def _read_exactly(source: Payload, into: memoryview, path: bytes) -> None:
    filled = 0
    while filled < len(into):
        count = source.readinto(into[filled:])
        if not count:
            raise FormatError(
                f"{_show(path)} ends {len(into) - filled} bytes early", hint="was it changed while it was read?"
            )
        filled += count


def _skippable(data: bytes) -> bytes:
    return _SKIPPABLE + len(data).to_bytes(4, "little") + data


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _text(name: bytes) -> str:
    """Bytes that are no UTF-8 become lone surrogates, which only Python reads back."""
    return name.decode("utf-8", "surrogateescape")


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split_name(name: bytes) -> dict[str, str]:
    return {"name": name.decode()} if _is_utf8(name) else {"name_raw": _base64(name)}


def _show(path: bytes) -> str:
    return repr(path.decode("utf-8", "replace"))[:200]


def _rfc3339(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    fraction = f".{rest:09}".rstrip("0") if rest else ""
    return f"{when:%Y-%m-%dT%H:%M:%S}{fraction}Z".rjust(20 + len(fraction), "0")
