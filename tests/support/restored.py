"""`ckptfs restore` as a user runs it: in the foreground, told of by events, and nothing left when it has ended.

Owns starting it, ending the container, and the search for remains: mounts, processes, directories, sockets, cgroups.
Called by tests/restore.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptfs.control.client import MountFiles
from ckptfs.errors import RestoreError
from ckptfs.restore.workplace import named
from tests.support.podman import OUTPUT
from tests.support.tools import ROOT, wait_for
from tests.support.workload import Line, Output


@dataclass
class Restored:
    """A container that runs again. `first` is the event that said so; `events` has all once the block is left."""

    process: "subprocess.Popen[str]"
    first: dict[str, Any]
    folder: Path
    started_at: float  # by the real-time clock
    events: list[dict[str, Any]] = field(default_factory=list)
    code: int | None = None
    err: str = ""

    @property
    def pid(self) -> int:
        return int(self.first["pid"])

    @property
    def root(self) -> Path:
        """The container's root file system, as it sees it."""
        return Path(f"/proc/{self.pid}/root")

    def ticks(self) -> list[Line]:
        return Output(self.root / OUTPUT.lstrip("/")).lines(role="ticker", what="tick")

    def assert_continues(self, after: int) -> None:
        """It counts on from where it was dumped, no later than `after`, and misses no number."""
        new = wait_for(
            "another tick", lambda: [tick.number for tick in self.ticks() if tick.at > self.started_at], patience=30
        )
        assert 0 < new[0] <= after + 1
        assert new == list(range(new[0], new[0] + len(new)))

    def assert_delta(self) -> None:
        assert_delta(self.root)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def assert_delta(root: Path) -> None:
    """What a container of podman.py had changed in its root is there: new, changed, deleted."""
    assert (root / "data/added.txt").read_text() == "added\n"
    assert (root / "etc/os-release").read_text() == "changed\n"
    assert (root / "data/kept.txt").read_text() == "data/kept.txt of the base image\n"
    assert not (root / "data/deleted.txt").exists()
    assert not (root / "data/deleted-folder").exists()


def start(
    folder: Path, *arguments: object, extra: tuple[str, ...] = (), prefix: tuple[str, ...] = ()
) -> "subprocess.Popen[str]":
    """`ckptfs restore ARGUMENTS --json -- EXTRA` at work in folder/place, with a cache in folder/cache."""
    words = ["restore", *arguments, "--json", "--dir", folder / "place", "--cache-dir", folder / "cache", "--", *extra]
    command = [*prefix, sys.executable, "-m", "ckptfs", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=pipe, text=True, env=environment)


@contextmanager
def restored(folder: Path, *arguments: object, prefix: tuple[str, ...] = ()) -> Iterator[Restored]:
    """Inside of the block the container runs; afterwards it is dead, the command has ended and nothing is left."""
    started_at = time.time()
    process = start(folder, *arguments, prefix=prefix)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        _, err = process.communicate(timeout=60)
        raise AssertionError(err)
    container = Restored(process, json.loads(line), folder, started_at)
    try:
        yield container
    finally:
        container.kill()
        out, container.err = process.communicate(timeout=60)
        container.events = [container.first, *map(json.loads, out.splitlines())]
        container.code = process.returncode
    assert_nothing_left(folder)


def assert_nothing_left(folder: Path) -> None:
    """No mount, process, directory, socket or cgroup of a restore in `folder`."""
    with contextlib.suppress(TimeoutError):
        wait_for("the end of all processes", lambda: not processes(folder), patience=30)
    left = processes(folder)
    assert not left, left
    place = folder / "place"
    assert not place.exists(), sorted(str(path.relative_to(place)) for path in place.rglob("*"))[:20]
    assert [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line] == []
    for name in ("image", "base"):
        files = MountFiles.of(str(place / name))
        assert [p for p in (files.socket, files.state, files.lock, files.log) if p.exists()] == []
    assert [group for group in Path("/sys/fs/cgroup").glob("*/ckptfs-*") if _abandoned(group)] == []


def _abandoned(group: Path) -> bool:
    """Whether a cgroup belongs to no restore that is still at work: other tests may run beside this one."""
    try:
        with named(group.name.removeprefix("ckptfs-")):
            return group.exists()
    except RestoreError:
        return False


def processes(folder: Path) -> list[str]:
    """Command lines of processes that were started with something in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = f"{path.parent.name}: " + path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [words] if str(folder) in words else []
    return found
