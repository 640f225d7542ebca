"""What is counted of the network: requests, bytes, retries. Counters are cheap and may be touched from any thread.

Read by the daemons (status) and by commands that tell what they fetched; written by sources/. Knows nobody.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_MAX_SPANS = 256  # kept for round_trips(), which is only asked about start-up


class NetworkCounters:
    """Traffic of one mount. `bytes` are body bytes received; `spans` the (start, end) of the first requests."""

    def __init__(self) -> None:
        self.requests = 0
        self.bytes = 0
        self.retries = 0
        self.errors = 0
        self.in_flight = 0
        self.spans: list[tuple[float, float]] = []
        self._trouble = (float("-inf"), "")
        self._lock = threading.Lock()
        self._aside = threading.local()

    def figures(self) -> dict[str, int]:
        """As a status has them."""
        return {name: getattr(self, name) for name in ("requests", "bytes", "retries", "errors", "in_flight")}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Requests that this thread makes inside are counted, but nothing waits for them: they are no round trips."""
        self._aside.on = True
        try:
            yield
        finally:
            self._aside.on = False

    def began(self) -> float:
        """A request goes out; returns the token for `ended`."""
        with self._lock:
            self.requests += 1
            self.in_flight += 1
        return time.monotonic()

    def ended(self, began: float) -> None:
        now = time.monotonic()
        with self._lock:
            self.in_flight -= 1
            if len(self.spans) < _MAX_SPANS and not getattr(self._aside, "on", False):
                self.spans.append((began, now))

    def received(self, count: int) -> None:
        with self._lock:
            self.bytes += count

    def retried(self, why: str) -> None:
        """A try failed, and there will be another; `why` for people, without secrets."""
        with self._lock:
            self.retries += 1
            self._trouble = (time.monotonic(), why)

    def trouble(self, seconds: float) -> str:
        """Why the last try failed, if that was in the last `seconds`; "" otherwise."""
        when, why = self._trouble
        return why if time.monotonic() - when < seconds else ""

    def failed(self) -> None:
        with self._lock:
            self.errors += 1

    def round_trips(self, until: float) -> int:
        """How many requests that ended before `until` (monotonic) had to follow one another: the longest chain."""
        with self._lock:
            spans = sorted(self.spans, key=lambda span: span[1])
        chain, free_at = 0, 0.0
        for start, end in spans:
            if end <= until and start >= free_at:
                chain, free_at = chain + 1, end
        return chain
