"""A clock that moves only when somebody sleeps (sources.retry.Clock): waits take no time and can be asserted on."""

import threading
from dataclasses import dataclass, field


@dataclass
class ManualClock:
    """`slept` are all waits so far. `dice` is what random() gives; 0.5 makes back-off exact."""

    time: float = 1000.0
    dice: float = 0.5
    slept: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.slept.append(seconds)
            self.time += seconds

    def random(self) -> float:
        return self.dice
