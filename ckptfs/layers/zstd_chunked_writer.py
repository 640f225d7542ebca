"""Members in, a tar+zstd layer out, in the zstd:chunked dialect of containers/storage.

    tar headers | chunk | chunk | ...    zstd frames; a plain tar for who only decompresses
    skippable: columns of chunks and cells (model/index.py), for pages files
    skippable: table of contents | skippable: tar-split | skippable: footer      zstd_chunked_documents.py

A chunk is what the table of contents names; it is one frame or, where it is cut into cells, a frame for each cell.
Cells are what two dumps of a process share. The columns have BLAKE3 digests of both, which is what readers check; the
table of contents has the SHA-256 that its format demands. Streams: a payload is held 1 MiB at a time, whatever its
size. Compression runs in a few threads, the bytes come out in order and are the same every time (for one version of
libzstd). Reads no checkpoint and knows no registry; called by push/.
"""

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, repeat
from threading import local
from typing import Protocol

import zstandard
from fastcrc import crc64

from ckptfs.errors import FormatError
from ckptfs.layers.tar_encode import END, encode_header, padding, tar_name
from ckptfs.layers.zstd_chunked_documents import (
    TableOfContents,
    TarSplit,
    closing_frames,
    is_utf8,
    skippable,
)
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.index_columns import Row
from ckptfs.model.index_table import Table, encode_parts, encode_table
from ckptfs.model.oci import Descriptor, Digest
from ckptfs.model.packed import PackedExtents
from ckptfs.model.toc import Inode
from ckptfs.settings import KiB, MiB

MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+zstd"
GRID = 256 * KiB  # chunk of a file that nobody cut
CHUNK_DIGEST = ChunkDigest.BLAKE3  # of the chunks and cells of a `WrittenFile`
TABLE_ROWS = 2048  # a file with more chunks has their columns in the layer, not in the inline index: 512 MiB of pages

_LEVEL = 3  # 16 KiB frames of process memory: ratio 6.6 at 440 MB/s a core; level 4 gains 1 % and costs 35 %
_BATCH = 1 * MiB  # decoded bytes that are one piece of work for a compressing thread
_IN_FLIGHT = 8  # batches: bounds the memory, keeps two threads busy
_ZERO_RUN = 32 * MiB  # longest "zeros" chunk: readers bound the length of a chunk
_NO_DIGEST = bytes(32)  # in the column of digests: zeros


class Payload(Protocol):
    """Bytes of a member, front to back; what open(path, "rb", buffering=0) gives."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One member to write. `link`: a hard link to that path, `inode` being the target's.

    `cuts` gives the file's chunks in order, each as the lengths of its cells; what they leave over is cut every
    256 KiB.
    """

    path: bytes
    inode: Inode
    link: bytes | None = None
    payload: Callable[[], Payload] | None = None
    cuts: Callable[[], Iterable[Sequence[int]]] | None = None


@dataclass(slots=True)
class Columns:
    """Pieces of one file that follow one another, in the file and in the blob."""

    lengths: "array[int]" = field(default_factory=lambda: array("I"))
    sizes: "array[int]" = field(default_factory=lambda: array("I"))
    digests: bytearray = field(default_factory=bytearray)

    def append(self, length: int, size: int, digest: bytes) -> None:
        """`digest` of zeros is _NO_DIGEST; neighbours of zeros become one piece."""
        if digest == _NO_DIGEST and self.digests[-32:] == digest and self.lengths[-1] + length <= _ZERO_RUN:
            self.lengths[-1] += length
            self.sizes[-1] += size
        else:
            self.lengths.append(length)
            self.sizes.append(size)
            self.digests += digest

    def rows(self, offset: int) -> Iterator[Row]:
        """The pieces in order; the first lies at `offset` of the blob."""
        start = 0
        for i, (length, size) in enumerate(zip(self.lengths, self.sizes, strict=True)):
            digest = bytes(self.digests[32 * i : 32 * i + 32])
            yield start, length, offset, size, b"" if digest == _NO_DIGEST else digest
            start, offset = start + length, offset + size

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(slots=True)
class WrittenFile:
    """Where the bytes of one regular file lie: chunks from `offset` of the blob on, and cells where it has any.

    The tables say where the layer has these columns (model/index.py).
    """

    path: bytes
    inode: Inode
    offset: int
    digest: bytes = b""
    chunks: Columns = field(default_factory=Columns)
    cells: Columns = field(default_factory=Columns)
    chunk_table: Table | None = None
    cell_table: Table | None = None

    def rows(self) -> Iterator[Row]:
        """The file's chunks, in order."""
        return self.chunks.rows(self.offset)

    def extents(self, layer: int) -> PackedExtents:
        """The chunks as extents of layer number `layer`; zeros are gaps."""
        packed = PackedExtents(layer)
        for start, length, offset, size, digest in self.rows():
            if digest:
                packed.append(start, length, offset, size, digest)
        return packed


