"""Programs to checkpoint: static C programs (tests/data/src) whose memory is known and who say that they run.

Owns compiling, starting, reading what they wrote, and their end. They write "ROLE WHAT NUMBER REALTIME_NS" lines.
Called by criu.py, podman.py, tests and the demo.
"""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.tools import ROOT, run, wait_for

_PR_SET_CHILD_SUBREAPER = 36
SOURCES = ROOT / "tests" / "data" / "src"


def compile_program(name: str, folder: Path) -> Path:
    """`folder`/`name`, a static executable made from tests/data/src/`name`.c."""
    program = folder / name
    if not program.exists():
        run("gcc", "-O2", "-static", "-o", program, SOURCES / f"{name}.c")
    return program


@dataclass(frozen=True, slots=True)
class Line:
    """What a program said: `at` in seconds of the real-time clock."""

    role: str
    what: str
    number: int
    at: float


class Output:
    """The file that a program appends to; criu insists that it has the size it had when dumped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, *, role: str | None = None, what: str | None = None, offset: int = 0) -> list[Line]:
        """Complete lines from byte `offset` on, of one role and kind where given."""
        text = self.path.read_bytes()[offset:] if self.path.exists() else b""
        words = [line.split() for line in text.decode().splitlines(keepends=True) if line.endswith("\n")]
        lines = [Line(one, kind, int(number), int(ns) / 1e9) for one, kind, number, ns in words]
        return [line for line in lines if role in (None, line.role) and what in (None, line.what)]

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def next(self, what: str, *, role: str, patience: float = 20.0) -> Line:
        """Waits for a line that is written after the call."""
        offset = self.size()
        return wait_for(f"{role} {what}", lambda: self.lines(role=role, what=what, offset=offset), patience=patience)[0]


class Workload:
    """A running program. `roles` are its processes, the root first; leaving the block ends them all."""

    def __init__(self, program: Path, folder: Path, roles: tuple[str, ...], *arguments: str) -> None:
        become_subreaper()
        self.roles = roles
        self.output = Output(folder / f"{program.name}.out")
        self._process = subprocess.Popen(
            [program, self.output.path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        for role in self.roles:
            wait_for(f"{role} to tick", lambda role=role: self.output.lines(role=role, what="tick"), patience=60)  # type: ignore[misc]
        return self

    def __exit__(self, *_: object) -> None:
        pids = tree(self.pid)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.reap(pids)

    def hashes(self) -> dict[str, int]:
        """What each role says that its memory hashes to."""
        return ask_hashes(self.output, dict(zip(self.roles, tree(self.pid), strict=True)))

    def reap(self, pids: list[int]) -> None:
        """Takes note that all are killed (by criu, say); until then their numbers are not free for a restore."""
        self._process.wait()
        reap(pids[1:])


def ticker(folder: Path, megabytes: int, **options: int) -> Workload:
    """One process; `options` as in ticker.c: touch, dirty, set."""
    words = [f"{name}={value}" for name, value in options.items()]
    return Workload(compile_program("ticker", folder), folder, ("ticker",), str(megabytes), *words)


def process_tree(folder: Path, megabytes: int) -> Workload:
    """Three processes with copy-on-write, shared and memfd memory, a pipe and a socket pair."""
    return Workload(compile_program("tree", folder), folder, ("parent", "cow", "shared"), str(megabytes))


def ask_hashes(output: Output, pids: dict[str, int]) -> dict[str, int]:
    hashes = {}
    for role, pid in pids.items():
        offset = output.size()
        os.kill(pid, signal.SIGUSR1)
        said = wait_for(
            f"the hash of {role}",
            lambda role=role, offset=offset: output.lines(role=role, what="hash", offset=offset),  # type: ignore[misc]
            patience=60,
        )
        hashes[role] = said[0].number
    return hashes


@functools.cache
def become_subreaper() -> None:
    """Orphans of dumped and restored trees become children of this process, which can then reap them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def tree(pid: int) -> list[int]:
    """The process and its descendants, parents first, as numbered at the moment."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in tree(int(child)))]


def kill_tree(pid: int) -> None:
    """Ends a tree whose root is, or will be, a child of this process, and waits until its numbers are free."""
    pids = tree(pid)
    for each in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    reap(pids)


def reap(pids: list[int]) -> None:
    """Waits for the end of dying processes; an orphan becomes a child of this process only when its parent is gone."""

    def gone(pid: int) -> bool:
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(pid, os.WNOHANG)[0] == pid
        return not Path(f"/proc/{pid}").exists()

    for pid in pids:
        wait_for(f"the end of {pid}", lambda pid=pid: gone(pid))  # type: ignore[misc]


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder on a real disk: criu cannot dump files of overlay mounts, and tmpfs would count as memory."""
    return tempfile.TemporaryDirectory(prefix="ckpt-", dir="/var/tmp")
