"""How much memory something needs at its peak, as the kernel counts it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Peak:
    """`grown`: bytes of resident memory at the peak, over what there was before."""

    grown: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _status("VmRSS")
    peak = Peak()
    try:
        yield peak
    finally:
        peak.grown = max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)
