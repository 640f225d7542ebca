"""When to ask again: back-off, Retry-After, deadlines, and the time before which a host wants to be left alone.

Decides and sleeps; sends nothing and knows no HTTP beyond the Retry-After header. Every loop of sources/ that sends
asks an `Attempts`. The clock is a parameter, so that tests take no time.
"""

import logging
import random
import threading
import time
from email.utils import parsedate_to_datetime
from typing import Protocol

from ckptfs.errors import CkptfsError, UnavailableError
from ckptfs.settings import Timeouts
from ckptfs.telemetry import NetworkCounters

log = logging.getLogger(__name__)

_LAST_TRY = 0.25  # seconds that a try which starts at the deadline may still take
_MOMENT = 1e9  # a larger Retry-After is seconds since the epoch: Docker Hub has sent such


class NoAnswer(UnavailableError):
    """Nobody answered (DNS, connect, reset, silence): an outage that a patient reader waits out.

    `at_once`: a kept connection was closed, or an answer was so late that another connection may be quicker; the first
    retry does not wait.
    """

    def __init__(self, message: str, *, hint: str = "", permanent: bool = False, at_once: bool = False) -> None:
        super().__init__(message, hint=hint, permanent=permanent)
        self.at_once = at_once


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""

    def wall(self) -> float:
        """Seconds since the epoch, for dates in headers."""

    def sleep(self, seconds: float) -> None: ...

    def random(self) -> float:
        """[0, 1), for jitter."""


class SystemClock:
    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def random(self) -> float:
        return random.random()


class HostWindows:
    """What all threads of the process know of each host: when it may be asked again, and that it answered once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opens: dict[str, float] = {}
        self._reached: set[str] = set()

    def close(self, host: str, until: float) -> None:
        """Nobody sends to `host` before `until` (clock of the caller)."""
        with self._lock:
            self._opens[host] = max(until, self._opens.get(host, until))

    def opens(self, host: str) -> float:
        return self._opens.get(host, float("-inf"))

    def reached(self, host: str) -> None:
        self._reached.add(host)

    def was_reached(self, host: str) -> bool:
        return host in self._reached


class Attempts:
    """The patience of one operation.

    seconds   how long it may go without progress.
    outlast   wait out an outage of the host until then; otherwise tries_per_host tries are enough. Answers that are
              errors (5xx) end it after tries_per_host tries in both cases.
    """

    def __init__(
        self,
        timeouts: Timeouts,
        windows: HostWindows,
        counters: NetworkCounters,
        clock: Clock,
        *,
        seconds: float,
        outlast: bool = False,
    ) -> None:
        self._timeouts = timeouts
        self._windows = windows
        self._counters = counters
        self._clock = clock
        self._seconds = seconds
        self.outlast = outlast
        self._deadline = clock.now() + seconds
        self._tries = 0
        self._arrived = 0

    @property
    def number(self) -> int:
        """Which try is under way: 1, 2, ..."""
        return self._tries + 1

    def remaining(self) -> float:
        """Seconds that a try which starts now may take; never quite 0, so that a last try can be made."""
        return max(_LAST_TRY, self._deadline - self._clock.now())

    def enter(self, host: str) -> None:
        """Wait until `host` may be asked. UnavailableError at once if that is after the deadline."""
        while (wait := self._windows.opens(host) - self._clock.now()) > 0:
            if wait > self._deadline - self._clock.now():
                raise UnavailableError(f"{host} wants to be left alone for {wait:.0f} s more", retry_after=wait)
            self._clock.sleep(wait + self._spread())

    def progress(self, count: int) -> None:
        """`count` useful bytes came. Enough of them, and the patience starts anew."""
        self._arrived += count
        if self._arrived >= self._timeouts.stall_bytes:
            self._arrived = 0
            self._tries = 0
            self._deadline = self._clock.now() + self._seconds

    def failed(self, error: CkptfsError) -> None:
        """A try failed: return when it is time for the next one, or raise `error` because there is none."""
        wait = self.pause(error)
        if wait is None:
            self._counters.failed()
            log.info("%s; given up", error.message)
            raise error
        log.info("%s; trying again in %.2f s", error.message, wait)
        self._counters.retried(error.message)
        self._clock.sleep(wait)

    def pause(self, error: CkptfsError) -> float | None:
        """A try failed: seconds until the next one may be made, None when there is none."""
        self._tries += 1
        left = self._deadline - self._clock.now()
        if not error.retryable or left <= 0:
            return None
        tries_count = not (self.outlast and isinstance(error, NoAnswer))
        if tries_count and self._tries >= self._timeouts.tries_per_host:
            return None
        if isinstance(error, NoAnswer) and error.at_once and self._tries == 1:
            return 0.0
        asked = error.retry_after if isinstance(error, UnavailableError) else None
        if asked is not None:
            return asked + self._spread() if asked <= left else None
        return min(self._backoff(), left)

    def _backoff(self) -> float:
        t = self._timeouts
        exponent = min(self._tries - 1, 32)  # 2.0 ** 1024 overflows, and the cap is reached long before
        wait = min(t.retry_first * t.retry_factor**exponent, t.retry_cap)
        return wait * (1 + t.retry_jitter * (2 * self._clock.random() - 1))

    def _spread(self) -> float:
        """Threads that wait for the same window must not all come in the same millisecond."""
        return 2 * self._timeouts.retry_first * self._clock.random()


def parse_retry_after(value: str | None, wall: float, date: str | None = None) -> float | None:
    """Seconds from now out of a Retry-After header, given as seconds or as a date (RFC 9110, 10.2.3).

    `date` is the Date header beside it: what the other side's clock says; ours, `wall`, may be an hour behind.
    """
    if value is None:
        return None
    value, now = value.strip(), _seconds(date or "")
    now = wall if now is None else now
    if value.isascii() and value.isdigit():
        seconds = float(value[:19])
        return min(seconds if seconds < _MOMENT else max(0.0, seconds - now), 1e9)
    until = _seconds(value)
    return max(0.0, until - now) if until is not None else None


def _seconds(date: str) -> float | None:
    """An HTTP date, since the epoch."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None
