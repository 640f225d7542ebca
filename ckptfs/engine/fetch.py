"""Chunks on their way: one fetch for everybody who waits, extents in flight, decode and verify in worker threads.

The scheduler decides, this module performs. A worker thread does a whole extent: GET, split into chunks, decode,
verify, deliver each chunk to its waiters as soon as its last byte is there, write all to the node's cache. Nothing
reaches a waiter before its digest has been checked. Used by reader.py and prefetch/; lives in one trio nursery.
"""

import hashlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Protocol

import trio

from ckptfs.engine.link import LinkEstimate
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.regions import RegionClaims
from ckptfs.engine.schedule import Job, Priority, Scheduler
from ckptfs.errors import CkptfsError, FormatError, IntegrityError, UnavailableError
from ckptfs.layers import Layer
from ckptfs.model.blob import Blob
from ckptfs.model.toc import Chunk, Extent, Inode
from ckptfs.settings import MiB, Settings

log = logging.getLogger(__name__)

Data = bytes | bytearray | memoryview

_LOW_WATER = 256  # chunks of the background plan that are queued at least: several extents' worth
_POLL = 0.003  # seconds between two looks at what another process of the node is fetching
_WRONG = 60.0  # seconds in which bytes that were wrong twice are not asked for again
_REFUSED = 30.0  # the same for what is not there, or not for us: a login may help
_BATCH = 1 * MiB  # decoded bytes that are written to the disk cache with one call


class ChunkStore(Protocol):
    """What the fetcher needs of the node's cache (engine/cache.py)."""

    def get(self, key: bytes) -> bytes | None: ...
    def read_into(self, key: bytes, offset: int, buffer: memoryview) -> bool: ...
    def contains(self, key: bytes) -> bool: ...
    def put_many(self, chunks: list[tuple[bytes, Data]]) -> None: ...
    def refresh(self) -> None: ...
    def try_claim(self, keys: Iterable[bytes]) -> set[bytes]: ...
    def release(self, keys: Iterable[bytes]) -> None: ...
    def drop(self, key: bytes) -> None: ...


class Sequence(Protocol):
    """A layer whose chunks only come in order (engine/scan.py)."""

    def need(self, chunk: Chunk) -> None: ...


class Waiter:
    """Somebody waits for one chunk: set exactly once, with data or with an error."""

    __slots__ = ("data", "error", "event")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.data: Data | None = None
        self.error: CkptfsError | None = None


