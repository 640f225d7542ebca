"""What the process has learnt of hosts: who failed or lied lately, and how soon each one usually answers.

Two uses: mirrors.py passes over a host that is not well, and transport.py loses patience with one that is much later
than usual. Values only, from any thread; the clock is the caller's.
"""

import threading
from collections import defaultdict, deque

_AVOIDED = 1.0  # seconds after the first failure, doubled with every further one
_AVOIDED_MOST = 60.0
_LIE = 30.0  # wrong bytes are rarely an accident of the moment
_LIE_MOST = 600.0
_USUAL = 8  # times the slowest of the last answers is not usual any more


class _Record:
    __slots__ = ("delays", "failed_until", "failures", "lied_until", "lies")

    def __init__(self) -> None:
        self.failures = self.lies = 0
        self.failed_until = self.lied_until = float("-inf")
        self.delays: deque[float] = deque(maxlen=16)


class Standing:
    """By host[:port]."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: defaultdict[str, _Record] = defaultdict(_Record)

    def answered(self, host: str, seconds: float) -> None:
        """From the request to the headers of the answer."""
        with self._lock:
            self._records[host].delays.append(seconds)

    def worked(self, host: str) -> None:
        with self._lock:
            record = self._records[host]
            record.failures, record.failed_until = 0, float("-inf")

    def failed(self, host: str, now: float) -> None:
        """No answer, a broken one, or an error of the server."""
        with self._lock:
            record = self._records[host]
            record.failures += 1
            record.failed_until = now + min(_AVOIDED * 2.0 ** min(record.failures - 1, 16), _AVOIDED_MOST)

    def lied(self, host: str, now: float) -> None:
        """Bytes that do not have their digest, or none where we have no right to be."""
        with self._lock:
            record = self._records[host]
            record.lies += 1
            record.lied_until = now + min(_LIE * 2.0 ** min(record.lies - 1, 16), _LIE_MOST)

    def avoided(self, host: str, now: float) -> bool:
        """Whether others should be asked first."""
        with self._lock:
            record = self._records.get(host)
            return record is not None and now < max(record.failed_until, record.lied_until)

    def patience(self, host: str, least: float, most: float) -> float:
        """Seconds to wait for an answer: far more than is usual, `most` where nothing is known yet."""
        with self._lock:
            record = self._records.get(host)
            usual = max(record.delays, default=most) if record is not None else most
        return min(max(least, _USUAL * usual), most)