@dataclass(frozen=True, slots=True)
class WrittenLayer:
    """`diff_id` is the sha256 of the uncompressed tar; `files` in the order of the archive."""

    descriptor: Descriptor
    diff_id: Digest
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


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A chunk: (length, digest or zeros, frame) of each cell, the digest of all, and its SHA-256."""

    cells: list[tuple[int, bytes, bytes]]
    digest: bytes
    sha256: bytes


_threads = local()


def _compressor() -> zstandard.ZstdCompressor:
    compressor: zstandard.ZstdCompressor | None = getattr(_threads, "compressor", None)
    if compressor is None:  # a ZstdCompressor must not be used by two threads at once
        compressor = _threads.compressor = zstandard.ZstdCompressor(level=_LEVEL)
    return compressor


def _encode(batch: memoryview, cuts: list[Sequence[int]]) -> list[_Encoded]:
    """The chunks of a batch. Runs in the pool."""
    out = []
    end = 0
    for lengths in cuts:
        start, end = end, end + sum(lengths)
        cells = []
        at = start
        for length in lengths:
            cell = batch[at : at + length]
            at += length
            cells.append((length, _digest(cell), _compressor().compress(cell)))
        if len(cells) == 1:
            digest = cells[0][1]
        elif any(digest != _NO_DIGEST for _, digest, _ in cells):
            digest = CHUNK_DIGEST.of(batch[start:end])
        else:
            digest = _NO_DIGEST
        zeros = digest == _NO_DIGEST
        out.append(_Encoded(cells, digest, _NO_DIGEST if zeros else hashlib.sha256(batch[start:end]).digest()))
    return out


def _digest(data: memoryview) -> bytes:
    if data[0] == 0 and bytes(data) == bytes(len(data)):
        return _NO_DIGEST
    return CHUNK_DIGEST.of(data)


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
        self._pending = b""  # padding of the last payload: goes out with the next header, as tar-split wants it
        self._names: set[bytes] = set()
        self._clean = True  # every name is UTF-8: JSON can say it
        self._split = TarSplit()
        self._toc = TableOfContents()
        self._files: list[WrittenFile] = []

    def add(self, member: Member) -> None:
        inode, link = member.inode, member.link
        name = tar_name(member.path, inode, link)
        if name in self._names:
            raise FormatError(f"{_show(name)} comes twice", hint="a layer holds each path once")
        self._names.add(name)
        self._clean = self._clean and all(map(is_utf8, (name, link or inode.target, *inode.xattrs)))
        self._segment(self._pending + encode_header(member.path, inode, link))
        self._pending = b""
        if not inode.is_file or link is not None:
            self._split.payload(name, 0, b"")
            self._toc.member(name, inode, link)
            return
        written = WrittenFile(member.path, inode, self._position)
        self._files.append(written)
        listed = Columns()  # the chunks as the table of contents has them
        crc = self._payload(member, written, listed) if inode.size else b""
        self._pending = bytes(padding(inode.size))
        self._split.payload(name, inode.size, crc)
        rows = listed.rows(written.offset) if len(listed) > 1 else ()
        end = written.offset + sum(written.chunks.sizes)
        self._toc.member(name, inode, None, digest=written.digest, offset=written.offset, end=end, rows=rows)

    def finish(self, annotations: dict[str, str]) -> WrittenLayer:
        self._segment(self._pending + END)
        for file in self._files:
            if len(file.chunks) > TABLE_ROWS:
                data, parts = encode_parts(file.chunks.rows(file.offset))
                file.chunk_table = Table(self._position + 8, len(data), Digest.of(data), len(file.chunks), parts)
                self._out(skippable(data))
            if len(file.cells) > len(file.chunks):
                file.cell_table = self._table(file.cells, file.offset)
        frames, notes = closing_frames(self._position, self._toc, self._split, name_split=self._clean)
        self._out(frames)
        digest = Digest("sha256", self._blob.hexdigest())
        return WrittenLayer(
            Descriptor(MEDIA_TYPE, digest, self._position, {**annotations, **notes}),
            Digest("sha256", self._tar.hexdigest()),
            tuple(self._files),
        )

    def _table(self, columns: Columns, offset: int) -> Table:
        data = encode_table(columns.rows(offset))
        table = Table(self._position + 8, len(data), Digest.of(data), len(columns))
        self._out(skippable(data))
        return table

    def _payload(self, member: Member, written: WrittenFile, listed: Columns) -> bytes:
        """Cut, compress and write one payload; returns its crc64 (big-endian, as Go's hash.Sum)."""
        if member.payload is None:
            raise FormatError(f"{_show(member.path)} has a size but no payload")
        whole = hashlib.sha256()
        crc: int | None = None
        flying: deque[Future[list[_Encoded]]] = deque()
        source = member.payload()
        try:
            for cuts in _batches(member.cuts() if member.cuts else (), member.inode.size):
                batch = memoryview(bytearray(sum(map(sum, cuts))))
                read_exactly(source, batch, member.path)
                flying.append(self._pool.submit(_encode, batch, cuts))
                self._tar.update(batch)
                whole.update(batch)
                crc = crc64.go_iso(batch, crc)
                if len(flying) >= _IN_FLIGHT:
                    self._collect(flying.popleft(), written, listed)
            while flying:
                self._collect(flying.popleft(), written, listed)
        finally:
            source.close()
        written.digest = whole.digest()
        return (crc or 0).to_bytes(8, "big")

    def _collect(self, future: Future[list[_Encoded]], written: WrittenFile, listed: Columns) -> None:
        done = 0
        frames = []
        for chunk in future.result():
            length = size = 0
            for cell_length, digest, frame in chunk.cells:
                written.cells.append(cell_length, len(frame), digest)
                frames.append(frame)
                length, size = length + cell_length, size + len(frame)
            written.chunks.append(length, size, chunk.digest)
            listed.append(length, size, chunk.sha256)
            done += length
        self._out(b"".join(frames))
        self._progress(done)

    def _segment(self, data: bytes) -> None:
        """Bytes of the tar that are no payload: a frame of their own, and a tar-split segment."""
        self._tar.update(data)
        self._out(_compressor().compress(data))
        self._split.segment(data)

    def _out(self, data: bytes) -> None:
        self._blob.update(data)
        self._position += len(data)
        self._write(data)


def _batches(cuts: Iterable[Sequence[int]], size: int) -> Iterator[list[Sequence[int]]]:
    """Chunks that sum up to `size`, in lists of about _BATCH bytes. Cuts that end early go on as the grid.

    Cuts that go past the end are of another file: the chunk at the end is what is left, in one piece.
    """
    batch: list[Sequence[int]] = []
    total = 0
    for cut in chain(cuts, repeat((GRID,))):
        length = sum(cut)
        if length > size:
            cut, length = (size,), size
        batch.append(cut)
        total += length
        size -= length
        if total >= _BATCH or not size:
            yield batch
            batch, total = [], 0
        if not size:
            return


def read_exactly(source: Payload, into: memoryview, path: bytes) -> None:
    """Fill `into` with the next bytes of the file `path`; FormatError when there are not so many."""
    filled = 0
    while filled < len(into):
        count = source.readinto(into[filled:])
        if not count:
            raise FormatError(
                f"{_show(path)} ends {len(into) - filled} bytes early", hint="was it changed while it was read?"
            )
        filled += count


def _show(path: bytes) -> str:
    return repr(path.decode("utf-8", "replace"))[:200]
