"""What may take long and that nobody waits for: done in order by one thread of its own, which ends when it rests.

A disk that is busy with others' writes answers after seconds. Whoever serves reads must not stand in line for it.
Called by write_behind.py (chunks on their way to the disk) and chunk_index.py (notes of what is in use).
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

_REST = 1.0  # seconds without an errand after which the thread ends: starting one costs 0.1 ms, a thread at rest memory


class Errands:
    """A queue and its thread. Where no thread can be had (`pids.max`), `do` does them itself. Any thread may call."""

    def __init__(self, name: str) -> None:
        """`name`: of the thread, as `ps -T` shows it."""
        self._name = name
        self._queue: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._added = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._running = False  # whether there is a thread
        self._doing = False

    def do(self, errand: Callable[[], None]) -> None:
        """Call it soon, after all that were given before it. What it raises is logged."""
        with self._lock:
            self._queue.append(errand)
            if self._running:
                self._added.notify()
                return
            self._running = True
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True, args=(_REST,)).start()
        except RuntimeError:
            self._run(0)

    def flush(self, patience: float = math.inf) -> bool:
        """Wait until all is done, or for `patience` seconds; whether all is done."""
        until = time.monotonic() + patience
        with self._lock:
            while self._queue or self._doing:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._done.wait(min(left, threading.TIMEOUT_MAX))
        return True

    def _run(self, rest: float) -> None:
        while (errand := self._next(rest)) is not None:
            try:
                errand()
            except Exception:
                log.exception("%s: an errand failed", self._name)
            del errand  # or what it holds stays while the thread rests
            with self._lock:
                self._doing = False
                if not self._queue:
                    self._done.notify_all()

    def _next(self, rest: float) -> Callable[[], None] | None:
        """The next one; None when there was none for `rest` seconds."""
        until = time.monotonic() + rest
        with self._lock:
            while not self._queue:
                left = until - time.monotonic()
                if left <= 0:
                    self._running = False
                    return None
                self._added.wait(left)
            self._doing = True
            return self._queue.popleft()
