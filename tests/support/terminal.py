"""A command on a real pseudo-terminal: what it shows, keys for it, and how it leaves the terminal behind."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>78]")
_HOME = "\x1b[H"  # every picture begins in the upper left corner
CKPTFS = (sys.executable, "-m", "ckptfs")
ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h", "\x1b[?1049l"


class Terminal:
    """Made by `on_terminal`."""

    def __init__(self, process: "subprocess.Popen[bytes]", master: int, slave: int, before: list[Any]) -> None:
        self.process = process
        self.raw = ""
        self._master = master
        self._slave = slave
        self._before = before

    def _receive(self, seconds: float) -> None:
        if select.select([self._master], [], [], seconds)[0]:
            self.raw += os.read(self._master, 1 << 16).decode("utf-8", "replace")

    def picture(self) -> str:
        """The last complete one, without escapes."""
        pictures = self.raw.split(_HOME)
        return _ESCAPES.sub("", pictures[-2] if len(pictures) > 2 else pictures[-1])

    def wait_for(self, what: Callable[[str], bool], patience: float = 15) -> str:
        """The first picture of which `what` is true."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            self._receive(0.1)
            if what(self.picture()):
                return self.picture()
        raise AssertionError(f"never seen; the last picture:\n{self.picture()}")

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def end(self, patience: float = 10) -> int:
        """The exit code; everything that was shown by then is in `raw`."""
        until = time.monotonic() + patience
        while self.process.poll() is None and time.monotonic() < until:
            self._receive(0.05)
        code = self.process.wait(0.1)
        while select.select([self._master], [], [], 0.1)[0]:
            self._receive(0)
        return code

    @property
    def last_words(self) -> str:
        """What stays in the terminal when the screen of pictures is gone."""
        return _ESCAPES.sub("", self.raw.rpartition(LEAVE_SCREEN)[2])

    @property
    def in_order(self) -> bool:
        """Echo, line editing and so on are as they were, the screen and the cursor are back."""
        shown = self.raw.rfind("\x1b[?25h") >= self.raw.rfind("\x1b[?25l")
        back = self.raw.count(ENTER_SCREEN) == self.raw.count(LEAVE_SCREEN)
        return termios.tcgetattr(self._slave) == self._before and shown and back


@contextlib.contextmanager
def on_terminal(
    *arguments: object, program: Sequence[str] = CKPTFS, columns: int = 110, rows: int = 40
) -> Iterator[Terminal]:
    """A program with these arguments and a terminal of its own, which is also the one that Ctrl-C goes to."""
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        before = termios.tcgetattr(slave)
        command = [*program, *map(str, arguments)]
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
        with subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command], stdin=slave, stdout=slave, stderr=slave, env=environment
        ) as process:
            try:
                yield Terminal(process, master, slave, before)
            finally:
                if process.poll() is None:
                    process.kill()
    finally:
        os.close(master)
        os.close(slave)
