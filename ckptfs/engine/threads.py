"""Worker threads, also where there are none to be had: a limit on tasks is an outage like any other.

`pids.max` of a cgroup and `ulimit -u` count what others run as well. Who needs a thread then waits for one, within his
own deadline, in place of an error that looks like a bug of ours, or ends a mount. Called by whatever a mount cannot do
without.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import trio

log = logging.getLogger(__name__)

_PAUSE = 0.1  # seconds between two attempts to get a thread
_QUIET = 60.0  # seconds between two lines about it in the log

_told_at = float("-inf")

T = TypeVar("T")


async def in_thread(
    work: Callable[..., T], *arguments: object, limiter: trio.CapacityLimiter | None = None, finish: bool = False
) -> T:
    """What `work` returns; when cancelled it runs on and nobody waits for it, unless it is to `finish`."""
    began = False

    def run() -> T:
        nonlocal began
        began = True
        return work(*arguments)

    while True:
        try:
            return await trio.to_thread.run_sync(run, abandon_on_cancel=not finish, limiter=limiter)
        except RuntimeError as error:  # of threading
            if began:
                raise
            _tell(error)
        await trio.sleep(_PAUSE)


def _tell(error: RuntimeError) -> None:
    global _told_at
    if time.monotonic() - _told_at > _QUIET:
        _told_at = time.monotonic()
        log.warning("%s: waiting for one; see pids.max of the cgroup and `ulimit -u`", error)
