"""Chunks on their way: one fetch for everybody who waits, extents in flight, decode and verify in worker threads.

The scheduler decides, this module performs: extents.py does one extent in a worker thread, waiting.py knows who waits
for what. Lives in one trio nursery.
"""

import copy
import hashlib
import logging
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Protocol

import trio

from ckptfs.engine.disk import Buffer
from ckptfs.engine.extents import Receiver, where
from ckptfs.engine.link import LinkEstimate
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.owed import Owed
from ckptfs.engine.schedule import Job, Priority, Scheduler
from ckptfs.engine.threads import in_thread
from ckptfs.engine.waiting import Demand, Waiting
from ckptfs.engine.write_behind import ChunkStore, WriteBehind
from ckptfs.errors import CkptfsError, FormatError, IntegrityError, UnavailableError
from ckptfs.layers import Layer
from ckptfs.model.blob import Blob
from ckptfs.model.toc import UNKNOWN, Chunk, Extent, Inode, piece_of
from ckptfs.settings import Settings
from ckptfs.telemetry import NetworkCounters

log = logging.getLogger(__name__)

_LOW_WATER = 256  # chunks of the background plan that are queued at least: several extents' worth
_WRONG = 60.0  # seconds in which bytes that were wrong twice are not asked for again
_LAST_WRITES = 2.0  # seconds at the end in which what has been fetched may still be written
_REFUSED = 30.0  # the same for what is not there, or not for us: a login may help


class Sequence(Protocol):
    """A layer whose chunks only come in order (engine/scan.py)."""

    def need(self, chunk: Chunk) -> None: ...


