"""A mount namespace in which podman, buildah and skopeo find empty storage and leave nothing on the machine.

Owns the namespace: its /var/lib/containers is a folder of the caller's, its /run and /dev/shm are memory. New mounts of
the machine show up inside (a mounted checkpoint can be restored from), those made inside stay there. Needs root.
Called by images.py and podman.py.
"""

import os
import subprocess
from pathlib import Path
from typing import Any, Self

from tests.support.tools import run, start

_ENTER = (
    'cd / && mkdir -p /var/lib/containers && mount --bind "$0" /var/lib/containers && mount -t tmpfs tmpfs /dev/shm && '
    "mount -t tmpfs tmpfs /run && echo ready && exec sleep infinity"
)


class Isolation:
    """`run` and `path` work inside of the block; `folder` holds what the tools would put to /var/lib/containers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._holder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        (self._folder / "tmp").mkdir(parents=True, exist_ok=True)
        command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", _ENTER, str(self._folder)]
        self._holder = start(*command, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.__exit__()
            raise RuntimeError("no mount namespace could be made")
        return self

    def __exit__(self, *_: object) -> None:
        if self._holder is not None:
            self._holder.kill()
            with self._holder:
                pass
            self._holder = None

    def run(self, *command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """A tool inside the namespace, run to its end; raises with its words when it fails."""
        # What an interrupted tool leaves in its temporary folder goes away with ours.
        environment = {**os.environ, "TMPDIR": str(self._folder / "tmp")}
        options = {"env": environment, **options}
        return run("nsenter", "-t", str(self.pid), "--mount", "--root", "--wd", *command, **options)

    def path(self, inside: str | Path) -> Path:
        """A path of the namespace, as this process can open it."""
        return Path(f"/proc/{self.pid}/root") / str(inside).lstrip("/")

    def forget_blobs(self) -> None:
        """Without this a push reuses a blob of the same contents in another compression."""
        for cache in (self._folder / "cache").glob("blob-info-cache*"):
            cache.unlink()

    @property
    def pid(self) -> int:
        assert self._holder is not None
        return self._holder.pid
