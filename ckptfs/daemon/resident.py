"""What the daemons of mounts (serve_image.py) and of layer stores (serve_store.py) share, from start to end.

Owns how a daemon tells that it is ready, how it can be asked and stopped, and what it lets go of when nobody reads.
What it serves, and what its status says of that, is theirs.
"""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import trio

from ckptfs.control.client import MountFiles, write_state
from ckptfs.control.exposition import exposition
from ckptfs.control.metrics import open_port
from ckptfs.control.ready import tell
from ckptfs.control.server import ControlServer
from ckptfs.daemon.requests import Announce, Request
from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.threads import in_thread
from ckptfs.errors import only_error
from ckptfs.hardening import release_memory, settle

log = logging.getLogger(__name__)

_AT_REST = 15.0  # seconds without a read or a byte from the network after which the memory cache is given back
_FRAGMENTED = 60.0  # seconds of reading without a pause: 50 of 110 MiB were holes in the heap after four minutes
_REFRESH = 5.0  # seconds; looks at one directory and at the end of the files that others write: 0.1 ms

Status = Callable[[dict[str, Any]], dict[str, Any]]  # of a question: {} or {"detail": True} …


def run_with(cache: ChunkCache, serve: Callable[..., Any], *arguments: Any) -> None:
    """Run the event loop of a daemon over its cache, which is closed at the end."""
    try:
        cache.require_key()
        trio.run(serve, *arguments)
    except BaseExceptionGroup as group:
        raise only_error(group) from None
    finally:
        cache.close()


class Resident:
    """A daemon on `mountpoint`.

    facts      fields of the status that are known here.
    ready_at   monotonic; None before.
    """

    def __init__(
        self,
        request: Request,
        mountpoint: str,
        files: MountFiles,
        announce: Announce,
        status: Status,
        stop: Callable[[], None],
    ) -> None:
        self.facts: dict[str, Any] = {"metrics": None}
        self.ready_at: float | None = None
        self._request = request
        self._mountpoint = mountpoint
        self._files = files
        self._announce = announce
        self._status = status
        self._stop = stop

    async def open(self, nursery: trio.Nursery) -> None:
        """From now on there are answers: on the control socket, and on the metrics port if one was asked for."""
        if self._request.metrics is not None:
            port = await open_port(self._request.metrics, lambda: exposition([self._status({})]))
            self.facts["metrics"] = port.address
            nursery.start_soon(port.run)
        nursery.start_soon(ControlServer(self._files, {"status": self._status, "stop": self._stopped}).run)

    def ready(self, what: str, reference: str, digest: str = "") -> None:
        """A read works: tell everybody. `what` is for the log, `reference` for `ckptfs status` when we are dead."""
        self.ready_at = time.monotonic()
        self.facts["ready_ms"] = round((self.ready_at - self._request.started) * 1000, 1)
        state = {"mountpoint": self._mountpoint, "reference": reference, "pid": os.getpid()}
        write_state(self._files, state)
        log.info("%s is mounted on %s after %.0f ms", what, self._mountpoint, self.facts["ready_ms"])
        settle()
        if self._request.ready_fd is not None:
            tell(self._request.ready_fd)
        brief = {**state, "digest": digest, "ready_ms": self.facts["ready_ms"]}
        self._announce(self._status({}) if self._request.figures else brief)

    def _stopped(self, _: dict[str, Any]) -> dict[str, int]:
        self._stop()
        return {"pid": os.getpid()}


async def keep_house(cache: ChunkCache, memory: MemoryCache, activity: Callable[[], tuple[int, int]]) -> None:
    """Let go of what is not needed: files that other processes have evicted, and memory when nobody reads any more.

    `activity`: numbers that change with every read.
    """
    seen, quiet, held = (0, 0), 0.0, 0.0
    while True:
        await trio.sleep(_REFRESH)
        await in_thread(cache.refresh)
        now = activity()
        quiet = quiet + _REFRESH if now == seen else 0.0
        seen = now
        held = held + _REFRESH if not quiet else 0.0
        if _AT_REST <= quiet < _AT_REST + _REFRESH:
            memory.clear()
            release_memory()
        elif held >= _FRAGMENTED:
            held = 0.0
            await in_thread(release_memory)
