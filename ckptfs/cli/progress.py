"""Bars on a terminal for commands that take their time; nothing at all in a pipe.

They appear on stderr once the command has taken a second and go away at its end. A thread of their own draws them, so
that a command which waits is seen to wait. Called by push, pull and index.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

_PATIENCE = 1.0  # seconds of silence before anything is shown
_STEP = 0.1  # seconds between two looks at the amounts


class Bars:
    """A context manager. `amounts` is asked, from another thread: {"sent": (3, 10)} is a bar, 3 of 10 bytes."""

    def __init__(self, amounts: Callable[[], Mapping[str, tuple[int, int]]], *, quiet: bool) -> None:
        self._wanted = not quiet and sys.stderr.isatty()
        self._amounts = amounts
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if self._wanted:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._wanted:
            self._thread.join()

    def _draw(self) -> None:
        if self._over.wait(_PATIENCE):
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        console = Console(stderr=True)
        with Progress(*columns, TimeRemainingColumn(compact=True), console=console, transient=True) as progress:
            bars = {}
            while not self._over.wait(_STEP):
                for name, (done, total) in self._amounts().items():
                    if name not in bars:
                        bars[name] = progress.add_task(name, total=total)
                    progress.update(bars[name], completed=done, total=total)
