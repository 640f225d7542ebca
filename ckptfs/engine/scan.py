"""Reading a layer's table of contents while its content is already being served.

One `LayerScan` per layer drives `Layer.scan` in a thread and hands entries to the event loop as they become known. For
a sequential layer (gzip, one zstd frame) it is also the only way to the content: `need` says how far the stream has to
run, and a chunk that has passed and was lost from every cache makes the stream start again.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable

import trio

from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.threads import in_thread
from ckptfs.errors import CkptfsError, FormatError, IntegrityError, UnavailableError
from ckptfs.layers import Layer
from ckptfs.model.toc import Chunk, Entry

log = logging.getLogger(__name__)


class _Rewind(Exception):
    """Raised in the scanning thread to start the stream again."""


class _Stopped(Exception):
    """Raised in the scanning thread when the mount ends."""


class LayerScan:
    """`on_entries(entries)` and `on_end(error or None)` are called in the event loop; on_end once per complete scan."""

    def __init__(
        self,
        layer: Layer,
        fetcher: Fetcher,
        on_entries: Callable[[list[Entry]], None],
        on_end: Callable[[CkptfsError | None], None],
        *,
        number: int | None = None,
        known: bool = False,
        eager: bool = True,
    ) -> None:
        """`number`: the layer's in the fetcher, if it has one. `known`: the entries are known, only content can miss.

        `eager`: run without being asked.
        """
        self.layer = layer
        self.position = 0  # decoded bytes of a sequential layer that have passed
        self.complete = known
        self.passed = False  # the layer has been scanned to its end here; a stream has had its digest then
        self.error: CkptfsError | None = None
        self.dormant = False  # nobody has looked into it yet, and nobody waits for it
        self._fetcher = fetcher
        self.number = number
        self._on_entries = on_entries
        self._on_end = on_end
        self._known = known
        self._announced = 0  # entries handed over, so that a second run does not repeat them
        self._inbox: deque[Entry] = deque()
        self._draining = False
        self._wanted = 0 if known or not eager else 1 << 62
        self._asked: dict[bytes, Chunk] = {}
        self._keys: list[bytes] = []
        self._rewind = False
        self._stopped = False
        self._running = False
        self._gate = threading.Condition()
        self._go = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        # Its own: a stream rests in its thread until it is needed, and trio's 40 are for everybody else.
        self._thread = trio.CapacityLimiter(1)

    # -- in the event loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Scan, and again whenever it is needed; ends when all is known of a layer with random access."""
        self._token = trio.lowlevel.current_trio_token()
        if not self._known:
            self._go = trio.Event()  # who asked before the start is served by this run: no second one for them
            await self._once()
        while self.layer.sequential or not self.complete:
            await self._go.wait()
            self._go = trio.Event()
            await self._once()

    def need(self, chunk: Chunk) -> None:
        """Somebody waits for this chunk of a sequential layer."""
        if self.error is not None and not self.error.retryable:
            self._fetcher.fail(chunk.key, self.error)
            return
        with self._gate:
            self._asked[chunk.key] = chunk
            self._wanted = max(self._wanted, chunk.offset + chunk.length)
            if chunk.offset < self.position:
                if self._fetcher.deliver_cached(chunk):
                    del self._asked[chunk.key]
                    return
                self._rewind = self._running
            self._gate.notify_all()
        if not self._running:
            self._go.set()

    def run_on(self) -> None:
        """Let the stream run to its end: names are waited for, or the background fetches everything."""
        with self._gate:
            self._wanted = 1 << 62
            self._gate.notify_all()
        if not self._running and not (self.complete and self._known):
            self._go.set()

    def stop(self) -> None:
        """The mount ends: the scanning thread stops at its next chunk."""
        with self._gate:
            self._stopped = True
            self._gate.notify_all()

    async def _once(self) -> None:
        self._running = True
        failure: CkptfsError | None = None
        try:
            failure = await self._attempt(0)
            if isinstance(failure, IntegrityError):
                log.error("%s; everything that was kept of it is dropped, trying again", failure)
                await self._fetcher.discard(self._keys)
                failure = await self._attempt(1)
            if isinstance(failure, IntegrityError):
                if self.number is not None:
                    self._fetcher.condemn(self.number, failure)
                await self._fetcher.discard(self._keys)
        except _Stopped:
            return
        finally:
            self._running = False
        self._drain()
        self.error = failure
        first = not self.complete
        self.complete = self.complete or failure is None
        self.passed = self.passed or failure is None
        self._settle(failure)
        if first or isinstance(failure, IntegrityError):
            self._on_end(failure)

    def _settle(self, failure: CkptfsError | None) -> None:
        """The stream has ended: who still waits for a chunk that has passed gets another run, others the failure."""
        with self._gate:
            asked, self._asked, self._rewind = self._asked, {}, False
        for chunk in asked.values():
            if self._fetcher.deliver_cached(chunk):
                continue
            if failure is None and chunk.offset < self.position:
                with self._gate:
                    self._asked[chunk.key] = chunk
                self._go.set()
            else:
                self._fetcher.fail(chunk.key, failure or UnavailableError("the stream ended before the chunk"))

    async def _attempt(self, attempt: int) -> CkptfsError | None:
        try:
            finished = await in_thread(self._scan, attempt, limiter=self._thread)
        except CkptfsError as error:
            error.__traceback__ = None  # it is kept: the frames would keep the stream open
            return error
        except Exception as error:
            log.exception("scan of %s layer failed", self.layer.format)
            return FormatError(f"internal error while reading a layer: {type(error).__name__}")
        if not finished:
            raise _Stopped
        return None

    def _drain(self) -> None:
        self._draining = False
        entries = []
        while self._inbox:
            entries.append(self._inbox.popleft())
        if entries:
            self._on_entries(entries)

    # -- in the scanning thread ----------------------------------------------------------------------------------------

    def _scan(self, attempt: int) -> bool:
        """False when it was stopped: as an exception it would keep the stream open until it is collected."""
        while True:
            with self._gate:
                self.position, self._keys, self._rewind = 0, [], False  # all that was asked for is still to come
            try:
                for count, entry in enumerate(self.layer.scan(self._emit, attempt=attempt)):
                    if self._known or count < self._announced:
                        continue
                    self._announced = count + 1
                    self._inbox.append(entry)
                    if not self._draining and self._token is not None:
                        self._draining = True
                        self._token.run_sync_soon(self._drain)
                    if self._stopped:
                        return False
                return True
            except _Rewind:
                continue
            except _Stopped:
                return False

    def _emit(self, chunk: Chunk, data: bytes) -> None:
        self._fetcher.publish_stream([(chunk.key, data)])
        if not self.layer.sequential:
            return
        self._keys.append(chunk.key)
        with self._gate:
            self.position = chunk.offset + len(data)
            asked = self._asked.pop(chunk.key, None) is not None
        if asked:
            # Whoever asked between the hand-over and now, and found the chunk gone from both caches again.
            self._fetcher.publish_stream([(chunk.key, data)])
        with self._gate:
            while self.position >= self._wanted and not self._rewind and not self._stopped:
                self._gate.wait()
            if self._stopped:
                raise _Stopped
            # First to whoever waits further on: or two readers of a small cache could send the stream back for ever.
            if self._rewind and all(ahead.offset < self.position for ahead in self._asked.values()):
                raise _Rewind
