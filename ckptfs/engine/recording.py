"""Which reads came when: a line of JSON for each, for benchmarks, plots and working sets.

    {"t_ms": 412.7, "path": "checkpoint/pages-1.img", "offset": 0, "length": 131072, "hit": false, "wait_ms": 21.3,
     "pid": 4711, "command": "criu"}

`t_ms` counts from the start of the mount command; `length` ends at the end of the file; `hit` means that nobody had to
wait for the network, `wait_ms` how long somebody had to (null if that had not ended when the line was written); `pid`
and `command` are those of the process that opened the file. These are the requests of the kernel, which reads ahead and
keeps pages: what it has, it does not ask for again. Called by the reader; the daemon starts and ends it.
"""

import json
import logging
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import trio

from ckptfs.engine.activity import command_of
from ckptfs.engine.reader import Handle, Wait
from ckptfs.errors import UsageError
from ckptfs.model.names import InodeNames

log = logging.getLogger(__name__)

_INTERVAL = 1.0  # seconds between two writes
_HELD = 50_000  # lines that are kept for one that still waits: 25 MB


class ReadRecorder:
    """Writes to `file`, which only its owner can read: the order of page reads says what a program does."""

    def __init__(self, file: Path, names: InodeNames, started: float) -> None:
        """`started`: monotonic seconds. UsageError when the file cannot be written."""
        self._names = names
        self._started = started
        self._facts: deque[tuple[dict[str, Any], Wait | None]] = deque()
        try:
            self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"{file} cannot be written: {error.strerror}", hint="name another with --record") from None

    def __call__(self, handle: Handle, offset: int, size: int, wait: Wait | None) -> None:
        """Note a read that is about to be answered or to wait."""
        if self._fd < 0:  # it cannot be written any more: nobody would take it away
            return
        inode = handle.inode
        handle.path = handle.path or self._names.path(inode.ino)
        handle.command = handle.command or command_of(handle.pid)
        fact = {
            "t_ms": round((time.monotonic() - self._started) * 1000, 3),
            "path": os.fsdecode(handle.path),
            "offset": offset,
            "length": max(0, min(size, inode.size - offset)),
            "hit": wait is None,
            "wait_ms": 0.0,
            "pid": handle.pid,
            "command": handle.command,
        }
        self._facts.append((fact, wait))

    async def run(self) -> None:
        """Write what has come every second, and the rest when cancelled."""
        try:
            while self._fd >= 0:
                await trio.sleep(_INTERVAL)
                self._flush(held=_HELD)
        finally:
            self._flush(held=0)
            self._close()

    def _flush(self, held: int) -> None:
        """Write lines in order, up to the first that still waits, but keep no more than `held`."""
        lines = []
        while self._facts:
            fact, wait = self._facts[0]
            if wait is not None:
                if wait.ended is None and len(self._facts) <= held:
                    break
                fact["wait_ms"] = round((wait.ended - wait.began) * 1000, 3) if wait.ended is not None else None
            lines.append(json.dumps(fact) + "\n")
            self._facts.popleft()
        view = memoryview("".join(lines).encode())
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
