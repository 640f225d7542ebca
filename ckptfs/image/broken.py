"""What is wrong with layers of an open image, and how another try begins where that can help.

Owns how long an error is told before anything is asked for again, so that a dead registry is not asked by every look.
Used by opened.py.
"""

import copy
import math
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from ckptfs.errors import CkptfsError

Again = Callable[[], object]


class _Fault(NamedTuple):
    """`until`: monotonic seconds; inf: for good. `again` begins another try; None: one is under way."""

    error: CkptfsError
    until: float
    again: Again | None


class Broken:
    """By rank. `hold`: seconds for which an error that another try can help is told."""

    def __init__(self, hold: float) -> None:
        self._hold = hold
        self._faults: dict[int, _Fault] = {}

    def __contains__(self, rank: int) -> bool:
        return rank in self._faults

    def add(self, rank: int, error: CkptfsError, again: Again | None) -> None:
        error.__traceback__ = None  # it is kept: the frames would keep what they have read
        hold = self._hold if error.retryable and again is not None else math.inf
        self._faults[rank] = _Fault(error, time.monotonic() + hold, again)

    def mended(self, rank: int) -> None:
        """All of the layer has arrived. What was wrong with its entries is wrong still."""
        if rank in self._faults and self._faults[rank].until < math.inf:
            del self._faults[rank]

    def require(self, ranks: Collection[int] | None) -> None:
        """Raise what is wrong with a layer, with one of `ranks` if given; what may be well again is tried again."""
        for rank in self._faults if ranks is None else self._faults.keys() & ranks:
            error, until, again = self._faults[rank]
            if time.monotonic() < until:
                raise copy.copy(error)  # one that many raise would grow a traceback without end
            if again is not None:
                self._faults[rank] = _Fault(error, until, None)
                again()
