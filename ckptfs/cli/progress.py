"""What a command that takes its time shows on a terminal: bars, or a line that changes. Nothing at all in a pipe.

It appears on stderr once the command has taken a second and goes away at its end. A thread of its own draws it, so
that a command which waits is seen to wait.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

_PATIENCE = 1.0  # seconds of silence before anything is shown
_STEP = 0.1  # seconds between two looks at the amounts


class _Shown:
    """A context manager that draws meanwhile."""

    def __init__(self, *, quiet: bool) -> None:
        self._wanted = not quiet and sys.stderr.isatty()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if self._wanted:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        if not self._over.wait(_PATIENCE):
            self._draw()

    def _draw(self) -> None:
        """Until it is over."""
        raise NotImplementedError


class Bars(_Shown):
    """`amounts` is asked, from another thread: {"sent": (3, 10)} is a bar, 3 of 10 bytes."""

    def __init__(self, amounts: Callable[[], Mapping[str, tuple[int, int]]], *, quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self._amounts = amounts

    def _draw(self) -> None:
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


class Line(_Shown):
    """`text` is asked, from another thread; it can be set until the block begins."""

    def __init__(self, text: Callable[[], str] = str, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self.text = text

    def printing(self) -> None:
        """Something is about to be printed; on the same terminal it would get into the line. From any thread."""
        if sys.stdout.isatty():
            self._end()

    def _draw(self) -> None:
        from rich.console import Console

        with Console(stderr=True).status(self.text()) as status:
            while not self._over.wait(_STEP):
                status.update(self.text())
