"""The machine before a row is measured: nothing cached, and nobody else at work.

Owns the kernel's switch for that and a look at /proc. Called by whatever measures; knows nothing of images.
"""

import os
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def forget_files() -> None:
    """Makes the kernel drop every clean page, entry and inode that it caches. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def wait_until_idle(most_load: float, patience: float) -> float:
    """Waits until less than `most_load` CPUs are busy over two seconds, at most `patience` seconds; the last figure."""
    deadline = time.monotonic() + patience
    while (busy := _busy_cpus(2.0)) > most_load and time.monotonic() < deadline:
        pass
    return busy


def _busy_cpus(seconds: float) -> float:
    def working() -> float:
        """proc_stat(5): all but idle and iowait."""
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return (sum(fields[:8]) - fields[3] - fields[4]) / _TICKS

    before = working()
    time.sleep(seconds)
    return (working() - before) / seconds
