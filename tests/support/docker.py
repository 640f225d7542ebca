"""A dockerd of our own: state in a folder of the caller's, no network, nobody else's containers.

Owns the daemon, with the containerd that it starts, in an `Isolation`. Called by tests of Docker's checkpoints. Flags
and limits: Debian 12's docker 20.10, whose checkpoints are an experiment of its.
"""

import subprocess
from pathlib import Path
from typing import Self

from tests.support.isolation import Isolation
from tests.support.tools import end, require, start, wait_for
from tests.support.workload import compile_program

IMAGE = "ticker:1"


class Docker:
    """Has IMAGE; leaving the block removes the containers and ends the daemon."""

    def __init__(self, isolation: Isolation, folder: Path) -> None:
        self.isolation = isolation
        self._folder = folder
        self._socket = folder / "docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        folder = self._folder
        command = ["dockerd", "--experimental", "--host", f"unix://{self._socket}", "--pidfile", folder / "pid"]
        command += ["--data-root", folder / "root", "--exec-root", folder / "exec", "--storage-driver", "vfs"]
        command += ["--bridge", "none", "--iptables=false", "--ip6tables=false", "--log-level", "warn"]
        with (folder / "log").open("ab") as log:
            self._process = start(*self.isolation.enter, *command, stdout=log, stderr=log)
        try:
            wait_for("dockerd", self._answers, patience=30)
            (folder / "files").mkdir()
            compile_program("ticker", folder / "files")
            self.isolation.run("tar", "--create", "--file", folder / "files.tar", "--directory", folder / "files", ".")
            self("import", folder / "files.tar", IMAGE)
        except BaseException:
            end(self._process, patience=20)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        try:
            for name in self("ps", "--all", "--quiet").split():
                self("rm", "--force", name)
        finally:
            end(self._process, patience=20)

    def __call__(self, *words: str | Path) -> str:
        """`docker WORDS…`; returns what it printed."""
        return self.isolation.run("docker", "--host", f"unix://{self._socket}", *words).stdout.strip()

    def run_ticker(self, name: str, megabytes: int) -> None:
        """Starts container `name`, waits for its first tick."""
        options = ("--detach", "--network", "none", "--security-opt", "seccomp=unconfined", "--name", name)
        self("run", *options, IMAGE, "/ticker", "/proc/self/fd/1", str(megabytes))
        wait_for("the container to tick", lambda: self.ticks(name))

    def ticks(self, name: str) -> list[int]:
        """The numbers of the ticks so far, of all its lives."""
        lines = [line.split() for line in self("logs", name).splitlines()]
        return [int(words[words.index("tick") + 1]) for words in lines if "tick" in words]

    def checkpoints(self, name: str) -> Path:
        """Where dockerd looks for the container's checkpoints, each in a directory with its name."""
        return self._folder / "root" / "containers" / self("inspect", "--format", "{{.Id}}", name) / "checkpoints"

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError("dockerd ended: " + (self._folder / "log").read_text()[-2000:])
        try:
            return bool(self("version"))
        except RuntimeError:
            return False


def require_docker() -> None:
    require("dockerd", "docker", "containerd", "runc", root=True)
