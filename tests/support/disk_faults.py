"""Disks and clocks that misbehave on request."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from ckptfs.engine.disk import DiskOps

_CALLS = [name for name in vars(DiskOps) if not name.startswith("_")]


class FaultyDisk(DiskOps):
    """Every call asks `verdict(name)` first; an errno makes it fail. A failing close closes, as Linux does."""

    def __init__(self, verdict: Callable[[str], int | None]) -> None:
        for name in _CALLS:
            setattr(self, name, self._guarded(name, getattr(DiskOps, name), verdict))

    @staticmethod
    def _guarded(name: str, call: Callable[..., Any], verdict: Callable[[str], int | None]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            code = verdict(name)
            if code is None:
                return call(*args, **kwargs)
            if name == "close":
                call(*args)
            raise OSError(code, os.strerror(code))

        return guarded


class FailAt(FaultyDisk):
    """The n-th system call (from 1) fails with `code`, no other. `tripped`: there were as many."""

    def __init__(self, n: int, code: int) -> None:
        self.n, self.code, self.count = n, code, 0
        self._lock = threading.Lock()
        super().__init__(self._judge)

    @property
    def tripped(self) -> bool:
        return self.count >= self.n

    def _judge(self, name: str) -> int | None:
        with self._lock:
            self.count += 1
            return self.code if self.count == self.n else None


class DiesAt(FaultyDisk):
    """The n-th system call (from 1) ends this process, as SIGKILL does; a write is cut off in the middle."""

    def __init__(self, n: int) -> None:
        self.n, self.count = n, 0
        super().__init__(self._judge)
        whole = self.pwritev

        def half(fd: int, buffers: list[memoryview], offset: int) -> int:
            if self.count + 1 == self.n:
                data = b"".join(buffers)
                DiskOps.pwritev(fd, [data[: len(data) // 2]], offset)
            return whole(fd, buffers, offset)

        self.pwritev = half  # type: ignore[misc]

    def _judge(self, name: str) -> None:
        self.count += 1
        if self.count == self.n:
            os.kill(os.getpid(), signal.SIGKILL)


class Refusing(FaultyDisk):
    """While `code` is set, every call in `names` fails with it. Writes fail after half of the bytes."""

    def __init__(self, *names: str) -> None:
        self.code: int | None = None
        self.names = names
        super().__init__(lambda name: self.code if name in self.names else None)
        whole = self.pwritev

        def half(fd: int, buffers: list[memoryview], offset: int) -> int:
            if self.code is not None and "pwritev" in self.names:
                piece = bytes(buffers[0][: len(buffers[0]) // 2])
                DiskOps.pwritev(fd, [piece], offset)
            return whole(fd, buffers, offset)

        self.pwritev = half  # type: ignore[misc]


class Stuck(FaultyDisk):
    """The call `name` hangs from `stick` on until `free`, as on a disk that is busy for others; `calls` were made."""

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, 0
        self._go, self._reached = threading.Event(), threading.Event()
        self._go.set()
        super().__init__(self._judge)

    def stick(self) -> None:
        self._go.clear()

    def free(self) -> None:
        self._go.set()

    def reached(self) -> None:
        """Wait until a call hangs."""
        assert self._reached.wait(5)

    def _judge(self, name: str) -> None:
        if name == self.name:
            if not self._go.is_set():
                self._reached.set()
                self._go.wait()
            self.calls += 1


class FakeClock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
