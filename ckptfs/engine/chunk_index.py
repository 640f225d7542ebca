"""Where each chunk of the cache lies, and reading it.

Owns the dict from key to record and the open files. Invariant: a byte returned was verified in this process, through
the open file that it came from; whatever fails that is a miss. Look-ups and reads take no lock and are safe from any
thread. Never writes, but for erasing a record that turned out wrong. Called by cache.py, and by chunk_log.py, which
appends and evicts.
"""

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial

from ckptfs.engine.disk import Buffer, DiskOps, Handle
from ckptfs.engine.errands import Errands
from ckptfs.engine.segment_files import SegmentFiles
from ckptfs.engine.segments import MAX_RECORDS, NO_KEY, Segment, checksum, tail

_SLOT_BITS = 20
_RECORD_MASK = (1 << _SLOT_BITS) - 1
assert MAX_RECORDS <= 1 << _SLOT_BITS

# Seconds between two looks at what others appended, when misses ask for it. Whoever is about to fetch looks by himself;
# a look costs 10 us, and four times that where everything else is busy.
_REFRESH_EVERY = 0.02
_TOUCH_EVERY = 5.0  # seconds between two notes that a segment is in use
_LAST_NOTES = 1.0  # seconds for which closing waits for such notes
_OPEN_FILES = 128  # data files kept open; RLIMIT_NOFILE is 1024 by default

_log = logging.getLogger(__name__)


