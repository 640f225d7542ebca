"""Appending chunks to segments, and making room for them.

Owns the segment that this process writes and the decision what is evicted. Appending raises OSError and leaves what
there was. One thread at a time gets in; readers (chunk_index.py) are not held up. Called by cache.py only.
"""

import errno
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from ckptfs.engine.chunk_index import ChunkIndex
from ckptfs.engine.disk import FULL, Buffer, DiskOps, Handle
from ckptfs.engine.segment_files import SegmentFiles, Usage
from ckptfs.engine.segments import MAX_RECORDS, NO_KEY, Segment, SegmentWriter, checksum
from ckptfs.settings import MiB

_CEILING_FOR = 60.0  # seconds for which a full disk or quota limits the plan
_LAST_WRITE = 1.0  # seconds for which closing waits for whoever writes
_MOVE = 4  # hot chunks that are moved with one write

_Chunk = tuple[bytes, Buffer, int]  # key, data, checksum
_Record = tuple[bytes, int, int, int]  # key, offset, length, checksum


class _Evicted(NamedTuple):
    """A segment whose files have no names any more.

    source  its data, which only this holds open: the index closes what was not used lately, and opens nothing gone.
    hot     what is worth a second chance.
    """

    segment: Segment
    source: Handle | None
    hot: list[_Record]


