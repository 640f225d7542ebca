"""The bytes of the files of a pull: fetched in parallel, each chunk once, written to all files that it belongs to.

Chunks that can be fetched one by one go from the network to the files without a stop between, checked against their
digests. A plain tar has one digest, of everything: it comes as one stream that is hashed, whatever its scan has read
before. What came while layers were scanned (gzip and zstd, which are streams) lies in the pull's own cache. Owns no
names: destination.py makes the files.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ckptfs.engine.disk import Buffer
from ckptfs.engine.fetch import Fetcher
from ckptfs.errors import IntegrityError
from ckptfs.layers import Layer, right_as_a_whole
from ckptfs.model.blob import Blob, HashedStream
from ckptfs.model.toc import Chunk, Inode, piece_of
from ckptfs.pull.destination import Destination, Directories, translated
from ckptfs.settings import MiB, Sizes

_EXTENT = 8 * MiB  # of a blob: what one request fetches
_NO_LAYER = -1  # of chunks that were made up here (Fetcher.keep_file)
_OPEN = 128  # files that are open although nobody is writing to them at the moment


class File:
    """A regular file; whole when all its pieces have been written, by whatever threads."""

    def __init__(self, path: bytes, inode: Inode) -> None:
        self.path = path
        self.inode = inode
        self.lacking = 0  # pieces
        self.lock = threading.Lock()
        self.fd = -1
        self.made = False


@dataclass(frozen=True, slots=True)
class Piece:
    """File bytes [start, start + length) are chunk bytes [skip, skip + length)."""

    file: File
    start: int
    length: int
    skip: int


Wanted = tuple[Chunk, list[Piece]]


class Contents:
    """All that has to be written. `work` is run by several threads at once, and ends when nothing is left to do.

    late   asks the event loop for a chunk, the slow way.
    """

    def __init__(
        self, fetcher: Fetcher, destination: Destination, sizes: Sizes, late: Callable[[Chunk], Buffer]
    ) -> None:
        self.total = self.written = 0  # bytes
        self._fetcher = fetcher
        self._destination = destination
        self._sizes = sizes
        self._late = late
        self._wanted: dict[int, dict[Chunk, list[Piece]]] = {}
        self._jobs: Iterator[Callable[[_Writer], None]] = iter(())
        self._lock = threading.Lock()
        self._writers: list[_Writer] = []
        self._open: set[File] = set()
        self.stopped = False

    def add(self, path: bytes, inode: Inode) -> None:
        """A file with bytes. Before any `work`."""
        file = File(path, inode)
        for extent in inode.extents:
            chunks = self._wanted.setdefault(extent.chunk.layer, {})
            chunks.setdefault(extent.chunk, []).append(Piece(file, extent.start, extent.length, extent.skip))
            file.lacking += 1
            self.total += extent.length

    def prepare(self) -> None:
        """All files have been added."""
        jobs: list[Callable[[_Writer], None]] = []
        here: list[Wanted] = list(self._wanted.pop(_NO_LAYER, {}).items())
        for number in range(self._fetcher.next_layer):
            blob, layer = self._fetcher.layer(number)
            chunks = self._wanted.get(number, {})
            if right_as_a_whole(layer, blob):
                # Also where no file has bytes in it: names, modes and links came out of it.
                items: dict[Chunk, list[Piece]] = {chunk: [] for chunk in layer.chunks() if self._fetcher.has(chunk)}
                items |= chunks
                jobs.append(_Whole(self, blob, layer, sorted(items.items(), key=_place)))
                continue
            local = [item for item in chunks.items() if self._fetcher.has(item[0])]
            known = {chunk for chunk, _ in local}
            away = sorted((item for item in chunks.items() if item[0] not in known), key=_place)
            here += sorted(local, key=_place)
            if layer.sequential:
                here += away
            else:
                jobs += [_Fetch(self, blob, layer, extent) for extent in _extents(away, self._sizes.coalesce_gap)]
        jobs += [_Copy(self, batch) for batch in _batches(here)]
        self._jobs = iter(jobs)
        self._wanted.clear()

    def work(self) -> None:
        """Do jobs until there are none, or until somebody fails."""
        writer = _Writer(self, self._destination)
        with self._lock:
            self._writers.append(writer)
        try:
            while not self.stopped:
                with self._lock:
                    job = next(self._jobs, None)
                if job is None:
                    return
                job(writer)
        except Stopped:
            return
        finally:
            writer.close()

    def stop(self) -> None:
        """When this returns, nothing is written any more, even if threads still wait for the network."""
        self.stopped = True
        for writer in list(self._writers):
            with writer.busy:
                pass
        for file in self._open:
            os.close(file.fd)
        self._open.clear()

    def here(self, chunk: Chunk) -> Buffer | None:
        """What a scan, or who reads an inner tar, has been given for the chunk."""
        return self._fetcher.lookup(chunk)

    def lookup(self, chunk: Chunk) -> Buffer:
        data = self.here(chunk)
        return data if data is not None else self._late(chunk)

    def opened(self, file: File) -> None:
        with self._lock:
            self._open.add(file)

    def closed(self, file: File) -> None:
        with self._lock:
            self._open.remove(file)

    @property
    def crowded(self) -> bool:
        """Whether too many files are open."""
        return len(self._open) > _OPEN

    def wrote(self, count: int) -> None:
        with self._lock:
            self.written += count


class Stopped(Exception):
    """Raised in a worker when the pull has ended meanwhile."""


class _Writer:
    """One thread's way into the tree."""

    def __init__(self, contents: Contents, destination: Destination) -> None:
        self.busy = threading.Lock()
        self._contents = contents
        self._destination = destination
        self._directories = Directories(destination.top)

    def write(self, pieces: Sequence[Piece], data: Buffer) -> None:
        with self.busy, translated(self._destination.target):
            if self._contents.stopped:
                raise Stopped
            for piece in pieces:
                part = piece_of(data, piece.skip, piece.length)
                with piece.file.lock:
                    self._write(piece.file, part, piece.start)
                self._contents.wrote(piece.length)

    def _write(self, file: File, data: memoryview, offset: int) -> None:
        if file.fd < 0:
            file.fd = self._opened(file)
            self._contents.opened(file)
        at = 0
        while at < len(data):
            at += os.pwrite(file.fd, data[at:], offset + at)
        file.lacking -= 1
        if not file.lacking:
            if os.fstat(file.fd).st_size != file.inode.size:
                os.ftruncate(file.fd, file.inode.size)  # ends with a hole
            self._destination.dress(file.fd, file.path, file.inode)
        if not file.lacking or self._contents.crowded:
            os.close(file.fd)
            file.fd = -1
            self._contents.closed(file)

    def _opened(self, file: File) -> int:
        if not file.made:
            file.made = True
            return self._destination.create(self._directories, file.path)
        parent, name = self._directories.parent_of(file.path)
        return os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)

    def close(self) -> None:
        self._directories.close()


