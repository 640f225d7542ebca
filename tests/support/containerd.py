"""A containerd of our own: state in a folder of the caller's, no service, nobody else's containers.

Owns the daemon, in the `Isolation` of a podman, and a container whose file system has changed. Called by tests of
restores by containerd. Flags and limits: Debian 12's containerd 1.6.
"""

import subprocess
from pathlib import Path
from typing import Self

from tests.support.podman import BASE, OUTPUT, Podman, change_root
from tests.support.tools import end, require, start, wait_for
from tests.support.workload import Line, Output


class Containerd:
    """`address` is its socket. Has podman's BASE; leaving the block removes its containers."""

    def __init__(self, podman: Podman, folder: Path) -> None:
        self.isolation = podman.isolation
        self.address = folder / "containerd.sock"
        self._podman = podman
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        folder = self._folder
        (folder / "config.toml").write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
        command = ["containerd", "--config", folder / "config.toml", "--root", folder / "root", "--log-level", "warn"]
        command += ["--state", folder / "state", "--address", self.address]
        with (folder / "log").open("ab") as log:
            self._process = start(*self.isolation.enter, *command, stdout=log, stderr=log)
        try:
            wait_for("containerd", self._answers)
            archive = folder / "base.tar"
            self._podman("save", "--quiet", "--format=oci-archive", f"--output={archive}", BASE)
            self("images", "import", archive)
        except BaseException:
            end(self._process)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self("tasks", "list", "-q").split():
            self.remove(name)
        for name in self("containers", "list", "-q").split():
            self("containers", "rm", name)
        assert self._process is not None
        end(self._process)

    def __call__(self, *words: str | Path) -> str:
        """`ctr WORDS…`; returns what it printed."""
        return self.isolation.run("ctr", "--address", self.address, *words).stdout

    def run_ticker(self, name: str, megabytes: int) -> None:
        """Starts container `name`, waits for its first tick, then changes, adds and deletes files of its root."""
        self("run", "--detach", "--null-io", BASE, name, "/ticker", OUTPUT, str(megabytes))
        wait_for("the container to tick", lambda: self.ticks(name))
        change_root(self.root(name))

    def run_talker(self, name: str, log: Path) -> None:
        """The same, but it ticks on its standard output, which goes into `log`."""
        self("run", "--detach", "--log-uri", f"file://{log}", BASE, name, "/ticker", "/proc/self/fd/1", "4")
        wait_for("the container to tick", lambda: log.exists() and "tick 1 " in log.read_text())

    def checkpoint(self, name: str, archive: Path) -> None:
        """Everything of the container as containerd exports it; it is gone."""
        self("containers", "checkpoint", "--rw", "--task", name, f"localhost/{name}:checkpoint")
        self("images", "export", "--skip-manifest-json", archive, f"localhost/{name}:checkpoint")
        self.remove(name)

    def remove(self, name: str) -> None:
        if "PAUSED" in self("tasks", "list"):  # a checkpoint that failed
            self("tasks", "resume", name)
        if "RUNNING" in self("tasks", "list"):
            self("tasks", "kill", "--signal", "KILL", name)
        wait_for("the end of the task", lambda: "RUNNING" not in self("tasks", "list"))
        self("tasks", "rm", name)
        self("containers", "rm", name)

    def ticks(self, name: str) -> list[Line]:
        return Output(self.root(name) / OUTPUT.lstrip("/")).lines(role="ticker", what="tick")

    def root(self, name: str) -> Path:
        """The running container's root file system, as this process can open it."""
        return Path(f"/proc/{self.pid(name)}/root")

    def pid(self, name: str) -> int:
        tasks = [line.split() for line in self("tasks", "list").splitlines()[1:]]
        (found,) = (int(pid) for task, pid, *_ in tasks if task == name)
        return found

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError("containerd ended: " + (self._folder / "log").read_text()[-2000:])
        try:
            return bool(self("version"))
        except RuntimeError:
            return False


def require_containerd() -> None:
    require("containerd", "containerd-shim-runc-v2", "ctr", "runc", root=True)
