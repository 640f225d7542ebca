"""What is being read right now: which file, where, by which process, and how long it has waited.

Looks when somebody asks; nothing is gathered meanwhile. Called by the daemons for `ckptfs status --watch`, and by the
recorder.
"""

import os
from collections.abc import Iterable
from typing import Any

from ckptfs.engine.reader import Handle, Wait
from ckptfs.model.names import InodeNames

_MOST = 32  # reads that are told of; thousands may wait
_NOW = 2.0  # seconds for which a file counts as being read after its last read
_COMMAND = 64  # bytes; the kernel's are at most 16 (TASK_COMM_LEN), those of its own threads longer


def command_of(pid: int) -> str:
    """The name of a process; "" where that cannot be seen. Reads nothing of the process' own memory: never hangs."""
    if not pid:
        return ""
    try:
        with open(f"/proc/{pid}/comm", "rb", buffering=0) as file:
            return file.read(_COMMAND).rstrip(b"\n").decode("utf-8", "replace")
    except OSError:
        return ""


def reads_now(waits: Iterable[Wait], handles: Iterable[Handle], names: InodeNames, now: float) -> list[dict[str, Any]]:
    """Reads that wait, the longest first, then the files that are read without waiting, the latest first.

    `wait_ms` is null for the latter; `pid` and `command` are those of the process that opened the file, 0 and "" where
    that is not known.
    """
    waiting = sorted(waits, key=lambda wait: wait.began)[:_MOST]
    found = [_fact(w.handle, w.offset, w.size, names, round((now - w.began) * 1000, 1)) for w in waiting]
    busy = {wait.handle for wait in waiting}
    recent = [handle for handle in handles if now - handle.at < _NOW and handle not in busy]
    recent.sort(key=lambda handle: -handle.at)
    return found + [_fact(handle, *handle.last, names, None) for handle in recent[: _MOST - len(found)]]


def _fact(handle: Handle, offset: int, size: int, names: InodeNames, wait_ms: float | None) -> dict[str, Any]:
    handle.path = handle.path or names.path(handle.inode.ino)
    handle.command = handle.command or command_of(handle.pid)
    return {
        "path": os.fsdecode(handle.path),
        "offset": offset,
        "length": max(0, min(size, handle.inode.size - offset)),
        "wait_ms": wait_ms,
        "pid": handle.pid,
        "command": handle.command,
    }