@dataclass(frozen=True, slots=True)
class _Fetch:
    """One range of a blob: chunks are written as soon as they have arrived."""

    contents: Contents
    blob: Blob
    layer: Layer
    wanted: list[Wanted]

    def __call__(self, writer: _Writer) -> None:
        start = self.wanted[0][0].offset
        end = max(chunk.offset + chunk.size for chunk, _ in self.wanted)
        buffer = memoryview(bytearray(end - start))
        filled = at = 0
        for piece in self.blob.stream(start, end - start):
            if self.contents.stopped:
                raise Stopped
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
            while at < len(self.wanted):
                chunk, pieces = self.wanted[at]
                low = chunk.offset - start
                if low + chunk.size > filled:
                    break
                writer.write(pieces, self._decoded(chunk, buffer[low : low + chunk.size]))
                at += 1

    def _decoded(self, chunk: Chunk, data: memoryview) -> Buffer:
        try:
            return self.layer.decode(chunk, data)
        except IntegrityError:  # once more, elsewhere if there is another place
            again = self.blob.read_at(chunk.offset, chunk.size, attempt=1)
            return self.layer.decode(chunk, memoryview(again))


@dataclass(frozen=True, slots=True)
class _Whole:
    """A layer whose chunks have no digests, from end to end; IntegrityError when it is not what its digest says.

    So it is when the bytes are right now, and were not when names were read out of them.
    """

    contents: Contents
    blob: Blob
    layer: Layer
    wanted: list[Wanted]

    def __call__(self, writer: _Writer) -> None:
        stream = HashedStream(self.blob)
        held, same = memoryview(b""), True
        at = position = 0  # of the wanted chunks; of the first byte that is held
        for piece in stream:
            if self.contents.stopped:
                raise Stopped
            held = memoryview(bytes(held) + bytes(piece)) if held else memoryview(piece)
            while at < len(self.wanted):
                chunk, pieces = self.wanted[at]
                low = chunk.offset - position
                if low + chunk.size > len(held):
                    break
                data = self.layer.decode(chunk, held[low : low + chunk.size])
                earlier = self.contents.here(chunk)
                same = same and (earlier is None or earlier == data)
                writer.write(pieces, data)
                at += 1
            following = self.wanted[at][0].offset - position if at < len(self.wanted) else len(held)
            done = max(0, min(following, len(held)))
            held, position = memoryview(bytes(held[done:])), position + done
        stream.check()
        if not same:
            digest = self.blob.descriptor.digest
            raise IntegrityError(f"names were read from layer {digest} while it arrived with another digest")


@dataclass(frozen=True, slots=True)
class _Copy:
    """Chunks that are here already."""

    contents: Contents
    wanted: list[Wanted]

    def __call__(self, writer: _Writer) -> None:
        for chunk, pieces in self.wanted:
            writer.write(pieces, self.contents.lookup(chunk))


def _place(item: Wanted) -> tuple[int, int, int]:
    chunk = item[0]
    return chunk.offset, chunk.inner, chunk.size


def _extents(wanted: Iterable[Wanted], gap: int) -> Iterator[list[Wanted]]:
    """Neighbours together; `gap`: unwanted bytes that are cheaper than another request."""
    extent: list[Wanted] = []
    start = end = 0
    for item in wanted:
        chunk = item[0]
        if extent and (chunk.offset > end + gap or chunk.offset + chunk.size > start + _EXTENT):
            yield extent
            extent = []
        if not extent:
            start = end = chunk.offset
        extent.append(item)
        end = max(end, chunk.offset + chunk.size)
    if extent:
        yield extent


def _batches(wanted: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    batch: list[Wanted] = []
    size = 0
    for item in wanted:
        batch.append(item)
        size += item[0].length
        if size >= _EXTENT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