class Fetcher:
    """Gets chunks of any layer of one mount."""

    def __init__(self, cache: ChunkStore, memory: MemoryCache, settings: Settings) -> None:
        self.cache = cache
        self.memory = memory
        self.settings = settings
        self.link = LinkEstimate(settings.sizes)
        self.scheduler = Scheduler(settings.sizes)
        self.disk_hits = 0
        self.prefetched_bytes = 0
        self.prefetched_used = 0
        self._unused: dict[bytes, int] = {}  # prefetched, not asked for yet: key -> encoded bytes
        self._layers: list[tuple[Blob, Layer]] = []
        self._sequences: dict[int, Sequence] = {}
        self._waiters: dict[bytes, Waiter] = {}
        self._flying: set[bytes] = set()
        self._failed: dict[bytes, tuple[float, CkptfsError]] = {}
        self._kept: dict[bytes, bytes] = {}
        self._condemned: dict[int, CkptfsError] = {}
        self._plan: Iterator[Chunk] | None = None
        self._wake = trio.Event()
        self._regions = RegionClaims(cache)
        self._token: trio.lowlevel.TrioToken | None = None
        self._threads = trio.CapacityLimiter(4 * settings.sizes.jobs)

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def next_layer(self) -> int:
        """The number that the next added layer will have; chunks carry it."""
        return len(self._layers)

    def add_layer(self, blob: Blob, layer: Layer, sequence: Sequence | None = None, *, inside: bool = False) -> int:
        """`inside`: the blob is a file of another layer, and is read through this fetcher."""
        if inside:
            self.scheduler.inside.add(len(self._layers))
        self._layers.append((blob, layer))
        if sequence is not None:
            self._sequences[len(self._layers) - 1] = sequence
        return len(self._layers) - 1

    def layer(self, number: int) -> tuple[Blob, Layer]:
        """What `add_layer` was given; chunks carry the number."""
        return self._layers[number]

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    # -- asking --------------------------------------------------------------------------------------------------------

    def lookup(self, chunk: Chunk) -> Data | None:
        """The chunk if this node has it: memory, then disk. Never waits for the network."""
        if self._unused:
            self.prefetched_used += self._unused.pop(chunk.key, 0)
        data = self.memory.get(chunk.key) or self._kept.get(chunk.key)
        if data is None:
            data = self.cache.get(chunk.key)
            if data is not None:
                self.disk_hits += 1
                self.memory.put(chunk.key, data)
        return data

    def lookup_into(self, chunk: Chunk, skip: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the chunk's bytes from `skip` on if this node has it; memory is left as it is."""
        data = self.memory.get(chunk.key) or self._kept.get(chunk.key)
        if data is None:
            if not self.cache.read_into(chunk.key, skip, buffer):
                return False
            self.disk_hits += 1
        else:
            piece = memoryview(data)[skip : skip + len(buffer)]
            if len(piece) != len(buffer):
                raise IntegrityError(f"a chunk is {len(buffer) - len(piece)} bytes shorter than the file that it holds")
            buffer[:] = piece
        if self._unused:
            self.prefetched_used += self._unused.pop(chunk.key, 0)
        return True

    def has(self, chunk: Chunk) -> bool:
        """Whether `lookup` would find the chunk; without reading it."""
        return chunk.key in self.memory or self.cache.contains(chunk.key) or chunk.key in self._kept

    async def get(self, chunk: Chunk, priority: Priority = Priority.DEMAND) -> Data:
        """The chunk's decoded bytes. Raises the CkptfsError that kept it away; ends after the read deadline."""
        data = self.lookup(chunk)
        if data is not None:
            return data
        waiter = self._ask(chunk, priority)
        deadline = self.settings.timeouts.read_deadline
        with trio.move_on_after(deadline):
            await waiter.event.wait()
        if waiter.error is not None:
            raise waiter.error
        if waiter.data is None:
            raise UnavailableError(f"no answer within {deadline:g} s for {self._where(chunk)}")
        return waiter.data

    def want(self, chunks: Iterable[Chunk], priority: Priority) -> None:
        """Fetch these too, nobody waits. Sequential layers and what the node has are left alone."""
        for chunk in chunks:
            key = chunk.key
            if (
                key not in self._flying
                and chunk.layer not in self._sequences
                and key not in self._failed
                and not self.has(chunk)
            ):
                self.scheduler.want(chunk, priority)
        self._kick()

    def fill(self, plan: Iterator[Chunk]) -> None:
        """Fetch these in the background, in this order, whenever the link has room."""
        self._plan = plan
        self._kick()

    @property
    def filling(self) -> bool:
        return self._plan is not None

    def _refill(self) -> None:
        if self._plan is None or self.scheduler.pending(Priority.BACKGROUND) >= _LOW_WATER:
            return
        chunks = list(islice(self._plan, 2 * _LOW_WATER))
        if not chunks:
            self._plan = None
        self.want(chunks, Priority.BACKGROUND)

    def request(self, chunks: Iterable[Chunk]) -> None:
        """Somebody will `get` all of these in a moment: let them go out together."""
        for chunk in chunks:
            self._ask(chunk, Priority.DEMAND)

    def _ask(self, chunk: Chunk, priority: Priority) -> Waiter:
        waiter = self._waiters.get(chunk.key)
        failed = self._failed.get(chunk.key)
        if chunk.layer in self._condemned:
            failed = (math.inf, self._condemned[chunk.layer])
        if failed is not None:
            until, failure = failed
            if time.monotonic() < until:
                waiter = Waiter()
                waiter.error = failure
                waiter.event.set()
                return waiter
            del self._failed[chunk.key]
        if waiter is None:
            waiter = self._waiters[chunk.key] = Waiter()
        sequence = self._sequences.get(chunk.layer)
        if sequence is not None:
            sequence.need(chunk)
        elif chunk.key not in self._flying:
            self.scheduler.want(chunk, priority)
            self._kick()
        return waiter

    def keep(self, chunks: Mapping[bytes, bytes]) -> None:
        """Chunks that are known without a fetch; they stay in memory for the mount's life, so they must be few."""
        self._kept.update(chunks)

    def keep_file(self, data: bytes, inode: Inode) -> Inode:
        """Give a file content that is made up here and lies in no blob."""
        key = hashlib.sha256(data).digest()
        self._kept[key] = data
        inode.extents = (Extent(0, len(data), Chunk(key, -1, 0, 0, len(data), key)),) if data else ()
        return inode

    async def settled(self) -> None:
        """Until no extent is on its way: what has been handed out is in the cache by then."""
        while self._flying:
            await self._wake.wait()

    # -- performing ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """The loop that starts jobs; for ever, until cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            while True:
                self._wake = trio.Event()
                self.scheduler.window = self.link.window
                self._refill()
                while (job := self.scheduler.next_job()) is not None:
                    if not self.scheduler.running:
                        self.link.busy()
                    self.scheduler.running.append(job)
                    self._flying.update(chunk.key for chunk in job.chunks)
                    nursery.start_soon(self._perform, job)
                await self._wake.wait()

    async def _perform(self, job: Job) -> None:
        failures: dict[bytes, CkptfsError] = {}
        try:
            failures = await trio.to_thread.run_sync(self._fetch, job, abandon_on_cancel=True, limiter=self._threads)
        except CkptfsError as error:
            failures = {chunk.key: error for chunk in job.chunks}
        except Exception as error:
            # A bug of ours costs this extent, not the mount: waiters get EIO, the log gets the traceback.
            log.exception("extent of layer %d at %d failed", job.layer, job.start)
            failures = {chunk.key: FormatError(f"internal error: {type(error).__name__}") for chunk in job.chunks}
        finally:
            self.scheduler.running.remove(job)
            self._flying.difference_update(chunk.key for chunk in job.chunks)
            self.link.sample(time.monotonic(), full=self.scheduler.full)
        if job.priority != Priority.DEMAND:
            self.prefetched_bytes += job.size
            self._unused.update((chunk.key, chunk.size) for chunk in job.chunks)
        for key, failure in failures.items():
            self.fail(key, failure)
        self._reask(job)
        self._kick()

    def _reask(self, job: Job) -> None:
        """A waiter that came while its chunk was neither delivered nor failed (claimed elsewhere, then lost)."""
        for chunk in job.chunks:
            if chunk.key in self._waiters:
                self.scheduler.want(chunk, Priority.DEMAND)

    def fail(self, key: bytes, error: CkptfsError) -> None:
        """Tell the waiters, and all who ask for the same chunk soon: a dead chunk is not asked for in a storm."""
        wrong = _WRONG if isinstance(error, IntegrityError | FormatError) else _REFUSED
        hold = self.settings.timeouts.retry_cap if error.retryable else wrong
        self._failed[key] = (time.monotonic() + hold, error)
        waiter = self._waiters.pop(key, None)
        if waiter is not None and waiter.data is None:
            waiter.error = error
            waiter.event.set()

    def _hand_over(self, chunks: list[tuple[bytes, Data]]) -> None:
        for key, data in chunks:
            waiter = self._waiters.pop(key, None)
            if waiter is not None:
                waiter.data = data
                waiter.event.set()
        if self.scheduler.waiting:
            self._kick()  # what has arrived makes room on the link for the next request

    def deliver_cached(self, chunk: Chunk) -> bool:
        """Hand the chunk to its waiters if this node has it after all."""
        data = self.lookup(chunk)
        if data is not None:
            self._hand_over([(chunk.key, data)])
        return data is not None

    def _kick(self) -> None:
        self._wake.set()

    def _where(self, chunk: Chunk) -> str:
        blob, layer = self._layers[chunk.layer]
        return f"bytes {chunk.offset}+{chunk.size} of {layer.format} layer {blob.descriptor.digest}"

    # -- in a worker thread --------------------------------------------------------------------------------------------

    def _fetch(self, job: Job) -> dict[bytes, CkptfsError]:
        """One extent; returns what could not be had. Chunks that another process of the node fetches are awaited."""
        blob, _ = self._layers[job.layer]
        name = blob.descriptor.digest.raw
        deadline = time.monotonic() + self.settings.timeouts.read_deadline
        failures: dict[bytes, CkptfsError] = {}
        waiting = job.chunks
        while True:
            mine, waiting, regions = self._regions.take(name, waiting)
            try:
                self.cache.refresh()
                missing = [chunk for chunk in mine if not self._found(chunk)]
                if missing:
                    failures.update(self._receive(job, missing))
            finally:
                self._regions.release(regions)
            if not waiting:
                return failures
            if time.monotonic() > deadline:
                error = UnavailableError("another process of this node did not finish the fetch")
                return failures | {chunk.key: error for chunk in waiting}
            time.sleep(_POLL)
            self.cache.refresh()
            waiting = [chunk for chunk in waiting if not self._found(chunk)]

    def _found(self, chunk: Chunk) -> bool:
        """Publish the chunk if another process, or another image, has put it into the node's cache."""
        data = self.cache.get(chunk.key)
        if data is not None:
            self._publish([(chunk.key, data)])
        return data is not None

    def _receive(self, job: Job, chunks: list[Chunk]) -> dict[bytes, CkptfsError]:
        """GET the range that holds `chunks` (sorted by offset), publish each one as it becomes whole.

        Returns what could not be had; wrong bytes are asked for once more.
        """
        blob, layer = self._layers[job.layer]
        start = chunks[0].offset
        end = max(chunk.offset + chunk.size for chunk in chunks)
        buffer = bytearray(end - start)
        view = memoryview(buffer)
        filled, at = 0, 0
        bad: list[Chunk] = []
        failures: dict[bytes, CkptfsError] = {}
        batch: list[tuple[bytes, Data]] = []
        pending = 0
        began = time.monotonic()
        try:
            for piece in blob.stream(start, end - start, attempt=job.attempt):
                now = time.monotonic()
                if not filled:
                    self.link.first_byte(now - began)
                view[filled : filled + len(piece)] = piece
                filled += len(piece)
                job.received = filled
                self.link.received(len(piece), now)
                ready: list[tuple[bytes, Data]] = []
                while at < len(chunks) and chunks[at].offset + chunks[at].size - start <= filled:
                    chunk = chunks[at]
                    at += 1
                    lo = chunk.offset - start
                    try:
                        data = layer.decode(chunk, view[lo : lo + chunk.size])
                    except (IntegrityError, FormatError) as error:
                        log.warning("%s: %s", self._where(chunk), error)
                        bad.append(chunk)
                        continue
                    ready.append((chunk.key, data))
                    pending += len(data)
                if ready:
                    self._publish(ready)
                    batch += ready
                if pending >= _BATCH:
                    self.cache.put_many(batch)
                    batch, pending = [], 0
        except CkptfsError as error:
            failures.update((chunk.key, error) for chunk in chunks[at:])
        if batch:
            self.cache.put_many(batch)
        for chunk in bad:
            if job.attempt:
                failures[chunk.key] = IntegrityError(f"wrong bytes twice for {self._where(chunk)}")
            else:
                again = Job(job.layer, chunk.offset, chunk.offset + chunk.size, [chunk], job.priority, attempt=1)
                failures.update(self._receive(again, [chunk]))
        return failures

    def _publish(self, chunks: list[tuple[bytes, Data]]) -> None:
        """To memory and to the waiters; from any thread. Memory first: who asks after the hand-over must find them."""
        for key, data in chunks:
            self.memory.put(key, data)
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._hand_over, chunks)

    def publish_stream(self, chunks: list[tuple[bytes, Data]]) -> None:
        """Chunks that came along while a layer was scanned, from the scanning thread."""
        self._publish(chunks)
        self.cache.put_many(chunks)

    def discard(self, keys: Iterable[bytes]) -> None:
        """These chunks turned out to be wrong: no cache keeps them."""
        for key in keys:
            self.memory.drop(key)
            self.cache.drop(key)

    def condemn(self, layer: int, error: CkptfsError) -> None:
        """Nothing of this layer is handed out any more: as a whole it is not what its digest says."""
        self._condemned[layer] = error
