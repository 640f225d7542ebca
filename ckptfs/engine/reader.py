"""Bytes of a file: the only door between readers and chunks.

`cached` answers inline from memory or disk, without a thread hop; `read` waits for the network. Both return exactly the
bytes that the file has there, or raise: a short read inside a file makes CRIU's restorer loop for ever.
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import trio

from ckptfs.engine.disk import Buffer
from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.schedule import Priority
from ckptfs.model.toc import UNKNOWN, Chunk, Extent, Inode, overlapping, piece_of
from ckptfs.settings import KiB, MiB

_STRAIGHT = 512 * KiB  # reads of this size and more are of large files, front to back: the kernel keeps the pages
_SEQUENTIAL = 512 * KiB  # read in sequence before running ahead
_FAULT = 16 * KiB  # a read of so little elsewhere is a page fault or a look-up, never the kernel reading ahead
_HELD = 0.02  # seconds at most for which a piece of the daemon's transfer is held back: faults wait behind it
_PAGED = 1 * MiB  # single reads of smaller files are not page faults
_CALM = 1.0  # seconds after the last page fault for which others may come
_REORDERED = 2 * MiB  # how far apart reads of one sequence may come


class ReadCounters:
    """What readers asked for and how long they waited: all together, and each of the last misses in milliseconds."""

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.memory_hits = 0
        self.disk_hits = 0
        self.misses = 0
        self.waiting = 0
        self.waits = 0
        self.waited_ms = 0.0
        self.waits_ms: deque[float] = deque(maxlen=4096)
        self._answered = trio.Event()

    def waited(self, seconds: float) -> None:
        """One that was `waiting` no longer is."""
        self.waiting -= 1
        self.waits += 1
        self.waited_ms += seconds * 1000
        self.waits_ms.append(seconds * 1000)
        self._answered.set()
        self._answered = trio.Event()

    async def drained(self) -> None:
        """Until no read waits for the network."""
        while self.waiting:
            await self._answered.wait()

    def figures(self) -> dict[str, float]:
        """As a status has them."""
        names = ("count", "bytes", "memory_hits", "disk_hits", "misses", "waiting", "waits")
        waits = {
            "waited_ms": round(self.waited_ms, 3),
            "wait_ms_p50": self.wait_ms(0.5),
            "wait_ms_p99": self.wait_ms(0.99),
        }
        return {name: getattr(self, name) for name in names} | waits

    def wait_ms(self, quantile: float) -> float:
        waits = sorted(self.waits_ms)
        return round(waits[min(int(len(waits) * quantile), len(waits) - 1)], 3) if waits else 0.0


class Handle:
    """One open file: remembers where reading goes on, to tell sequential readers from random ones.

    CRIU's lazy-pages daemon is both with one descriptor: between the pieces of its transfer it reads single pages, for
    faults, anywhere. Those leave the sequence where it is.

    expected  where the sequence goes on.
    streak    bytes read in sequence.
    ahead     up to where chunks have been asked for ahead of the sequence.
    jumped    where the last read that was out of sequence ended; one that goes on there starts a new sequence.
    paging    whether it is CRIU that reads, restoring with lazy pages.
    pid       who opened it; 0 where that cannot be seen.
    last      offset and size of the last read, which came at the monotonic time `at`.
    """

    def __init__(self, inode: Inode, path: bytes = b"") -> None:
        self.inode = inode
        self.path = path
        self.expected = 0
        self.streak = 0
        self.ahead = 0
        self.jumped = -1
        self.paging = False
        self.pid = 0
        self.command = ""
        self.last = (0, 0)
        self.at = float("-inf")

    def observe(self, offset: int, size: int) -> bool:
        """Note a read; whether it goes on sequentially. The kernel's read-ahead may overtake itself."""
        if offset == self.jumped and size > _FAULT:
            self.streak, self.ahead = 0, 0
        elif offset != self.expected and (size <= _FAULT or abs(offset - self.expected) > _REORDERED):
            self.jumped = offset + size
            return False
        self.jumped = -1
        self.streak += size
        self.expected = max(offset + size, self.expected) if self.streak > size else offset + size
        return self.streak >= _SEQUENTIAL


class Wait:
    """A read by an open file that waits, or has waited, for the network; monotonic seconds."""

    def __init__(self, handle: Handle, offset: int, size: int, began: float) -> None:
        self.handle = handle
        self.offset = offset
        self.size = size
        self.began = began
        self.ended: float | None = None


