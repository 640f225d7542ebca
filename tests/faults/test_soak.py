"""Row L10, shortened: random reads, evictions and resets all the time; `scripts/soak` makes it hours.

CKPTFS_SOAK_SECONDS is how long (20 unless said otherwise).
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.command import mounted
from tests.support.fake_registry import FakeRegistry, Reset
from tests.support.hanging import BLOB, TAR, Figure
from tests.support.synthetic import synthetic_tar
from tests.support.tools import ROOT, require

pytestmark = pytest.mark.fuse

SECONDS = int(os.environ.get("CKPTFS_SOAK_SECONDS", "20"))
PROCESSES = 4
MIB = 1 << 20


@contextmanager
def resets(registry: FakeRegistry) -> Iterator[list[int]]:
    """Every 10 seconds (2 in CI) each connection that sends blob bytes breaks, for a moment. Counts the blows."""
    blows = [0]
    end = threading.Event()

    def run() -> None:
        while not end.wait(min(10.0, SECONDS / 10)):
            registry.script = {(BLOB, None): Reset(50_000)}
            end.wait(0.3)
            registry.script = {}
            blows[0] += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield blows
    finally:
        end.set()
        thread.join()


def measured(pid: int) -> tuple[float, int]:
    """Resident MiB and open descriptors of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB, len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.row("L10")
@pytest.mark.timeout(SECONDS * 2 + 120)
def test_soak(tmp_path: Path, record_property: Figure) -> None:
    require("fusermount3", "tar")
    expected = tmp_path / "expected"
    reads = compared = 0
    samples: list[tuple[float, float, int]] = []  # (hours, MiB, descriptors)
    with FakeRegistry() as registry, resets(registry) as blows:
        registry.add_image("repo", "latest", [(TAR, synthetic_tar(expected))])
        small = ("--view", "raw", "--memory", "2M", "--cache-size", "6M")
        with mounted(registry.reference("repo:latest"), tmp_path, *small) as mount:
            began = time.monotonic()
            seed = 0
            while time.monotonic() - began < SECONDS:
                command = [sys.executable, "-m", "tests.support.fsx", str(mount.path), str(expected)]
                readers = []
                for _ in range(PROCESSES):
                    seed += 1
                    words = [*command, str(seed), "400"]
                    readers.append(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True))
                said = [reader.communicate()[0] for reader in readers]
                assert [reader.returncode for reader in readers] == [0] * PROCESSES, said
                reads += sum(sum(json.loads(text)["reads"].values()) for text in said)
                compared += sum(json.loads(text)["bytes"] for text in said)
                samples.append(((time.monotonic() - began) / 3600, *measured(mount.pid)))
            status = mount.status()
            assert status["errors"] == []
    settled = samples[len(samples) // 4 :]  # caches fill, threads start
    hours, sizes, descriptors = zip(*settled, strict=True)
    slope = statistics.linear_regression(hours, sizes).slope if SECONDS >= 1800 else 0.0
    growth = sizes[-1] - sizes[0]
    figure = (
        f"{SECONDS} s, {reads} reads, {compared >> 20} MiB, {blows[0]} blows, {status['network']['retries']} retries"
    )
    record_property("figure", f"{figure}; {growth:+.1f} MiB ({slope:+.2f} per hour), {max(descriptors)} descriptors")
    assert blows[0] > 1 and status["network"]["retries"] > 0
    assert slope < 1 and growth < 16
    assert max(descriptors) - min(descriptors) <= 24, "connections and segments come and go, nothing piles up"
