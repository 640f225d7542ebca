"""The right to a name on this node, while a process lives: a file in the runtime directory that it holds locked.

Its holder removes the file, or the next `mount` or `status` if that was killed (daemon/claim.py). So whoever gets a
lock makes sure that its file is still the one that everybody else would find. Called by daemon/claim.py for mount
points and by restore/ for names of containers.
"""

import fcntl
import os
import time
from pathlib import Path

_PATIENCE, _STEP = 0.1, 0.01  # seconds: who removes what a dead holder has left holds the lock for less than a step


class FileLock:
    """The flock of one file. Forked processes hold it too, as long as they keep the descriptor."""

    def __init__(self, file: Path, fd: int = -1) -> None:
        """`fd`: the lock that another process holds for us."""
        self.file = file
        self.fd = fd

    def acquire(self) -> bool:
        """Take it, and make sure that it counts; False when another has it."""
        until = time.monotonic() + _PATIENCE
        while True:
            self.open()
            try:
                if self.take() and self.current():
                    return True
            except BaseException:
                self.close()
                raise
            self.close()  # another's, or its last holder has removed the file in between
            if time.monotonic() > until:
                return False
            time.sleep(_STEP)

    def open(self) -> None:
        """The file, which may be another's lock."""
        self.fd = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def close(self) -> None:
        os.close(self.fd)

    def take(self) -> bool:
        """Whether it is ours now."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def current(self) -> bool:
        """Whether this is still the file that whoever comes next takes."""
        try:
            found = os.stat(self.file)
        except FileNotFoundError:
            return False
        return found.st_ino == os.fstat(self.fd).st_ino

    def release(self) -> None:
        """By its holder: nothing stays behind. Whoever waits for the lock sees that the file is another."""
        self.file.unlink(missing_ok=True)
        self.close()
