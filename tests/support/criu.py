"""Real checkpoints and restores with criu, as its users do them.

Owns dumping a workload, restoring it from any directory (a local one or a mount), plain or with lazy pages, measuring
the first tick, and leaving no process behind. Called by fixtures, tests and the demo.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from tests.support.tools import end, run, start, unavailable, wait_for
from tests.support.workload import Line, Output, Workload, ask_hashes, become_subreaper, kill_tree, tree

_LAZY_TIMEOUT = 300  # seconds; the daemon of a failed restore waits for ever. 4 GB over 200 Mbit/s take 117


@cache
def why_criu_does_not_work() -> str:
    if os.geteuid() != 0:
        return "criu needs root"
    if (criu := shutil.which("criu")) is None:
        return "needs criu"
    check = subprocess.run([criu, "check"], capture_output=True, text=True, check=False)
    return "" if check.returncode == 0 else f"criu does not work here: {check.stderr.strip().splitlines()[-1:]}"


def require_criu() -> None:
    if why_not := why_criu_does_not_work():
        unavailable(why_not)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A dumped tree: CRIU's images, and what a restore needs to find outside of them."""

    images: Path
    pids: dict[str, int]  # by role, the root first
    output: Output
    output_bytes: bytes  # when dumped
    hashes: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes of all image files."""
        return sum(path.stat().st_size for path in self.images.iterdir())

    def last_tick(self, role: str) -> int:
        lines = [line.split() for line in self.output_bytes.decode().splitlines()]
        return max(int(line[2]) for line in lines if line[:2] == [role, "tick"])

    def put_back(self) -> None:
        """Makes the output file what it was, so that the next restore finds the size it expects."""
        self.output.path.write_bytes(self.output_bytes)


def dump(workload: Workload, images: Path, *, keep_running: bool = False) -> Checkpoint:
    """Checkpoints a running workload into the new directory `images`; it is gone afterwards unless kept."""
    hashes = workload.hashes()
    pids = tree(workload.pid)
    images.mkdir(mode=0o700)
    stay = ["--leave-stopped"] if keep_running else []  # until its output has been read
    run("criu", "dump", "-t", str(workload.pid), "-D", images, "-o", "dump.log", "-v3", *stay)
    text = workload.output.path.read_bytes()
    if keep_running:
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)
    else:
        workload.reap(pids)
    return Checkpoint(images, dict(zip(workload.roles, pids, strict=True)), workload.output, text, hashes)


class RestoredProcess:
    """A tree that runs again. Times are seconds of the real-time clock; leaving the block ends everything."""

    def __init__(self, checkpoint: Checkpoint, images: Path, work: Path, *, lazy: bool) -> None:
        self.checkpoint = checkpoint
        self.output = checkpoint.output
        self.started_at = time.time()
        self._work = work
        self._lazy_daemon: subprocess.Popen[bytes] | None = None
        self._root = next(iter(checkpoint.pids.values()))
        self._images = images
        self._lazy = lazy
        self._running = False

    def __enter__(self) -> Self:
        become_subreaper()
        self.checkpoint.put_back()
        self._work.mkdir(exist_ok=True)
        self.started_at = time.time()
        try:
            if self._lazy:
                self._start_lazy_daemon()
            # Another process may have one of the tree's numbers for a moment.
            for patience in (0.05, 0.2, 1.0, 3.0, None):
                failure = self._restore()
                if failure is None:
                    break
                if patience is None or "File exists" not in failure:
                    raise RuntimeError(f"criu restore failed:\n{failure}")
                time.sleep(patience)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:  # else the number may be someone else's
            kill_tree(self._root)
            self._running = False
        if self._lazy_daemon is not None:
            end(self._lazy_daemon)

    def first_tick(self, role: str | None = None, *, patience: float = 60.0) -> Line:
        """The first line of the restored root process (or of `role`), waited for in steps of a millisecond."""
        role = role or next(iter(self.checkpoint.pids))
        offset = len(self.checkpoint.output_bytes)
        wait_for("output", lambda: self.output.size() > offset, patience=patience, step=0.001)
        return wait_for(
            f"the first tick of {role}",
            lambda: self.output.lines(role=role, what="tick", offset=offset),
            patience=patience,
            step=0.001,
        )[0]

    def wait_resident(self, *, patience: float = _LAZY_TIMEOUT) -> float:
        """Waits until the lazy-pages daemon has handed out every page; returns when that was."""
        if self._lazy_daemon is not None and self._lazy_daemon.wait(patience) != 0:
            raise RuntimeError(f"criu lazy-pages failed:\n{self._log('lazy-pages.log')}")
        return time.time()

    def bytes_read_by_lazy_daemon(self) -> int:
        """By read(2) and its like, its program's libraries included (proc_pid_io(5), rchar)."""
        if self._lazy_daemon is None:
            return 0
        criu = tree(self._lazy_daemon.pid)[-1]  # below timeout(1)
        return int(Path(f"/proc/{criu}/io").read_text().split()[1])

    def hashes(self) -> dict[str, int]:
        return ask_hashes(self.output, self.checkpoint.pids)

    def assert_continues(self) -> None:
        """Every role went on with the number after its last one, missed none, and has the memory it had."""
        for role in self.checkpoint.pids:
            self.first_tick(role)
        assert self.hashes() == self.checkpoint.hashes
        for role in self.checkpoint.pids:
            offset = len(self.checkpoint.output_bytes)
            numbers = [line.number for line in self.output.lines(role=role, what="tick", offset=offset)]
            first = self.checkpoint.last_tick(role) + 1
            assert numbers == list(range(first, first + len(numbers)))

    def _start_lazy_daemon(self) -> None:
        (self._work / "lazy-pages.socket").unlink(missing_ok=True)
        ready, tell = os.pipe()
        command = ["timeout", str(_LAZY_TIMEOUT), "criu", "lazy-pages", "-D", str(self._images)]
        command += ["-W", str(self._work), "-o", "lazy-pages.log", "-v2", "--status-fd", str(tell)]
        self._lazy_daemon = start(*command, stderr=subprocess.DEVNULL, pass_fds=[tell])
        os.close(tell)
        with os.fdopen(ready, "rb") as status:
            if status.read(1) != b"\0":  # it is written once the socket takes connections
                raise RuntimeError(f"criu lazy-pages ended:\n{self._log('lazy-pages.log')}")

    def _restore(self) -> str | None:
        """None, or what criu said."""
        command = ["criu", "restore", "-d", "-D", str(self._images), "-W", str(self._work), "-o", "restore.log", "-v2"]
        command += ["--lazy-pages"] if self._lazy else []
        # A pipe would stay open as long as the restored tree lives: everything goes to the log.
        nothing = subprocess.DEVNULL
        done = subprocess.run(command, stdin=nothing, stdout=nothing, stderr=nothing, check=False, timeout=180)
        self._running = done.returncode == 0
        return None if done.returncode == 0 else self._log("restore.log")

    def _log(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return "\n".join((self._work / name).read_text(errors="replace").splitlines()[-30:])
        return f"no {name}"


def restore(checkpoint: Checkpoint, work: Path, *, images: Path | None = None, lazy: bool = False) -> RestoredProcess:
    """Restores from `images` (the checkpoint's own directory unless given), logs and sockets going to `work`."""
    return RestoredProcess(checkpoint, images or checkpoint.images, work, lazy=lazy)
