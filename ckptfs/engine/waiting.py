"""Who waits for which chunk: readers in the event loop, who are woken once, when all that they wait for is there.

Owns the demands of one mount. Chunks are delivered from the threads that fetch them; the event loop hears of it only
when a read can go on, for every wake-up of it costs as much as decoding a chunk. Called by fetch.py and extents.py.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

import trio

from ckptfs.engine.disk import Buffer
from ckptfs.errors import CkptfsError
from ckptfs.model.toc import Chunk


class Demand:
    """What one reader waits for: `done` is set when `found` has every key, or with the `error` that kept one away."""

    __slots__ = ("done", "error", "found", "layers", "missing")

    def __init__(self, chunks: Mapping[bytes, Chunk]) -> None:
        self.missing = set(chunks)
        self.layers = {chunk.layer for chunk in chunks.values()}
        self.found: dict[bytes, Buffer] = {}
        self.error: CkptfsError | None = None
        self.done = trio.Event()

    def take(self, key: bytes, data: Buffer) -> bool:
        """Whether this was the last one."""
        self.found[key] = data
        self.missing.discard(key)
        return not self.missing


class Waiting:
    """All demands. `token`, of the event loop in which they wait, is set before the first delivery."""

    def __init__(self) -> None:
        self.token: trio.lowlevel.TrioToken | None = None
        self._demands: dict[bytes, list[Demand]] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: bytes) -> bool:
        return key in self._demands

    def add(self, demand: Demand) -> None:
        """From now on nothing that the demand misses is delivered without it. Look for it once more afterwards."""
        with self._lock:
            for key in demand.missing:
                self._demands.setdefault(key, []).append(demand)

    def drop(self, demand: Demand) -> None:
        """The reader has given up, or has got what it waited for."""
        with self._lock:
            for key in demand.missing:
                waiting = self._demands.get(key)
                if waiting is not None:
                    waiting.remove(demand)
                    if not waiting:
                        del self._demands[key]
            demand.missing = set()

    def deliver(self, chunks: Iterable[tuple[bytes, Buffer]]) -> None:
        """These have arrived, and can be found by whoever asks from now on. From any thread."""
        done: list[Demand] = []
        for key, data in chunks:
            if key not in self._demands:
                continue
            with self._lock:
                done += [demand for demand in self._demands.pop(key, ()) if demand.take(key, data)]
        if done:
            self.soon(partial(_wake, done))

    def fail(self, key: bytes, error: CkptfsError) -> None:
        """Who waits for this chunk gets the error. In the event loop."""
        with self._lock:
            demands = self._demands.pop(key, ())
            for demand in demands:
                demand.missing.discard(key)
        for demand in demands:
            demand.error = demand.error or error
            demand.done.set()

    def condemn(self, layer: int, error: CkptfsError) -> None:
        """Who waits for anything of this layer gets the error. In the event loop."""
        with self._lock:
            found = {demand for demands in self._demands.values() for demand in demands if layer in demand.layers}
        for demand in found:
            demand.error = demand.error or error
            demand.done.set()

    def soon(self, action: Callable[[], None], *, once: bool = False) -> None:
        """Call `action` in the event loop, if there still is one; `once`: unless the same is about to be called."""
        if self.token is not None:
            with suppress(trio.RunFinishedError):
                self.token.run_sync_soon(action, idempotent=once)


def _wake(demands: Iterable[Demand]) -> None:
    for demand in demands:
        demand.done.set()
