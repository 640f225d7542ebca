"""Whether a process is still there, and waiting until it is not. Called by daemon/ and restore/."""

import os
import time
from pathlib import Path


def alive(pid: object) -> bool:
    """Whether there is a process of that number that is not a zombie (proc_pid_stat(5), field 3)."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def wait_gone(pid: int, seconds: float) -> bool:
    """Whether the process ends within `seconds`; reaps it if it is our child.

    Ours has ended when it can be reaped: a zombie may have threads yet, which hold its files and their locks.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return True
        except ChildProcessError:
            if not alive(pid):
                return True
        time.sleep(0.005)
    return False
