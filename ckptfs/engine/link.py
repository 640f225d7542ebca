"""What the link can carry, estimated from the traffic that there is: how much may be on the way without harm.

Prefetch that outruns the link makes a demand read wait behind megabytes of what nobody needs yet; prefetch that falls
behind leaves the link idle. The right amount is bandwidth x delay plus a little (BBR's BDP). Where the link outruns us
there is no such harm: what counts then is that requests are few and long. Called from the event loop only, apart from
`first_byte`, `received` and `spent`.
"""

import os
from collections import deque

from ckptfs.settings import KiB, Sizes

_SAMPLE = 0.05  # seconds; shorter intervals measure bursts of the receive buffer, not the link
_SAMPLE_BYTES = 512 * KiB
_SLACK = 0.03  # seconds of data on top of a round trip, at least: covers the pauses between requests of one connection
_PATIENCE = 0.25  # the same where nobody waits for a single page: longer requests, fewer of them
_OUTRUN = 0.6  # of a body's time is waiting for it, at most, where decoding takes the rest: 0.01 to 0.45; else 0.8 to 1
_FLOOR = 512 * KiB  # two chunks of a pages file
_GUESS = 25e6  # bytes per second until the first sample: 2 MB at no delay, 12 MB at 200 ms


class LinkEstimate:
    """Estimates, brought up to date when something is learnt: they are asked for far more often.

    window  bytes that prefetch may have under way.
    extent  bytes that one request of it may ask for, at most.
    jobs    requests of it that may be under way, at most.
    outrun  whether bytes come faster than they are decoded.
    patient see `be_patient`.
    rate    bytes per second, the best of the last samples; 0 while unknown.
    delay   seconds from request to first bytes, the best of many: those that had the link to themselves. 0: unknown.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._ceiling = sizes.in_flight
        self._usual = sizes.sequential_extent
        self._jobs = sizes.jobs
        self._processors = max(len(os.sched_getaffinity(0)), 2)
        self._delays: deque[float] = deque(maxlen=128)
        self._rates: deque[float] = deque(maxlen=8)
        self._spent: deque[tuple[float, float]] = deque(maxlen=8)
        self.outrun = False
        self.patient = False
        self._since: float | None = None
        self._bytes = 0
        self.rate = self.delay = 0.0
        self._judge()

    def first_byte(self, seconds: float) -> None:
        """Called from the fetching threads."""
        self._delays.append(seconds)
        self.delay = min(self._delays)
        self._judge()

    def received(self, count: int, now: float) -> None:
        """Called from the fetching threads; a lost update would only blur one sample."""
        if self._since is None:
            self._since = now  # what came before, and the way of the first bytes, say nothing of the bandwidth
        else:
            self._bytes += count

    def spent(self, count: int, waiting: float, seconds: float) -> None:
        """A body of `count` bytes took `seconds` from its first bytes on, with `waiting` for the others among them.

        Called from the fetching threads.
        """
        if count < _SAMPLE_BYTES:  # what comes in one piece tells nothing
            return
        self._spent.append((waiting, seconds))
        waits, all_seconds = zip(*self._spent, strict=True)
        outrun = sum(waits) < _OUTRUN * sum(all_seconds)
        if outrun != self.outrun:
            self.outrun = outrun
            self._judge()

    def be_patient(self, patient: bool) -> None:
        """Whether what arrives is read from front to back, and no process waits for single pages behind it."""
        if patient != self.patient:
            self.patient = patient
            self._judge()

    def busy(self) -> None:
        """The link goes from idle to busy: start measuring."""
        self._since, self._bytes = None, 0

    def sample(self, now: float, *, full: bool) -> None:
        """The link has been busy since the last call of `busy` or `sample`, and is `full` if more had to wait.

        If it was not full, its rate says no more than that the link carries at least so much (BBR: "app-limited").
        """
        if self._since is None:
            return
        elapsed = now - self._since
        # A few chunks that came in one burst, or one small request, would make the estimate far too high or low.
        if self._bytes and elapsed >= _SAMPLE and (self._bytes >= _SAMPLE_BYTES or elapsed >= 20 * _SAMPLE):
            rate = self._bytes / elapsed
            if full or rate > (self.rate or _GUESS):
                self._rates.append(rate)
                self.rate = max(self._rates)
                self._judge()
            self._since, self._bytes = None, 0

    def _judge(self) -> None:
        if self.outrun:
            # Each request costs 2 ms of the processor, and more threads than processors fight for the interpreter:
            # 1 GB from loopback, two processors: 4.1 s with 8 of 1 to 4 MB (in 3.7 s), 3.5 s with 2 of 8 MB (in 2.9 s).
            self.window, self.extent = self._ceiling // 2, self._ceiling // 4
            self.jobs = min(self._processors, self._jobs)
            return
        window = (self.rate or _GUESS) * (self.delay + max(self.delay, _PATIENCE if self.patient else _SLACK))
        self.window = int(min(max(window, _FLOOR), self._ceiling))
        # Each costs the processor, but over a long way more of them beside each other fill the link better:
        # 89 % of it at 200 ms with 4 MiB, 86 % with half of the window.
        self.extent = self._usual if self.delay > _SLACK else self._ceiling
        self.jobs = self._jobs
