"""What the link can carry, estimated from the traffic that there is: how much may be on the way without harm.

Prefetch that outruns the link makes a demand read wait behind megabytes of what nobody needs yet; prefetch that falls
behind leaves the link idle. The right amount is bandwidth x delay plus a little (BBR's BDP). Called from the event
loop only, apart from `received`.
"""

from collections import deque

from ckptfs.settings import MiB, Sizes

_SAMPLE = 0.05  # seconds; shorter intervals measure bursts of the receive buffer, not the link
_SLACK = 0.08  # seconds of data on top of two round trips: covers the pauses between requests of one connection
_FLOOR = 1 * MiB


class LinkEstimate:
    """`window` is the number of bytes that prefetch may have under way."""

    def __init__(self, sizes: Sizes) -> None:
        self._ceiling = sizes.in_flight
        self._delays: deque[float] = deque(maxlen=16)
        self._rates: deque[float] = deque(maxlen=8)
        self._since = 0.0
        self._bytes = 0

    @property
    def rate(self) -> float:
        """Bytes per second, the best of the last samples; 0 while unknown."""
        return max(self._rates, default=0.0)

    @property
    def delay(self) -> float:
        """Seconds from request to first byte, the best of the last requests; 0 while unknown."""
        return min(self._delays, default=0.0)

    @property
    def window(self) -> int:
        if not self._rates:
            return min(4 * MiB, self._ceiling)
        return int(min(max(self.rate * (2 * self.delay + _SLACK), _FLOOR), self._ceiling))

    def first_byte(self, seconds: float) -> None:
        self._delays.append(seconds)

    def received(self, count: int) -> None:
        """Called from the fetching threads; a lost update would only blur one sample."""
        self._bytes += count

    def busy(self, now: float) -> None:
        """The link goes from idle to busy: start measuring."""
        self._since, self._bytes = now, 0

    def sample(self, now: float) -> None:
        """The link has been busy since the last call of `busy` or `sample`."""
        elapsed = now - self._since
        if elapsed >= _SAMPLE:
            self._rates.append(self._bytes / elapsed)
            self._since, self._bytes = now, 0