class _Slot:
    """One of a limiter's places; a free one is taken without another turn of the event loop, which costs 50 us."""

    def __init__(self, limiter: trio.CapacityLimiter) -> None:
        self._limiter = limiter

    async def __aenter__(self) -> None:
        try:
            self._limiter.acquire_on_behalf_of_nowait(self)
        except trio.WouldBlock:
            await self._limiter.acquire_on_behalf_of(self)

    async def __aexit__(self, *exc: object) -> None:
        self._limiter.release_on_behalf_of(self)


class Reader:
    """Reads files of one mount through its fetcher."""

    def __init__(
        self, fetcher: Fetcher, max_hung: int, learn: Callable[[Sequence[bytes]], Awaitable[None]] | None = None
    ) -> None:
        """`max_hung`: how many reads may wait for the network at once; further ones queue, metadata stays fast.

        `learn`: finds out what chunks of the layer UNKNOWN, given by their keys, stand for.
        """
        self.fetcher = fetcher
        self._learn = learn
        self.counters = ReadCounters()
        self.waits: set[Wait] = set()
        # Told of every read: (handle, offset, size, None for a hit). A Wait is told of before it has ended.
        self.observer: Callable[[Handle, int, int, Wait | None], None] | None = None
        self.transfer_rate = 0.0  # bytes per second of what no process waits for, to the lazy-pages daemon; 0: no limit
        self.sequential = trio.Event()  # set once somebody reads a large file from front to back
        self._apart: dict[bytes, Sequence[Extent]] = {}
        self._fault_at = float("-inf")
        self._slots = trio.CapacityLimiter(max_hung)

    def take_apart(self, chunks: Mapping[bytes, Sequence[Extent]]) -> None:
        """By key, chunks and their cells: page faults in a chunk that is not here fetch the cell, from now on."""
        self._apart.update(chunks)

    def _extents(self, inode: Inode, offset: int, size: int) -> list[Extent]:
        found = list(overlapping(inode.extents, offset, size))
        if not self._apart or size > _FAULT:
            return found
        parts: list[Extent] = []
        for extent in found:
            cells = self._apart.get(extent.chunk.key)
            if cells is None or self.fetcher.has(extent.chunk):
                parts.append(extent)
            else:
                parts += overlapping(cells, offset, size)
        return parts

    def cached(self, inode: Inode, offset: int, size: int) -> Buffer | None:
        """The bytes, when this node has them all; None otherwise. b"" at and past the end of the file."""
        return self._here(inode, self._extents(inode, offset, size), offset, size)

    def _here(self, inode: Inode, extents: Sequence[Extent], offset: int, size: int) -> Buffer | None:
        size = min(size, inode.size - offset)
        if size <= 0:
            return b""
        if size >= _STRAIGHT:
            return self._straight(extents, offset, size)
        parts: list[tuple[Extent, Buffer]] = []
        for extent in extents:
            data = self.fetcher.lookup(extent.chunk)
            if data is None:
                return None
            parts.append((extent, data))
        return _assemble(parts, offset, size)

    def _straight(self, extents: Sequence[Extent], offset: int, size: int) -> Buffer | None:
        """A large read: chunks come from the disk into the answer, not through memory, which they would only flush."""
        held: list[tuple[Extent, Buffer]] = []
        for extent in extents:
            data = self.fetcher.held(extent.chunk)
            if data is None:
                break
            held.append((extent, data))
        if len(held) == len(extents):
            return _assemble(held, offset, size)  # a bytearray would be cleared first
        if not self.fetcher.has(extents[-1].chunk):  # of what is read in sequence the first one to be missing
            return None
        out = bytearray(size)
        view = memoryview(out)
        end = offset + size
        for extent in extents:
            lo, hi = max(extent.start, offset), min(extent.start + extent.length, end)
            skip = extent.skip + lo - extent.start
            if not self.fetcher.lookup_into(extent.chunk, skip, view[lo - offset : hi - offset]):
                return None
        return out

    async def read(self, inode: Inode, offset: int, size: int, *, inside: bool = False) -> Buffer:
        """The bytes, fetched where this node does not have them. `inside`: for a layer that lies in this file."""
        return await self._fetched(inode, self._extents(inode, offset, size), offset, size, inside=inside)

    async def _fetched(
        self, inode: Inode, extents: Sequence[Extent], offset: int, size: int, *, inside: bool = False
    ) -> Buffer:
        size = min(size, inode.size - offset)
        if size <= 0:
            return b""
        began = time.monotonic()
        self.counters.waiting += 1
        try:
            with trio.move_on_after(self.fetcher.settings.timeouts.read_deadline):
                unknown = [extent.chunk.key for extent in extents if extent.chunk.layer == UNKNOWN]
                if unknown and self._learn is not None:
                    await self._learn(unknown)
                    extents = self._extents(inode, offset, size)
                # Those who hold the slots wait for the reads inside.
                async with nullcontext() if inside else _Slot(self._slots):
                    have = await self.fetcher.get_all(extent.chunk for extent in extents)
                return _assemble([(extent, have[extent.chunk.key]) for extent in extents], offset, size)
        finally:
            self.counters.waited(time.monotonic() - began)
        raise self.fetcher.overdue([extent.chunk for extent in extents])

    async def serve(self, handle: Handle, offset: int, size: int) -> Buffer:
        """A read by an open file: `cached` or `read`, counted, and running ahead of a sequential reader."""
        counters = self.counters
        counters.count += 1
        handle.last, handle.at = (offset, size), time.monotonic()
        sequential = handle.observe(offset, size)
        if handle.paging or (not sequential and size <= _FAULT and handle.inode.size >= _PAGED):
            self._fault_at = handle.at
            self.fetcher.link.be_patient(False)
        elif sequential and handle.at - self._fault_at > _CALM:
            self.fetcher.link.be_patient(True)
        if sequential:
            self.sequential.set()
            self._run_ahead(handle, offset + size)
        disk_before = self.fetcher.disk_hits
        extents = self._extents(handle.inode, offset, size)
        data = self._here(handle.inode, extents, offset, size)
        if data is None:
            counters.misses += 1
            data = await self._waited_for(handle, extents, offset, size)
        else:
            if self.fetcher.disk_hits != disk_before:
                counters.disk_hits += 1
            else:
                counters.memory_hits += 1
            if self.observer is not None:
                self.observer(handle, offset, size, None)
        counters.bytes += len(data)
        if self.transfer_rate and handle.paging and size > _FAULT:
            await trio.sleep(min(size / self.transfer_rate, _HELD))
        return data

    async def _waited_for(self, handle: Handle, extents: Sequence[Extent], offset: int, size: int) -> Buffer:
        wait = Wait(handle, offset, size, handle.at)
        if self.observer is not None:
            self.observer(handle, offset, size, wait)
        self.waits.add(wait)
        try:
            return await self._fetched(handle.inode, extents, offset, size)
        finally:
            self.waits.remove(wait)
            wait.ended = time.monotonic()

    def _run_ahead(self, handle: Handle, position: int) -> None:
        """Keep the link busy past what the kernel reads ahead, in file order: two windows' worth in the end.

        At first no more than has been read: what is asked for in one burst is in the way of a fault.
        """
        distance = min(2 * self.fetcher.link.window, handle.streak)
        target = min(position + distance, handle.inode.size)
        start = max(handle.ahead, position)
        if target - start < distance // 4 and target < handle.inode.size:
            return
        if target > start:
            handle.ahead = target
            chunks = chunks_of(handle.inode, start, target - start)
            self.fetcher.want((chunk for chunk in chunks if chunk.layer != UNKNOWN), Priority.PREFETCH)


def chunks_of(inode: Inode, offset: int = 0, size: int | None = None) -> Iterator[Chunk]:
    """The chunks that hold a part of a file, in file order; a chunk may come twice."""
    for extent in overlapping(inode.extents, offset, inode.size if size is None else size):
        yield extent.chunk


def _assemble(parts: list[tuple[Extent, Buffer]], offset: int, size: int) -> Buffer:
    """File bytes [offset, offset + size) out of whole chunks; gaps are zeros."""
    end = offset + size
    if len(parts) == 1:
        extent, data = parts[0]
        if extent.start <= offset and end <= extent.start + extent.length:
            return piece_of(data, extent.skip + offset - extent.start, size)
    pieces: list[Buffer] = []
    position = offset
    for extent, data in parts:
        lo = max(extent.start, offset)
        hi = min(extent.start + extent.length, end)
        piece = piece_of(data, extent.skip + lo - extent.start, hi - lo)
        pieces += [bytes(lo - position), piece] if lo > position else [piece]
        position = hi
    if end > position:
        pieces.append(bytes(end - position))
    return b"".join(pieces)
