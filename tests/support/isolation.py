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


# crun (1.21) refuses to run where cgroup v2 has controllers beside those of v1: those that it has become v1's.
_IN_V2 = {"cpu", "cpuset", "blkio", "memory", "hugetlb", "pids", "rdma", "misc"}
_TAKE = "mkdir -p /sys/fs/cgroup/{0} && mount -t cgroup -o {0} cgroup /sys/fs/cgroup/{0} || exit 1\n"
_GIVE_BACK = "find /sys/fs/cgroup/{0} -mindepth 1 -depth -type d -exec rmdir {{}} ';'\n"


class Isolation:
    """`run` and `path` work inside of the block; `folder` holds what the tools would put to /var/lib/containers.

    hybrid    leave cgroups as they are on this machine, also where version 1 and 2 are both in use.
    """

    def __init__(self, folder: Path, *, hybrid: bool = True) -> None:
        self._folder = folder
        self._taken = [] if hybrid else _unmounted_controllers()
        self._holder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        (self._folder / "tmp").mkdir(parents=True, exist_ok=True)
        script = "".join(_TAKE.format(name) for name in self._taken) + _ENTER
        command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, str(self._folder)]
        self._holder = start(*command, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.__exit__()
            raise RuntimeError("no mount namespace could be made")
        return self

    def __exit__(self, *_: object) -> None:
        if self._holder is not None:
            if self._taken and self._holder.poll() is None:
                self.run("sh", "-c", "".join(_GIVE_BACK.format(name) for name in self._taken))
            self._holder.kill()
            with self._holder:
                pass
            self._holder = None

    def run(self, *command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """A tool inside the namespace, run to its end; raises with its words when it fails."""
        # What an interrupted tool leaves in its temporary folder goes away with ours.
        environment = {**os.environ, "TMPDIR": str(self._folder / "tmp")}
        options = {"env": environment, **options}
        return run(*self.enter, *command, **options)

    @property
    def enter(self) -> tuple[str, ...]:
        """Words to put before a command that is to run inside."""
        return ("nsenter", f"--target={self.pid}", "--mount", "--root", "--wd")

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


def _unmounted_controllers() -> list[str]:
    """Where both versions are in use: those that are mounted nowhere, so that version 2 has or gets them."""
    if not Path("/sys/fs/cgroup/unified").exists():
        return []
    mounted = {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup " in line}
    names = [line.split()[0] for line in Path("/proc/cgroups").read_text().splitlines()[1:] if line.endswith("1")]
    return [name for name in names if name in _IN_V2 and not any(Path(path).name == name for path in mounted)]
