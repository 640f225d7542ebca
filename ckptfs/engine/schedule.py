"""Who is fetched next: a pure, synchronous decision over queues. No I/O, no clock, no trio; fetch.py acts on it.

Demand (a process waits) comes before prefetch (it will probably be asked for) before background (so that all is here in
the end). Chunks that lie next to one another in a blob are fetched as one extent.
"""

import bisect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from itertools import islice

from ckptfs.model.toc import Chunk
from ckptfs.settings import KiB, Sizes

_MOST = 4096  # chunks of one request
_SEAM = 1 * KiB  # unwanted bytes between two ranges of one request that are cheaper than a range of their own
_SMALL = 64 * KiB  # an extent that others of its kind may be asked for with
_GATHERED = 512 * KiB  # bytes of such together: 20 ms at 200 Mbit/s
_LOOK = 256  # places in the queue that are looked through for them


class Priority(IntEnum):
    DEMAND = 0
    PREFETCH = 1
    BACKGROUND = 2


class Job:
    """One request: the blob range [start, end) of a layer, which holds `chunks`, sorted by offset.

    `scattered`: of the range only the chunks are asked for, and not what is between them.
    """

    scattered = False

    def __init__(
        self, layer: int, start: int, end: int, chunks: list[Chunk], priority: Priority, attempt: int = 0
    ) -> None:
        self.layer = layer
        self.start = start
        self.end = end
        self.chunks = chunks
        self.priority = priority
        self.attempt = attempt
        self.received = 0  # bytes that have arrived; written by the fetching thread

    @property
    def size(self) -> int:
        """Bytes that are asked for."""
        return self.end - self.start

    @property
    def outstanding(self) -> int:
        """Bytes that are still on the way."""
        return self.size - self.received


class ScatteredJob(Job):
    """Several places of a layer with one request (RFC 9110, section 14.2)."""

    scattered = True

    def __init__(self, chunks: list[Chunk], priority: Priority) -> None:
        chunks.sort(key=lambda chunk: (chunk.offset, chunk.inner))
        ranges = ranges_of(chunks, apart=True)
        super().__init__(chunks[0].layer, ranges[0][0], ranges[-1][1], chunks, priority)
        self._size = sum(end - start for start, end in ranges)

    @property
    def size(self) -> int:
        return self._size


def ranges_of(chunks: Sequence[Chunk], *, apart: bool) -> list[tuple[int, int]]:
    """Where `chunks`, sorted by offset, lie: one range [start, end), or, `apart`, one for each group of neighbours."""
    found: list[tuple[int, int]] = []
    for chunk in chunks:
        start, end = chunk.offset, chunk.offset + chunk.size
        if found and (not apart or start <= found[-1][1] + _SEAM):
            start, end = found[-1][0], max(found.pop()[1], end)
        found.append((start, end))
    return found


def parted(chunks: Sequence[Chunk], gap: float) -> Iterator[list[Chunk]]:
    """`chunks`, sorted by offset, as runs between which more than `gap` bytes are not wanted."""
    part: list[Chunk] = []
    end = 0
    for chunk in chunks:
        if part and chunk.offset > end + gap:
            yield part
            part = []
        end = max(end, chunk.offset + chunk.size)
        part.append(chunk)
    if part:
        yield part


class _Wanted:
    __slots__ = ("chunk", "priority")

    def __init__(self, chunk: Chunk, priority: Priority) -> None:
        self.chunk = chunk
        self.priority = priority


