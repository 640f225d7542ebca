"""Checkpoints of real containers: podman with runc and criu, exported in each compression and as images.

Owns an isolated podman, a base image made from nothing but a static program, and a container whose file system has
changed. Called by fixtures and tests. Flags and limits: Debian 12's podman 4.3 on a machine without systemd.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.isolation import Isolation
from tests.support.tools import require, wait_for
from tests.support.workload import Line, Output, compile_program

COMPRESSIONS = ("none", "gzip", "zstd")
BASE = "localhost/base:latest"
OUTPUT = "/data/ticker.out"
# Without CAP_SYS_RESOURCE runc cannot raise limits to podman's defaults.
_LIMITS = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=20000:20000")


@dataclass(frozen=True, slots=True)
class PodmanCheckpoint:
    """Successive checkpoints of one container: archives by compression, and an image in podman's own storage."""

    archives: dict[str, Path]
    image: str
    last_tick: dict[str, int]  # of each archive, and of "image": no later than this one


class Podman:
    """podman in an `Isolation`; leaving the block removes its containers."""

    def __init__(self, isolation: Isolation, folder: Path, runtime: str = "runc") -> None:
        self.isolation = isolation
        self._folder = folder
        self._runtime = runtime

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self("rm", "--all", "--force", "--time=0")

    def __call__(self, *words: str | Path) -> str:
        """`podman WORDS…`; returns what it printed."""
        options = ("--cgroup-manager=cgroupfs", "--events-backend=file", "--log-level=error")
        try:
            return self.isolation.run("podman", f"--runtime={self._runtime}", *options, *words).stdout.strip()
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self._criu_errors()}") from None

    def build_base(self) -> None:
        """BASE: a program, and files for the container to change and delete."""
        program = compile_program("ticker", self._folder)
        with tempfile.TemporaryDirectory(dir=self._folder) as temporary:
            root = Path(temporary)
            for name in ("etc/os-release", "data/kept.txt", "data/deleted.txt", "data/deleted-folder/file"):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(f"{name} of the base image\n")
            (root / "ticker").write_bytes(program.read_bytes())
            (root / "ticker").chmod(0o755)
            archive = self._folder / "base.tar"
            self.isolation.run("tar", "--create", "--file", archive, "--directory", root, "--owner=0", "--group=0", ".")
        self("import", archive, BASE)
        archive.unlink()

    def run_ticker(self, name: str, megabytes: int) -> None:
        """Starts container `name`, waits for its first tick, then changes, adds and deletes files of its root."""
        self("run", "--detach", "--network=none", *_LIMITS, f"--name={name}", BASE, "/ticker", OUTPUT, str(megabytes))
        wait_for("the container to tick", lambda: self.ticks(name))
        change_root(self._root(name))

    def ticks(self, name: str) -> list[Line]:
        return Output(self._root(name) / OUTPUT.lstrip("/")).lines(role="ticker", what="tick")

    def checkpoint(self, name: str, folder: Path) -> PodmanCheckpoint:
        """Checkpoints the running container once per compression, and once more into an image; then removes it."""
        archives, last_tick = {}, {}
        for compression in COMPRESSIONS:
            archives[compression] = folder / f"{name}-{compression}.tar"
            export = [f"--export={archives[compression]}", f"--compress={compression}"]
            self("container", "checkpoint", "--leave-running", *export, name)
            last_tick[compression] = self.ticks(name)[-1].number
        image = f"localhost/{name}-checkpoint:latest"
        self("container", "checkpoint", f"--create-image={image}", name)
        last_tick["image"] = self.ticks(name)[-1].number
        self("rm", name)
        return PodmanCheckpoint(archives, image, last_tick)

    def restore(self, name: str, source: Path | str) -> None:
        """Restores container `name` from an exported archive, or from a checkpoint image."""
        if isinstance(source, Path):
            self("container", "restore", f"--import={source}", f"--name={name}")
        else:
            self("container", "restore", f"--name={name}", source)

    def push(self, image: str, reference: str) -> str:
        """Pushes an image as podman does by default (gzip); returns `reference`."""
        self.isolation.forget_blobs()
        self("push", "--quiet", "--tls-verify=false", image, f"docker://{reference}")
        return reference

    def _criu_errors(self) -> str:
        """What criu complained about, which podman only says the place of."""
        logs = self.isolation.path("/var/lib/containers/storage").glob("overlay-containers/*/userdata/*.log")
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if "Error" in line]
        return "\n".join(lines[-10:])

    def _root(self, name: str) -> Path:
        """The container's root file system, as this process can open it."""
        return self.isolation.path(self("mount", name))


def change_root(root: Path) -> None:
    """What a container of BASE changes in its root file system."""
    # podman 4.3 exports a changed file only if the machine itself has a file of that name.
    (root / "etc/os-release").write_text("changed\n")
    (root / "data/added.txt").write_text("added\n")
    (root / "data/deleted.txt").unlink()
    (root / "data/deleted-folder/file").unlink()
    (root / "data/deleted-folder").rmdir()


def require_podman() -> None:
    require("podman", "runc", "conmon", root=True)
