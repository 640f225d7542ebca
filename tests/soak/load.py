"""Readers on mounts while connections are reset and chunks are evicted: no error, no wrong byte, nothing that grows.

Owns the readers' processes and the samples of the daemons; the mounts are the caller's. Used by row L10 and the soak.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.fake_registry import FakeRegistry
from tests.support.tools import ROOT

MIB = 1 << 20


@dataclass(frozen=True)
class Load:
    """`processes` of `threads` readers on each mount, for `seconds`; all connections reset every `reset_every`."""

    processes: int
    threads: int
    seconds: float
    reset_every: float


@dataclass(frozen=True)
class Sample:
    """Of all daemons together."""

    time: float
    rss: int
    descriptors: int
    threads: int


@dataclass
class Outcome:
    reads: int = 0
    bytes: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    resets: int = 0
    samples: list[Sample] = field(default_factory=list)

    def growth(self) -> int:
        """Bytes of RSS that the last quarter of the run has more than the second, at its highest."""
        quarter = len(self.samples) // 4
        return max(s.rss for s in self.samples[-quarter:]) - max(s.rss for s in self.samples[quarter : 2 * quarter])

    def slope(self) -> float:
        """MiB of RSS per hour, over the last three quarters: least squares."""
        points = [(s.time, s.rss / MIB) for s in self.samples[len(self.samples) // 4 :]]
        mean_t = sum(t for t, _ in points) / len(points)
        mean_r = sum(r for _, r in points) / len(points)
        spread = sum((t - mean_t) ** 2 for t, _ in points)
        return 3600 * sum((t - mean_t) * (r - mean_r) for t, r in points) / spread

    def more_descriptors(self) -> int:
        """How many more descriptors were open at most in the second half than in the first."""
        half = len(self.samples) // 2
        return max(s.descriptors for s in self.samples[half:]) - max(s.descriptors for s in self.samples[:half])

    def __str__(self) -> str:
        errors = ", ".join(f"{count} {name}" for name, count in self.errors.items()) or "0 errors"
        return (
            f"{self.reads} reads ({self.bytes / 1e9:.1f} GB), {self.wrong} wrong, {errors}, {self.resets} resets, "
            f"RSS {self.samples[-1].rss / MIB:.0f} MiB {self.growth() / MIB:+.1f}, fds {self.more_descriptors():+d}"
        )


def run_load(registry: FakeRegistry, files: Sequence[Path], pids: Sequence[int], load: Load) -> Outcome:
    """Readers on all of `files`, which hold `readers.content`; `pids` are the daemons that are watched."""
    outcome, done = Outcome(), threading.Event()
    watchers = [
        threading.Thread(target=_watch, args=(pids, outcome, done, min(1.0, load.seconds / 40))),
        threading.Thread(target=_reset, args=(registry, outcome, done, load.reset_every)),
    ]
    command = [sys.executable, "-m", "tests.soak.reader"]
    readers = [
        subprocess.Popen(
            [*command, str(file), str(load.threads), str(load.seconds), str(number)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        for file in files
        for number in range(load.processes)
    ]
    for watcher in watchers:
        watcher.start()
    try:
        for reader in readers:
            out, _ = reader.communicate(timeout=load.seconds + 180)
            found = Counter(json.loads(out))
            outcome.reads += found.pop("reads", 0)
            outcome.bytes += found.pop("bytes", 0)
            outcome.wrong += found.pop("wrong", 0)
            outcome.errors.update(found)
    finally:
        done.set()
        for reader in readers:
            if reader.poll() is None:
                reader.kill()
            reader.wait()
            reader.stdout.close()  # type: ignore[union-attr]
        for watcher in watchers:
            watcher.join()
    return outcome


def _watch(pids: Sequence[int], outcome: Outcome, done: threading.Event, step: float) -> None:
    while not done.wait(step):
        facts = [_process(pid) for pid in pids]
        rss, descriptors, threads = (sum(column) for column in zip(*facts, strict=True))
        outcome.samples.append(Sample(time.monotonic(), rss, descriptors, threads))


def _process(pid: int) -> tuple[int, int, int]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


def _reset(registry: FakeRegistry, outcome: Outcome, done: threading.Event, every: float) -> None:
    while not done.wait(every):
        registry.reset_connections()
        outcome.resets += 1