class Fetcher:
    """Gets chunks of any layer of one mount."""

    def __init__(
        self, cache: ChunkStore, memory: MemoryCache, settings: Settings, counters: NetworkCounters | None = None
    ) -> None:
        """`counters`: those of the blobs, which know why a read has waited in vain."""
        self._counters = counters or NetworkCounters()
        self.cache = WriteBehind(cache, self._caught_up)
        self.memory = memory
        self.settings = settings
        self.link = LinkEstimate(settings.sizes)
        self.scheduler = Scheduler(settings.sizes, ranges_at_once=self._ranges_at_once)
        self.disk_hits = 0
        self.prefetched_bytes = 0
        self.prefetched_used = 0
        self._unused: dict[bytes, int] = {}  # prefetched, not asked for yet: key -> encoded bytes
        self._layers: list[tuple[Blob, Layer]] = []
        self._sequences: dict[int, Sequence] = {}
        self._flying: set[bytes] = set()
        self._failed: dict[bytes, tuple[float, CkptfsError]] = {}
        self._kept: dict[bytes, bytes] = {}
        self._condemned: dict[int, CkptfsError] = {}
        self._plan: Iterator[Chunk] | None = None
        self._background = False  # whether there has been a plan
        self._owed = Owed(settings.timeouts.retry_cap)
        self._quiet = False
        self._wake = trio.Event()
        self._waiting = Waiting()
        times = settings.timeouts  # another process may be as long without a byte as we; our readers wait longer
        patience = min(times.first_byte + times.stall_window, times.read_deadline / 3)
        gap = settings.sizes.coalesce_gap
        self._receiver = Receiver(self.cache, memory, self._waiting, self.link, patience, gap, self._arrived)
        self._threads = trio.CapacityLimiter(4 * settings.sizes.jobs)

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def next_layer(self) -> int:
        """The number that the next added layer will have; chunks carry it."""
        return len(self._layers)

    def add_layer(
        self,
        blob: Blob,
        layer: Layer,
        sequence: Sequence | None = None,
        *,
        inside: bool = False,
        number: int | None = None,
    ) -> None:
        """`inside`: the blob is a file of another layer, and is read through this fetcher.

        number  of a layer that has turned out to be this one; nobody has had a chunk of it.
        """
        number = self.next_layer if number is None else number
        if inside:
            self.scheduler.inside.add(number)
        self._layers[number : number + 1] = [(blob, layer)]
        if sequence is not None:
            self._sequences[number] = sequence

    def layer(self, number: int) -> tuple[Blob, Layer]:
        """What `add_layer` was given; chunks carry the number."""
        return self._layers[number]

    # -- asking --------------------------------------------------------------------------------------------------------

    def lookup(self, chunk: Chunk) -> Buffer | None:
        """The chunk if this node has it: memory, then disk. Never waits for the network."""
        data = self.held(chunk)
        if data is None and chunk.layer not in self._condemned:
            data = self.cache.get(chunk.key)
            if data is not None:
                self._used(chunk)
                self.disk_hits += 1
                self.memory.put(chunk.key, data)
        return data

    def held(self, chunk: Chunk) -> Buffer | None:
        """The chunk if it is in memory, and nothing is wrong with its layer."""
        if chunk.layer in self._condemned:
            return None
        data = self.memory.get(chunk.key) or self._kept.get(chunk.key)
        if data is not None:
            self._used(chunk)
        return data

    def _used(self, chunk: Chunk) -> None:
        if self._unused:
            self.prefetched_used += self._unused.pop(chunk.key, 0)

    def lookup_into(self, chunk: Chunk, skip: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the chunk's bytes from `skip` on if this node has it; memory is left as it is."""
        data = self.held(chunk)
        if data is None:
            if chunk.layer in self._condemned or not self.cache.read_into(chunk.key, skip, buffer):
                return False
            self._used(chunk)
            self.disk_hits += 1
        else:
            buffer[:] = piece_of(data, skip, len(buffer))
        return True

    def has(self, chunk: Chunk) -> bool:
        """Whether `lookup` would find the chunk; without reading it."""
        return self.holds(chunk.key)

    def holds(self, key: bytes) -> bool:
        """Whether `lookup` would find the chunk of this key."""
        return key in self.memory or self.cache.contains(key) or key in self._kept

    async def get(self, chunk: Chunk, priority: Priority = Priority.DEMAND) -> Buffer:
        """The chunk's decoded bytes. Raises the CkptfsError that kept it away; ends after the read deadline."""
        return (await self.get_all([chunk], priority))[chunk.key]

    async def get_all(self, chunks: Iterable[Chunk], priority: Priority = Priority.DEMAND) -> dict[bytes, Buffer]:
        """The decoded bytes of these chunks, by key. They go out together, and one that cannot be had is an error."""
        found: dict[bytes, Buffer] = {}
        missing: dict[bytes, Chunk] = {}
        for chunk in chunks:
            data = self.lookup(chunk)
            if data is None:
                missing[chunk.key] = chunk
            else:
                found[chunk.key] = data
        if not missing:
            return found
        demand = Demand(missing)
        self._waiting.add(demand)
        try:
            self._ask(missing.values(), priority)
            with trio.move_on_after(self.settings.timeouts.read_deadline):
                await demand.done.wait()
        finally:
            lacking = list(demand.missing)
            self._waiting.drop(demand)
        if demand.error is not None:
            raise copy.copy(demand.error)  # one that many raise would grow a traceback without end
        if lacking:
            raise self.overdue([missing[key] for key in lacking])
        return found | demand.found

    def overdue(self, chunks: Collection[Chunk]) -> UnavailableError:
        """What a read ends with that has not had these within its deadline."""
        deadline = self.settings.timeouts.read_deadline
        why = self._counters.trouble(deadline)
        known = next((chunk for chunk in chunks if chunk.layer != UNKNOWN and not self.has(chunk)), None)
        place = self._where(known) if known is not None else "a part of the image"
        return UnavailableError(f"no answer within {deadline:g} s for {place}" + (f": {why}" if why else ""))

    def want(self, chunks: Iterable[Chunk], priority: Priority) -> None:
        """Fetch these too, nobody waits. Sequential and condemned layers and what the node has are left alone."""
        if self._quiet:
            return
        for chunk in chunks:
            key = chunk.key
            if (
                key not in self._flying
                and not self.scheduler.asked(key, priority)
                and chunk.layer not in self._sequences
                and chunk.layer not in self._condemned
                and (key not in self._failed or self._refusal(chunk) is None)
                and not self.has(chunk)
            ):
                self.scheduler.want(chunk, priority)
        self._kick()

    def fill(self, plan: Iterator[Chunk]) -> None:
        """Fetch these in the background, in this order, whenever the link has room."""
        self._plan, self._background = plan, True
        self._kick()

    def quiesce(self) -> None:
        """Nothing is fetched any more unless somebody waits for it."""
        self._quiet = True
        self.scheduler.forget(Priority.PREFETCH)
        self.scheduler.forget(Priority.BACKGROUND)

    def _refill(self, now: float) -> None:
        if self._quiet or now < self._owed.until or self.scheduler.pending(Priority.BACKGROUND) >= _LOW_WATER:
            return
        chunks = self._owed.take(now)
        if not chunks and self._plan is not None:
            chunks = list(islice(self._plan, 2 * _LOW_WATER))
            if not chunks:
                self._plan = None
                self._kick()  # who waits for the end
        if chunks:
            self._owe(chunk for chunk in chunks if chunk.key in self._failed)
            self.want(chunks, Priority.BACKGROUND)

    def _owe(self, chunks: Iterable[Chunk]) -> None:
        """Those of these that may be had later are asked for again."""
        errors = ((chunk, self._refusal(chunk)) for chunk in chunks)
        self._owed.add([chunk for chunk, error in errors if error is not None and error.retryable], time.monotonic())

    def _ask(self, chunks: Iterable[Chunk], priority: Priority) -> None:
        """Get these for whoever waits for them, if they have not come while he began to wait."""
        queued = False
        for chunk in chunks:
            error = self._refusal(chunk)
            if error is not None:
                self._waiting.fail(chunk.key, error)
            elif (sequence := self._sequences.get(chunk.layer)) is not None:
                sequence.need(chunk)
            elif (data := self.memory.get(chunk.key)) is not None:
                self._waiting.deliver([(chunk.key, data)])
            elif chunk.key not in self._flying:
                self.scheduler.want(chunk, priority)
                queued = True
        if queued:
            self._kick()

    def _refusal(self, chunk: Chunk) -> CkptfsError | None:
        """Why this chunk is not asked for now."""
        if chunk.layer in self._condemned:
            return self._condemned[chunk.layer]
        until, error = self._failed.get(chunk.key, (0.0, None))
        if error is not None and time.monotonic() >= until:
            del self._failed[chunk.key]
            return None
        return error

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
        """Until nothing is on its way, nor is to be asked for any more: what can be had is in the cache by then."""
        while self._flying or self._owed or self.scheduler or self._plan is not None:
            await self._wake.wait()
        await self._written(math.inf)

    async def _written(self, patience: float) -> None:
        """Until all that has been fetched is on disk, or for `patience` seconds."""
        if not self.cache.flush(0):
            await in_thread(self.cache.flush, patience)

    # -- performing ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """The loop that starts jobs; for ever, until cancelled."""
        self._waiting.token = trio.lowlevel.current_trio_token()
        try:
            await self._start_jobs()
        finally:
            with trio.CancelScope(shield=True):
                await self._written(_LAST_WRITES)

    async def _start_jobs(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                if self._wake.is_set():  # others wait for it as well
                    self._wake = trio.Event()
                link, scheduler = self.link, self.scheduler
                scheduler.window, scheduler.extent, scheduler.jobs = link.window, link.extent, link.jobs
                scheduler.behind = self.cache.behind
                now = time.monotonic()
                self._refill(now)
                while (job := self.scheduler.next_job()) is not None:
                    if not self.scheduler.running:
                        self.link.busy()
                    self.scheduler.running.append(job)
                    self._flying.update(chunk.key for chunk in job.chunks)
                    nursery.start_soon(self._perform, job)
                with trio.move_on_after(self._owed.until - now if now < self._owed.until else math.inf):
                    await self._wake.wait()

    async def _perform(self, job: Job) -> None:
        failures: dict[bytes, CkptfsError] = {}
        try:
            failures = await in_thread(self._receiver.fetch, job, *self._layers[job.layer], limiter=self._threads)
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
            came = {chunk.key: chunk.size for chunk in job.chunks if chunk.key not in failures}
            self.prefetched_bytes += sum(came.values())
            self._unused.update(came)
        for failure in {id(failure): failure for failure in failures.values()}.values():
            layer = self._layers[job.layer][0].descriptor.digest
            log.info("%s of bytes %d-%d of %s: %s", job.priority.name.lower(), job.start, job.end - 1, layer, failure)
        for key, failure in failures.items():
            self.fail(key, failure)
        if not failures:
            self._owed.arrived()
        elif self._background:
            self._owe(chunk for chunk in job.chunks if chunk.key in failures)
        self._reask(job)
        self._kick()

    def _reask(self, job: Job) -> None:
        """A waiter that came while its chunk was neither delivered nor failed (claimed elsewhere, then lost)."""
        for chunk in job.chunks:
            if chunk.key in self._waiting:
                self.scheduler.want(chunk, Priority.DEMAND)

    def fail(self, key: bytes, error: CkptfsError) -> None:
        """Tell the waiters, and all who ask for the same chunk soon: a dead chunk is not asked for in a storm."""
        wrong = _WRONG if isinstance(error, IntegrityError | FormatError) else _REFUSED
        hold = self.settings.timeouts.retry_cap if error.retryable else wrong
        error.__traceback__ = None  # it is kept: the frames would keep what they have read
        self._failed[key] = (time.monotonic() + hold, error)
        self._waiting.fail(key, error)

    def deliver_cached(self, chunk: Chunk) -> bool:
        """Hand the chunk to its waiters if this node has it after all."""
        data = self.lookup(chunk)
        if data is not None:
            self._waiting.deliver([(chunk.key, data)])
        return data is not None

    async def discard(self, keys: Collection[bytes]) -> None:
        """These chunks turned out to be wrong: no cache keeps them. Takes a second for 20 000 of them."""
        await in_thread(self.cache.drop, *keys, finish=True)
        for key in keys:  # last, and here: what has been read meanwhile is in memory again
            self.memory.drop(key)

    def _ranges_at_once(self, layer: int) -> int:
        return self._layers[layer][0].ranges_at_once

    def _kick(self) -> None:
        self._wake.set()

    def _caught_up(self) -> None:
        """The disk is no longer behind, says the thread that writes."""
        self._waiting.soon(self._kick, once=True)

    def _arrived(self) -> None:
        """What has arrived makes room on the link for the next request."""
        if self.scheduler.full:
            self._kick()

    def _where(self, chunk: Chunk) -> str:
        return where(chunk, *self._layers[chunk.layer])

    # -- in other threads ----------------------------------------------------------------------------------------------

    def publish_stream(self, chunks: list[tuple[bytes, Buffer]]) -> None:
        """Chunks that came along while a layer was scanned, from the scanning thread.

        In place of what an earlier scan has left in the cache, which nobody has hashed if it was not run to its end:
        this one's hash will vouch for these. Into the cache first: who waited for the last one may look what this node
        has.
        """
        for key, data in chunks:
            if self.cache.get(key) not in (None, data):
                self.cache.drop(key)
        self.cache.put_many(chunks)
        self._receiver.publish(chunks)

    def condemn(self, layer: int, error: CkptfsError) -> None:
        """Nothing of this layer is handed out any more, nor waited for: as a whole it is not what its digest says."""
        error.__traceback__ = None
        self._condemned[layer] = error
        self._waiting.condemn(layer, error)
