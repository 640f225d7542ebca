"""The machine that measures: what it is, and what its processes use.

Owns reading /proc and asking git for the commit. Called by whatever measures; knows nothing of images.
"""

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ckptfs import __version__
from ckptfs.bench.results import Stamp
from ckptfs.settings import KiB

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one process, all threads: CPU seconds so far, bytes resident now, the most that ever were."""

    cpu: float
    rss: int
    peak_rss: int


def stamp() -> Stamp:
    """This machine, now."""
    return Stamp(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        version=__version__,
        kernel=platform.release(),
        machine=f"{_processor()}, {os.cpu_count()} CPUs, {_memory() / 2**30:.0f} GiB",
        load=round(os.getloadavg()[0], 2),
    )


def usage(pid: int) -> Usage:
    """proc_pid_stat(5), fields 14 and 15; proc_pid_status(5), VmRSS and VmHWM. FileNotFoundError when it has ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    sizes = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    rss, peak = (int(sizes[name].split()[0]) * KiB for name in ("VmRSS", "VmHWM"))
    return Usage((int(fields[11]) + int(fields[12])) / _TICKS, rss, peak)


def _commit() -> str:
    """Of the checkout that this package is in, with a + where it has changes; "" for an installed package."""
    folder = Path(__file__).parent
    if not (folder.parents[1] / ".git").exists():
        return ""
    git = ["git", "-C", str(folder)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