class ChunkLog:
    """`size` bounds all segments and `other_bytes()` together, `segment` is the most that one of them takes."""

    def __init__(
        self,
        index: ChunkIndex,
        files: SegmentFiles,
        ops: DiskOps,
        clock: Callable[[], float],
        *,
        size: int,
        segment: int,
        other_bytes: Callable[[], int],
    ) -> None:
        self._index, self._files, self._ops, self._clock = index, files, ops, clock
        self._size, self._segment = size, segment
        self._other_bytes = other_bytes
        self._largest = min(_capacity(size, segment), index.max_chunk)
        self._lock = threading.Lock()
        self._writer: SegmentWriter | None = None
        self._cap = 0  # bytes of the segment being written; decided when it is begun
        self._ceiling: tuple[float, int] | None = None
        self._closed = False

    def append(self, items: Sequence[tuple[bytes, Buffer]]) -> None:
        """Keep what is not kept yet. OSError: the disk refused, some may be missing. Chunks too large are left out."""
        chunks = [
            (key, data, checksum(key, data))
            for key, data in items
            if not self._index.knows(key) and 0 < len(data) <= self._largest and key != NO_KEY
        ]
        with self._lock:
            while chunks and not self._closed:
                writer = self._writer_for(len(chunks[0][1]))
                chunks = chunks[self._write(writer, chunks) :]

    def _writer_for(self, length: int) -> SegmentWriter:
        self._drop_removed()
        writer = self._writer
        if writer is None or writer.size + length > self._cap or len(writer.segment) >= MAX_RECORDS - 1:
            writer = self._rotate(length)
        return writer

    def refresh(self) -> None:
        """Let go of the segment that is being written if somebody has removed it, though nothing more is written."""
        if self._lock.acquire(blocking=False):  # whoever writes sees it by himself
            try:
                self._drop_removed()
            finally:
                self._lock.release()

    def _drop_removed(self) -> None:
        writer = self._writer
        if writer is not None and not self._files.exists(writer.data):
            self._index.forget(writer.segment)
            self._writer = None

    def _write(self, writer: SegmentWriter, chunks: Sequence[_Chunk]) -> int:
        """Append as many from the front as the segment takes, in one go; returns how many."""
        room, count = self._cap - writer.size, 0
        while count < min(len(chunks), MAX_RECORDS - 1 - len(writer.segment)) and len(chunks[count][1]) <= room:
            room -= len(chunks[count][1])
            count += 1
        try:
            self._append(writer, chunks[:count])
        except OSError as error:
            if error.errno not in FULL:
                raise
            count = 1
            self._append(self._rotate(len(chunks[0][1]), full=error.errno), chunks[:count])
        return count

    def _append(self, writer: SegmentWriter, chunks: Sequence[_Chunk]) -> None:
        writer.reserve(self._cap)
        try:
            records = writer.append(chunks)
        except OSError:
            self._close_writer(seal=False)
            raise
        self._index.take(writer.segment, records)

    def _close_writer(self, *, seal: bool) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        writer.trim()
        with suppress(OSError):
            if seal:
                writer.seal()
        with suppress(OSError):
            self._files.let_go(writer.data)
        self._index.release(writer.segment)

    # -- the next segment ----------------------------------------------------------------------------------------------

    def _rotate(self, length: int, full: int | None = None) -> SegmentWriter:
        """Go on in a segment that has room for `length` bytes, evicting what must go for it.

        `full` is the errno of a disk that has less room than planned. (Not the error, for one that is raised out of a
        frame that holds it keeps itself alive, and with it every segment of the frames that it has passed.)
        """
        self._close_writer(seal=True)
        evicted: list[_Evicted] = []
        try:
            with self._files.room():
                self._index.refresh()
                usage = self._files.usage()
                total = sum(u.bytes for u in usage) + self._other_bytes()
                limit = self._plan(total, full)
                if length > self._cap:
                    raise _refusal(full or errno.ENOSPC)
                idle, reserved = self._idle(usage)
                if full and not idle:
                    raise _refusal(full)
                self._writer = writer = None if full else self._resume(idle, length)
                growth = self._cap - writer.size if writer else self._cap
                keep = 0 if full else min(self._cap // 2, growth - length)
                evicted = self._evict(idle, total - (limit - reserved - growth), keep)
                if writer is None:
                    segment, data, index = self._index.begin()
                    self._writer = writer = SegmentWriter(self._ops, segment, data, index, 0)
            for gone in evicted:
                self._move(gone, writer)
        except OSError:
            self._close_writer(seal=False)  # whoever comes next may go on in it
            raise
        finally:
            for gone in evicted:  # whatever was refused meanwhile: the disk gets their bytes back only so
                self._index.forget(gone.segment)
        return writer

    def _plan(self, total: int, full: int | None) -> int:
        """The bytes that the cache may take up now: never more than the disk has. Sets the size of a segment."""
        now = self._clock()
        if full:
            self._ceiling = (now, total)
        limit = min(self._size, total + self._files.available())
        if self._ceiling is not None:
            since, ceiling = self._ceiling
            if 0 <= now - since < _CEILING_FOR:
                limit = min(limit, ceiling)
        self._cap = _capacity(limit, self._segment)
        return limit

    def _idle(self, usage: Sequence[Usage]) -> tuple[list[Usage], int]:
        """The segments that nobody appends to, least recently used first; and how much the others may still grow."""
        sealed = {segment.name for segment in self._index.segments() if segment.sealed}
        idle, reserved = [], 0
        for u in usage:
            if u.name in sealed or not self._files.is_live(u.name):
                idle.append(u)
            else:
                reserved += max(0, self._cap - u.bytes)
        return sorted(idle, key=lambda u: (u.used_ns, u.name)), reserved

    def _resume(self, idle: list[Usage], length: int) -> SegmentWriter | None:
        """Take over a segment that its writer left unfinished; seal those that are too full for it on the way."""
        unsealed = {segment.name: segment for segment in self._index.segments() if not segment.sealed}
        for u in reversed(idle):
            segment = unsealed.get(u.name)
            taken = self._files.take_over(u.name) if segment else None
            if segment is None or taken is None:
                continue
            data, index = taken
            self._index.adopt(segment)
            size = self._ops.fstat(data.fd).st_size
            writer = SegmentWriter(self._ops, segment, data, index, size)
            # Records that reach past the end: power was lost. What is appended must not come to lie under them.
            if segment.end() <= size <= self._cap * 3 // 4 and size + length <= self._cap:
                idle.remove(u)
                return writer
            with suppress(OSError):  # a full disk is why there is to be room
                writer.seal()
            self._files.let_go(data)
            self._index.release(segment)
        return None

    # -- making room ---------------------------------------------------------------------------------------------------

    def _evict(self, idle: Sequence[Usage], excess: int, keep: int) -> list[_Evicted]:
        """Unlink from the front until `excess` bytes are free. Returns the segments with up to `keep` bytes of chunks
        that this process used since they were written; the caller moves those, then forgets the segments."""
        known = {segment.name: segment for segment in self._index.segments()}
        evicted = []
        for u in idle:
            if excess <= 0:
                break
            segment = known.get(u.name)
            source = self._index.handle(segment) if segment and keep > 0 else None
            hot = self._hot(segment, keep) if segment and source else []
            self._files.remove(u.name)
            excess -= u.bytes
            keep -= sum(length for _, _, length, _ in hot)
            if segment:
                evicted.append(_Evicted(segment, source, hot))
        return evicted

    def _hot(self, segment: Segment, keep: int) -> list[_Record]:
        """Second chance (CLOCK) chunk by chunk, latest first: within 2 % of LRU, for one byte a chunk (ADR 2)."""
        hot: list[_Record] = []
        for i in range(len(segment) - 1, -1, -1):
            if segment.used[i] and self._index.is_current(segment, i):
                record = segment.record(i)
                if record[2] <= keep:
                    hot.append(record)
                    keep -= record[2]
        return hot

    def _move(self, evicted: _Evicted, writer: SegmentWriter) -> None:
        """Append chunks of an evicted segment again. Checksums go along unchecked: the next read checks."""
        _, source, hot = evicted
        if source is None:
            return
        for at in range(0, len(hot), _MOVE):
            chunks = [
                (key, self._ops.pread(source.fd, length, offset), total)
                for key, offset, length, total in hot[at : at + _MOVE]
            ]
            self._append(writer, chunks)

    def prune(self, target: int, *, live: bool = False) -> None:
        """Evict until the segments take up at most `target` bytes; `live`: also those being written."""
        with self._lock:
            self._close_writer(seal=False)
            with self._files.room():
                self._index.refresh()
                usage = self._files.usage()
                idle = usage if live else self._idle(usage)[0]
                excess = sum(u.bytes for u in usage) - target if target else 1 << 62  # the empty ones as well
                for gone in self._evict(idle, excess, 0):
                    self._index.forget(gone.segment)

    def sweep(self) -> None:
        """Remove what a process left behind that died between two system calls."""
        with self._lock, self._files.room():
            for name in self._files.leftovers():
                if not self._files.is_live(name):
                    self._files.remove(name)

    def remove_empty(self) -> None:
        """Unlink the segments in which no record is left that answers for a chunk."""
        with self._lock, self._files.room():
            own = self._writer.segment if self._writer else None
            for segment in self._index.segments():
                if segment is own or any(self._index.is_current(segment, i) for i in range(len(segment))):
                    continue
                if not self._files.is_live(segment.name):
                    self._files.remove(segment.name)
                    self._index.forget(segment)

    def bytes(self) -> int:
        """What the segments take up on disk."""
        return sum(u.bytes for u in self._files.usage())

    def close(self) -> None:
        """Nothing is appended from now on. A write that the disk does not end is not waited for."""
        self._closed = True
        if self._lock.acquire(timeout=_LAST_WRITE):
            try:
                self._close_writer(seal=False)
            finally:
                self._lock.release()


def _refusal(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _capacity(limit: int, segment: int) -> int:
    """The size of a segment in a cache of `limit` bytes: an eighth, so that evicting one costs little of the rest."""
    return min(segment, max(limit // 8, min(limit // 2, 1 * MiB)))
