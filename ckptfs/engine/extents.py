"""One extent in a worker thread: claim it on the node, GET it, decode and verify each chunk as it becomes whole.

Nothing leaves here, to memory, to who waits, to the node's cache, before its digest has been checked. Never decides
what is fetched. Called by fetch.py.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from ckptfs.engine.cutting import Cutter
from ckptfs.engine.disk import Buffer
from ckptfs.engine.link import LinkEstimate
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.regions import RegionClaims
from ckptfs.engine.schedule import Job, Priority, parted, ranges_of
from ckptfs.engine.waiting import Waiting
from ckptfs.engine.write_behind import WriteBehind
from ckptfs.errors import CkptfsError, FormatError, IntegrityError
from ckptfs.layers import Layer
from ckptfs.model.blob import Blob
from ckptfs.model.toc import Chunk
from ckptfs.settings import MiB

log = logging.getLogger(__name__)

_POLL = 0.003  # seconds between two looks at what another process of the node is fetching
_BATCH = 1 * MiB  # decoded bytes that are handed to the cache with one call
_WARY, _BRIEFLY = 60.0, 0.25  # seconds after a wait in vain in which others are waited for only so long
_SHARES = 8  # of the window: so much has arrived before the event loop looks whether there is room for another request


class Receiver:
    """Performs jobs. `arrived` is called in the event loop each time that a share of the window has come in.

    patience    seconds without a chunk from another process of the node that has claimed it: it is stopped, or hangs.
    gap         bytes that others bring, which are cheaper to fetch than another request.
    """

    def __init__(
        self,
        cache: WriteBehind,
        memory: MemoryCache,
        waiting: Waiting,
        link: LinkEstimate,
        patience: float,
        gap: int,
        arrived: Callable[[], None],
    ) -> None:
        self._cache = cache
        self._memory = memory
        self._waiting = waiting
        self._link = link
        self._patience = patience
        self._gap = gap
        self._wary_until = 0.0
        self._arrived = arrived
        self._regions = RegionClaims(cache)

    def fetch(self, job: Job, blob: Blob, layer: Layer) -> dict[bytes, CkptfsError]:
        """One extent; returns what could not be had. Chunks that another process of the node fetches are awaited."""
        name = blob.descriptor.digest.raw
        failures: dict[bytes, CkptfsError] = {}
        waiting = job.chunks
        alone = math.inf
        while True:
            mine, waiting, regions = self._regions.take(name, waiting)
            try:
                self._cache.refresh()
                missing = [chunk for chunk in mine if not self._found(chunk)]
                for part in parted(missing, math.inf if job.scattered else self._gap):
                    failures.update(self._receive(job, part, blob, layer))
            finally:
                # Not before others can find them on disk, or they fetch them once more.
                self._cache.after(partial(self._regions.release, regions))
            if not waiting:
                return failures
            time.sleep(_POLL)
            self._cache.refresh()  # before judging: to fetch `mine` may have taken longer than the patience
            left = [chunk for chunk in waiting if not self._found(chunk)]
            now = time.monotonic()
            if alone == math.inf or len(left) < len(waiting):
                alone = now + (_BRIEFLY if now < self._wary_until else self._patience)
            elif now > alone:
                if now > self._wary_until:
                    log.warning("%s: another process claims them and does not fetch", where(left[0], blob, layer))
                self._wary_until = now + _WARY
                return failures | self._receive(job, left, blob, layer)
            waiting = left

    def publish(self, chunks: list[tuple[bytes, Buffer]]) -> None:
        """To memory and to the waiters; from any thread. Memory first: who asks after the delivery must find them."""
        self._memory.put_many(chunks)
        self._waiting.deliver(chunks)

    def _found(self, chunk: Chunk) -> bool:
        """Publish the chunk if another process, or another image, has put it into the node's cache."""
        data = self._cache.get(chunk.key)
        if data is not None:
            self.publish([(chunk.key, data)])
        return data is not None

    def _receive(self, job: Job, chunks: list[Chunk], blob: Blob, layer: Layer) -> dict[bytes, CkptfsError]:
        """GET the ranges that hold `chunks` (sorted by offset), publish each one as it becomes whole.

        Returns what could not be had; wrong bytes are asked for once more.
        """
        cutter = Cutter(chunks)
        bad: list[Chunk] = []
        failures: dict[bytes, CkptfsError] = {}
        batch: list[tuple[bytes, Buffer]] = []
        pending, urgent = 0, job.priority is Priority.DEMAND
        try:
            for at, piece in self._pieces(job, ranges_of(chunks, apart=job.scattered), blob):
                ready = _decoded(cutter.feed(at, piece), bad, blob, layer)
                if ready:
                    self.publish(ready)
                    batch += ready
                    pending += sum(len(data) for _, data in ready)
                if pending >= _BATCH:
                    self._cache.put_many(batch, urgent=urgent)
                    batch, pending = [], 0
        except CkptfsError as error:
            failures.update((chunk.key, error) for chunk in cutter.missing)
        if batch:
            self._cache.put_many(batch, urgent=urgent)
        for chunk in bad:
            if job.attempt:
                failures[chunk.key] = IntegrityError(f"wrong bytes twice for {where(chunk, blob, layer)}")
            else:
                again = Job(job.layer, chunk.offset, chunk.offset + chunk.size, [chunk], job.priority, attempt=1)
                failures.update(self._receive(again, [chunk], blob, layer))
        return failures

    def _pieces(
        self, job: Job, ranges: Sequence[tuple[int, int]], blob: Blob
    ) -> Iterator[tuple[int, bytes | memoryview]]:
        """What comes of the ranges; the estimate of the link, and who waits for room on it, are told."""
        filled, told = 0, 0
        began = idle = time.monotonic()
        first, waiting = 0.0, 0.0
        for at, piece in blob.stream_ranges(ranges, attempt=job.attempt, patient=self._link.patient):
            now = time.monotonic()
            if filled:
                waiting += now - idle
            else:
                self._link.first_byte(now - began)
                first = now
            filled += len(piece)
            job.received += len(piece)
            self._link.received(len(piece), now)
            yield at, piece
            if filled - told >= self._link.window // _SHARES:
                told = filled
                self._waiting.soon(self._arrived, once=True)
            idle = time.monotonic()
        self._link.spent(filled, waiting, idle - first)


def _decoded(
    whole: Iterable[tuple[Chunk, memoryview]], bad: list[Chunk], blob: Blob, layer: Layer
) -> list[tuple[bytes, Buffer]]:
    """The chunks by key; those with wrong bytes are added to `bad`."""
    ready: list[tuple[bytes, Buffer]] = []
    for chunk, encoded in whole:
        try:
            ready.append((chunk.key, layer.decode(chunk, encoded)))
        except (IntegrityError, FormatError) as error:
            log.warning("%s: %s", where(chunk, blob, layer), error)
            bad.append(chunk)
    return ready


def where(chunk: Chunk, blob: Blob, layer: Layer) -> str:
    """For messages."""
    return f"bytes {chunk.offset}+{chunk.size} of {layer.format} layer {blob.descriptor.digest}"