class ChunkIndex:
    """All chunks that this process knows of. `max_chunk`: bytes of the largest chunk that is believed."""

    def __init__(self, files: SegmentFiles, ops: DiskOps, clock: Callable[[], float], max_chunk: int) -> None:
        self._files, self._ops, self._clock = files, ops, clock
        self.max_chunk = max_chunk
        self._records: dict[bytes, int] = {}  # key -> slot << 20 | record
        self._slots: dict[int, Segment] = {}
        self._growing: list[Segment] = []  # others may append to them
        self._next_slot = 0
        self._lock = threading.Lock()  # guards the four above; held for moments
        self._refreshed = float("-inf")
        self._closed = False
        self._errands = Errands("ckptfs-touch")

    def __len__(self) -> int:
        return len(self._records)

    # -- reading -------------------------------------------------------------------------------------------------------

    def contains(self, key: bytes) -> bool:
        """Whether there is a record of it; it has not been verified for that."""
        if key in self._records:
            return True
        self._look()
        return key in self._records

    def get(self, key: bytes) -> bytes | None:
        found = self._find(key)
        if found is None:
            return None
        segment, i, handle = found
        data = self._checked(segment, i, handle, trust=True)
        if data is None:
            self._bad(segment, i)
        else:
            segment.used[i] = 1
        return data

    def read_into(self, key: bytes, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the chunk's bytes from `offset` on; False (and rubbish in it) when they are not there."""
        found = self._find(key)
        if found is None:
            return False
        segment, i, handle = found
        _, start, length, total = segment.record(i)
        if offset < 0 or offset + len(buffer) > length:
            return False
        if not handle.verified[i] and len(buffer) != length:
            data = self.get(key)
            if data is None:
                return False
            buffer[:] = data[offset : offset + len(buffer)]
            return True
        count = -1
        with suppress(OSError):
            count = self._ops.preadv(handle.fd, [buffer], start + offset)
        if count != len(buffer) or (not handle.verified[i] and checksum(key, buffer) != total):
            self._bad(segment, i)
            return False
        handle.verified[i] = segment.used[i] = 1
        return True

    def verify(self) -> tuple[int, int]:
        """Read every chunk and forget the bad ones; (checked, bad)."""
        checked = bad = 0
        for segment in self.segments():
            for i in range(len(segment)):
                if not self.is_current(segment, i):
                    continue
                handle = segment.handle or self._open(segment)
                if handle is None:
                    break
                checked += 1
                if self._checked(segment, i, handle, trust=False) is None:
                    bad += 1
                    self._bad(segment, i)
        return checked, bad

    def _checked(self, segment: Segment, i: int, handle: Handle, *, trust: bool) -> bytes | None:
        key, offset, length, total = segment.record(i)
        if not 0 < length <= self.max_chunk:
            return None
        try:
            data = self._ops.pread(handle.fd, length, offset)
        except OSError:
            return None
        if len(data) != length:
            return None
        if not (trust and handle.verified[i]):
            if checksum(key, data) != total:
                return None
            handle.verified[i] = 1
        return data

    def _find(self, key: bytes) -> tuple[Segment, int, Handle] | None:
        at = self._records.get(key)
        if at is None:
            self._look()
            at = self._records.get(key)
            if at is None:
                return None
        segment = self._slots.get(at >> _SLOT_BITS)
        if segment is None:
            return None
        handle = segment.handle or self._open(segment)
        if handle is None:
            return None
        if not 0 <= self._clock() - segment.touched < _TOUCH_EVERY:
            segment.touched = self._clock()
            # Not here: a disk that others keep busy takes seconds for it, and this is where reads are answered.
            self._errands.do(partial(self._touch, segment))
        return segment, at & _RECORD_MASK, handle

    def _open(self, segment: Segment) -> Handle | None:
        with self._lock:
            if segment.handle is not None:
                return segment.handle
            self._close_idle()
            try:
                handle = self._files.open(segment.name)
            except FileNotFoundError:
                self._forget(segment)
                return None
            except OSError:
                return None
            handle.verified += bytes(len(segment) - len(handle.verified))
            segment.handle = handle
            return handle

    def _close_idle(self) -> None:
        opened = [s for s in self._slots.values() if s.handle is not None]
        if len(opened) >= _OPEN_FILES:
            for idle in sorted(opened, key=lambda s: s.touched)[: _OPEN_FILES // 4]:
                idle.handle = None

    def _touch(self, segment: Segment) -> None:
        try:
            self._files.touch(segment.name)
        except FileNotFoundError:  # evicted by another process; give its bytes back to the disk
            self.forget(segment)
        except OSError:
            pass  # a read-only disk has no eviction either

    def _bad(self, segment: Segment, i: int) -> None:
        """The record does not describe what is on disk: forget it, here and on disk."""
        if not segment.damaged:
            segment.damaged = True
            _log.warning("cache segment %s is damaged; what was lost is fetched again", segment.name)
        with self._lock:
            if self.is_current(segment, i):
                del self._records[segment.record(i)[0]]
            self._erase(segment, i)

    def drop(self, keys: Collection[bytes]) -> None:
        """Forget these chunks, here and on disk, every copy of them."""
        found: list[tuple[Segment, int]] = []
        with self._lock:
            for key in keys:
                self._records.pop(key, None)
            for segment in self._slots.values():
                found += [(segment, i) for i in segment.find(keys)]
        for segment, i in found:
            self._erase(segment, i)

    def _erase(self, segment: Segment, i: int) -> None:
        with suppress(OSError):
            self._files.erase(segment.name, i)

    # -- what other processes do ---------------------------------------------------------------------------------------

    def _look(self) -> None:
        """A miss: see whether another process has appended it, but not on every miss.

        Nor while a segment is begun, for which the disk may take its time.
        """
        if 0 <= self._clock() - self._refreshed < _REFRESH_EVERY or not self._lock.acquire(blocking=False):
            return
        try:
            with suppress(OSError):
                self._refresh()
        finally:
            self._lock.release()

    def refresh(self) -> None:
        """Take over what other processes appended, let go of what they evicted. OSError when the directory is gone."""
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        if self._closed:
            return
        self._refreshed = self._clock()
        names = self._files.names()
        if names is not None:
            self._follow(names)
        for segment in self._growing:
            self._read_on(segment)
        self._growing = [s for s in self._growing if not s.sealed]

    def _follow(self, names: Sequence[str]) -> None:
        gone = {segment.name: segment for segment in self._slots.values()}
        for name in names:
            if gone.pop(name, None) is None:
                self._growing.append(self._add(name))
        for segment in gone.values():
            self._forget(segment)

    def _read_on(self, segment: Segment) -> None:
        """Take over what was appended. A segment that is evicted, or cannot be read now, is not there until it can."""
        try:
            segment.index = segment.index or self._files.open_index(segment.name)
            self._take(segment, tail(self._ops, segment))
        except OSError:
            self._forget(segment)
            self._files.look_again()

    # -- for the log ---------------------------------------------------------------------------------------------------

    def segments(self) -> list[Segment]:
        return list(self._slots.values())

    def is_current(self, segment: Segment, i: int) -> bool:
        """Whether record `i` is the one that answers for its key."""
        return self._records.get(segment.record(i)[0]) == segment.slot << _SLOT_BITS | i

    def knows(self, key: bytes) -> bool:
        return key in self._records

    def handle(self, segment: Segment) -> Handle | None:
        """The segment's data, open for reading; None when it cannot be opened."""
        return segment.handle or self._open(segment)

    def begin(self) -> tuple[Segment, Handle, Handle | None]:
        """A new live segment: itself, its data and its index."""
        with self._lock:  # so that refresh() does not take it for another process's
            self._close_idle()
            name, data, index = self._files.create()
            segment = self._add(name)
            segment.handle = data
        return segment, data, index

    def take(self, segment: Segment, records: Buffer) -> None:
        """These records were appended to the segment, unless it is forgotten meanwhile: somebody has removed it."""
        with self._lock:
            if segment.slot in self._slots:
                self._take(segment, records)

    def adopt(self, segment: Segment) -> None:
        """Nobody else appends to it from now on; read its last words."""
        with self._lock:
            self._take(segment, tail(self._ops, segment))
            segment.index = None
            self._growing = [s for s in self._growing if s is not segment]

    def release(self, segment: Segment) -> None:
        """This process does not append to it any more; unless it is sealed, others may."""
        if segment.sealed:
            return
        with self._lock:
            self._growing.append(segment)

    def forget(self, segment: Segment) -> None:
        """Drop a segment from memory. Readers that have its handle finish their read."""
        with self._lock:
            self._forget(segment)

    def close(self) -> None:
        self._errands.flush(_LAST_NOTES)
        with self._lock:
            self._closed = True
            for segment in self.segments():
                self._forget(segment)

    def _add(self, name: str) -> Segment:
        segment = Segment(self._next_slot, name)
        self._next_slot += 1
        self._slots[segment.slot] = segment
        return segment

    def _take(self, segment: Segment, records: Buffer) -> None:
        if records:
            first = segment.extend(records)
            base = segment.slot << _SLOT_BITS
            self._records.update(zip(segment.chunk_keys(first), range(base + first, base + len(segment)), strict=True))
            self._records.pop(NO_KEY, None)
        if segment.sealed:
            segment.index = None

    def _forget(self, segment: Segment) -> None:
        if self._slots.pop(segment.slot, None) is None:
            return
        for key in segment.chunk_keys():
            if self._records.get(key, -1) >> _SLOT_BITS == segment.slot:
                del self._records[key]
        self._growing = [s for s in self._growing if s is not segment]
        segment.handle = segment.index = None
