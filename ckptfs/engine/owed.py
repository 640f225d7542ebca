"""What the background could not have, and when it is asked for again.

A registry that is down for an hour is asked for a few chunks each minute, not for all of an image again and again; one
that is back is asked for everything. Pure: no clock, no I/O. Used by fetch.py; `longer` also by image/ahead.py, which
asks before it knows what there is to fetch.
"""

from collections.abc import Iterable
from itertools import islice

from ckptfs.model.toc import Chunk

_FEW = 8  # chunks, mostly one request, that tell whether there are more to be had
_LONGEST = 60.0  # seconds between two such requests


def longer(pause: float, first: float) -> float:
    """The pause behind one more failure: `first` seconds, then always twice as long as before, at most a minute."""
    return min(2 * pause or first, _LONGEST)


class Owed:
    """Chunks by key; all times are monotonic seconds.

    first   the pause after the first failure; see `longer`.
    until   nothing more is asked for in the background before.
    """

    def __init__(self, first: float) -> None:
        self.until = float("-inf")
        self._first = first
        self._pause = 0.0
        self._asking = False
        self._chunks: dict[bytes, Chunk] = {}

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def add(self, chunks: Iterable[Chunk], now: float) -> None:
        """These could not be had now, but may be later."""
        before = len(self._chunks)
        self._chunks.update((chunk.key, chunk) for chunk in chunks)
        if len(self._chunks) > before and (self._asking or now >= self.until):
            self._pause = longer(self._pause, self._first)
            self.until = now + self._pause
            self._asking = False

    def arrived(self) -> None:
        """Something has come: there is more to be had."""
        self._pause, self.until, self._asking = 0.0, float("-inf"), False

    def take(self, now: float) -> list[Chunk]:
        """What to ask for again, once `until` has passed."""
        taken = list(islice(self._chunks.values(), _FEW if self._pause else None))
        for chunk in taken:
            del self._chunks[chunk.key]
        if taken and self._pause:
            self._asking, self.until = True, now + _LONGEST  # or until it is known what became of these
        return taken