class Scheduler:
    """Queues of wanted chunks. A chunk is in at most one queue; asking again can only raise its priority.

    `ranges_at_once`: how many ranges of a layer one request may ask for.
    """

    def __init__(self, sizes: Sizes, ranges_at_once: Callable[[int], int] = lambda _: 1) -> None:
        self.sizes = sizes
        self._ranges_at_once = ranges_at_once
        # Layers that are files of other layers: their jobs wait for chunks of those, whose places they must not take.
        self.inside: set[int] = set()
        self._wanted: dict[bytes, _Wanted] = {}
        self._pending = dict.fromkeys(Priority, 0)  # of those; the queues have what went with neighbours, too
        self._queues: dict[tuple[bool, Priority], deque[bytes]] = {
            (inside, priority): deque() for inside in (False, True) for priority in Priority
        }
        # layer -> sorted (offset, inner, key) of what is queued: where an extent can grow
        self._places: dict[int, list[tuple[int, int, bytes]]] = {}
        self.running: list[Job] = []
        # Bytes that prefetch and background together may have on the way: about what the link holds, so that a demand
        # read does not queue behind megabytes of what nobody waits for. fetch.py adjusts it to the measured link.
        self.window = sizes.in_flight
        self.jobs = sizes.jobs  # how many requests of those may be under way; adjusted, too
        self.extent = sizes.sequential_extent  # bytes that one request of those may ask for, at most; adjusted as well
        self._refused = (b"", 0)  # first chunk and bytes of the job that the window had no room for
        self.behind = False  # whether the disk has not taken yet what has been fetched; adjusted
        self.full = False  # whether something was refused because the window is full: the link has all it can carry

    def __bool__(self) -> bool:
        """Whether anything is queued."""
        return bool(self._wanted)

    def want(self, chunk: Chunk, priority: Priority) -> None:
        known = self._wanted.get(chunk.key)
        if known is None:
            self._wanted[chunk.key] = _Wanted(chunk, priority)
            self._pending[priority] += 1
            self._queues[chunk.layer in self.inside, priority].append(chunk.key)
            bisect.insort(self._places.setdefault(chunk.layer, []), (chunk.offset, chunk.inner, chunk.key))
        elif priority < known.priority:
            self._pending[known.priority] -= 1
            self._pending[priority] += 1
            known.priority = priority  # its old place in the other queue is skipped when it comes up
            self._queues[chunk.layer in self.inside, priority].append(chunk.key)

    def asked(self, key: bytes, priority: Priority) -> bool:
        """Whether `want` would change nothing."""
        known = self._wanted.get(key)
        return known is not None and known.priority <= priority

    def forget(self, priority: Priority) -> None:
        """Drop what is queued at `priority` and not yet fetched."""
        for key in [k for k, w in self._wanted.items() if w.priority == priority]:
            self._take(key)
        for inside in (False, True):
            self._queues[inside, priority].clear()

    def pending(self, priority: Priority) -> int:
        """How many chunks are queued at this priority."""
        return self._pending[priority]

    def next_job(self) -> Job | None:
        """The job to start now, None when nothing is queued or enough is under way; the caller adds it to `running`."""
        self.full = False
        if not self._wanted:
            return None
        return self._next_job(inside=False) or self._next_job(inside=True)

    def _next_job(self, *, inside: bool) -> Job | None:
        if sum((job.layer in self.inside) == inside for job in self.running) >= 2 * self.sizes.jobs:
            return None
        for priority in Priority:
            queue = self._queues[inside, priority]
            while queue:
                wanted = self._wanted.get(queue[0])
                if wanted is None or wanted.priority != priority:
                    queue.popleft()
                    continue
                others = [job for job in self.running if job.priority != Priority.DEMAND]
                if priority != Priority.DEMAND and len(others) >= self._most(priority):
                    return None
                alone = priority == Priority.DEMAND or not others
                job = self._grown(wanted.chunk, priority) if alone else self._fitting(wanted.chunk, priority)
                if job is None:
                    self.full = True
                    return None
                queue.popleft()
                for chunk in job.chunks:
                    self._take(chunk.key)
                return job
        return None

    def _most(self, priority: Priority) -> int:
        """Demand may always start; the others leave room among the connections, on the link and for the disk."""
        if self.behind:
            return 0
        return self.jobs if priority == Priority.PREFETCH else min(self.jobs, self.sizes.background_jobs)

    def _fitting(self, first: Chunk, priority: Priority) -> Job | None:
        """The job that starts at `first` if the window has room for it.

        Asked each time that bytes arrive: what was too much before is so until enough of the window is free.
        """
        room = self.window - sum(job.outstanding for job in self.running)
        refused, size = self._refused
        if refused == first.key and size > room:
            return None
        job = self._grown(first, priority)
        if job.size > room:
            self._refused = first.key, job.size
            return None
        return job

    def _grown(self, first: Chunk, priority: Priority) -> Job:
        """The extent that starts at `first` and goes on over whatever wanted chunks follow it in the blob."""
        places = self._places[first.layer]
        at = bisect.bisect_left(places, (first.offset, first.inner, first.key))
        limit = self.extent_limit(priority)
        start, end, chunks = first.offset, first.offset + first.size, [first]
        # Of what is less urgent only a little comes along, and only with what could not be foreseen.
        company = min(limit, self.window // 4) if priority == Priority.DEMAND else 0
        for index in range(at + 1, min(at + 1 + _MOST, len(places))):
            offset, _, key = places[index]
            chunk, asked = self._wanted[key].chunk, self._wanted[key].priority
            most = limit if asked <= priority else company
            if offset > end + self.sizes.coalesce_gap or offset + chunk.size > start + most:
                break
            chunks.append(chunk)
            end = max(end, offset + chunk.size)
        job = Job(first.layer, start, end, chunks, priority)
        if priority == Priority.PREFETCH and job.size <= _SMALL:
            return self._gathered(job)
        return job

    def _gathered(self, job: Job) -> Job:
        """With more small chunks, in the order of the queue, where one request may ask for several places."""
        most = self._ranges_at_once(job.layer)
        if most <= len(job.chunks):
            return job
        size, chunks = job.size, {chunk.key: chunk for chunk in job.chunks}
        for key in islice(self._queues[job.layer in self.inside, job.priority], _LOOK):
            wanted = self._wanted.get(key)
            if wanted is None or wanted.priority != job.priority or key in chunks:
                continue
            if wanted.chunk.layer == job.layer and wanted.chunk.size <= _SMALL:
                size += wanted.chunk.size
                if size > _GATHERED or len(chunks) == most:
                    break
                chunks[key] = wanted.chunk
        return ScatteredJob(list(chunks.values()), job.priority) if len(chunks) > len(job.chunks) else job

    def extent_limit(self, priority: Priority) -> int:
        """Most bytes of one request: no more than a share of the window, so that several are under way."""
        if priority == Priority.DEMAND:
            return self.sizes.sequential_extent
        return max(min(self.extent, self.window // 2), self.sizes.grid)

    def _take(self, key: bytes) -> None:
        wanted = self._wanted.pop(key)
        self._pending[wanted.priority] -= 1
        places = self._places[wanted.chunk.layer]
        place = (wanted.chunk.offset, wanted.chunk.inner, key)
        del places[bisect.bisect_left(places, place)]
