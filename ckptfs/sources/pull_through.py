"""Mirrors that pull through: whether a host serves ranges of a large blob yet, found out by one thread for all.

docker-registry as a mirror fetches a blob when it is first asked for, and until it has all of it answers any range with
all of the blob, straight from the registry: every such answer costs the registry megabytes, even if it is dropped after
its headers. So a mirror is asked for one byte first, by one thread, on a connection with a small window (transport.py);
the others wait. While it fetches, it is asked again now and then, for at most Timeouts.mirror_fill. Used by blobs.py.
"""

import copy
import threading
from collections.abc import Callable

from ckptfs.errors import CkptfsError, UnavailableError
from ckptfs.sources.transport import Transport

_FILL_RATE = 1e9  # bytes per second: no mirror gets a blob sooner
_LOOK = 0.05  # seconds between two looks at what another thread finds out


class NoRanges(UnavailableError):
    """A host has no ranges of a blob that is too large to be had whole in place of one."""


class RangeGate:
    """One blob of `size` bytes at one host. `ask_first`: nothing is known; otherwise it is thought to serve ranges."""

    def __init__(self, transport: Transport, size: int, *, ask_first: bool) -> None:
        self._clock = transport.clock
        self._timeouts = transport.settings.timeouts
        self._changed = threading.Condition()
        self._least = size / _FILL_RATE
        self._open = not ask_first
        self._asking = False
        self._since: float | None = None  # when all of the blob first came in place of a range
        self._ask_at = float("-inf")
        self._pause = 0.0
        self._failures = 0
        self._error: CkptfsError | None = None

    def wait(self, ask: Callable[[], bool], leave: Callable[[], bool]) -> bool:
        """Returns True when ranges are served; False when they are not yet and `leave` says to go elsewhere.

        `ask` asks the host whether it serves ranges; its errors are raised here, in every thread that waits for it.
        NoRanges when the host has sent the whole blob for too long.
        """
        failures, may_leave = self._failures, True
        while True:
            with self._changed:
                if self._open:
                    return True
                if self._failures != failures and self._error is not None:
                    raise copy.copy(self._error)  # one exception raised by many threads would grow one traceback
                pause = self._ask_at - self._clock.now()
                my_turn = not self._asking and pause <= 0
                if self._asking:
                    self._changed.wait(_LOOK)
                self._asking = self._asking or my_turn
                filling = self._since is not None
            if my_turn:
                self._ask(ask)
            elif filling and may_leave and leave():
                return False
            elif pause > 0:
                may_leave = False
                self._clock.sleep(min(pause, _LOOK))

    def closed(self) -> None:
        """All of the blob came in place of a range."""
        with self._changed:
            self._note()

    def _ask(self, ask: Callable[[], bool]) -> None:
        served, error = False, None
        try:
            served = ask()
        except CkptfsError as found:
            error = found
            raise
        finally:
            with self._changed:
                self._asking = False
                if error is not None:
                    self._fail(error)
                elif served:
                    self._open, self._since = True, None
                else:
                    self._note()
                self._changed.notify_all()

    def _note(self) -> None:
        now = self._clock.now()
        if self._since is None:
            self._open, self._since = False, now
            self._pause = max(self._timeouts.retry_first, self._least)
        elif now - self._since > self._timeouts.mirror_fill:
            self._since = None
            self._fail(NoRanges("it sends whole blobs in place of ranges", permanent=True))
        self._pause *= 2
        self._ask_at = now + self._pause

    def _fail(self, error: CkptfsError) -> None:
        self._failures += 1
        self._error = error
