"""Which reads came when: a line of JSON for each, for benchmarks, plots and working sets.

    {"t_ms": 412.7, "path": "checkpoint/pages-1.img", "offset": 0, "length": 131072, "hit": false}

`t_ms` counts from the start of the mount command; `length` ends at the end of the file; `hit` means that nobody had to
wait for the network. These are the requests of the kernel, which reads ahead and keeps pages: what it has, it does not
ask for again. Called by the reader; the daemon starts and ends it.
"""

import json
import logging
import os
import time
from pathlib import Path

import trio

from ckptfs.engine.reader import Handle
from ckptfs.errors import UsageError
from ckptfs.model.tree import Tree

log = logging.getLogger(__name__)

_INTERVAL = 1.0  # seconds between two writes


class ReadRecorder:
    """Writes to `file`, which only its owner can read: the order of page reads says what a program does."""

    def __init__(self, file: Path, tree: Tree, started: float) -> None:
        """`started`: monotonic seconds. UsageError when the file cannot be written."""
        self._tree = tree
        self._started = started
        self._paths: dict[int, bytes] = {}
        self._lines: list[str] = []
        try:
            self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"{file} cannot be written: {error.strerror}", hint="name another with --record") from None

    def __call__(self, handle: Handle, offset: int, size: int, hit: bool) -> None:
        """Note a read that is about to be answered or to wait."""
        inode = handle.inode
        if not handle.path:
            handle.path = self._path(inode.ino)
        fact = {
            "t_ms": round((time.monotonic() - self._started) * 1000, 3),
            "path": os.fsdecode(handle.path),
            "offset": offset,
            "length": max(0, min(size, inode.size - offset)),
            "hit": hit,
        }
        self._lines.append(json.dumps(fact) + "\n")

    async def run(self) -> None:
        """Write what has come every second, and the rest when cancelled."""
        try:
            while self._fd >= 0:
                await trio.sleep(_INTERVAL)
                self._flush()
        finally:
            self._flush()
            self._close()

    def _flush(self) -> None:
        text, self._lines = "".join(self._lines).encode(), []
        view = memoryview(text)
        try:
            while view and self._fd >= 0:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            log.error("reads are not recorded any more: %s", error.strerror)
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _path(self, ino: int) -> bytes:
        """The first name of the inode; the map is made when somebody asks, and again when the tree has grown."""
        if ino not in self._paths:
            for node in self._tree.walk():
                if node.inode is not None:
                    self._paths.setdefault(node.inode.ino, node.path)
        return self._paths.get(ino, b"")
