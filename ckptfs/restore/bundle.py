"""The bundle that a runtime restores from: spec.dump with what another machine must change in it.

Changed are: the root, the cgroup, bind mounts whose sources were on the machine that dumped, namespaces that belonged
to a pod or to an engine's network. Taken out are hooks and criu's configuration file: both would run or read things of
this machine because an image says so. Owns config.json and what it points to. Called by container.py.
"""

import errno
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptfs.errors import FormatError, RestoreError, UsageError, outage
from ckptfs.restore.runtimes import cgroup
from ckptfs.restore.workplace import Workplace, mount
from ckptfs.settings import MiB

CRIU_CONFIG = "org.criu.config"  # annotation that makes runtimes hand a configuration file to criu
_NO_ID = 2**32 - 1  # chown(2) takes it for "leave as it is"
_SHM_BYTES = 64 * MiB  # the default of podman, CRI-O and containerd

# Files that engines make for every container: destination -> what a stand-in says.
_STAND_INS = {
    "/etc/hosts": "127.0.0.1 localhost {host}\n::1 localhost\n",
    "/etc/hostname": "{host}\n",
    "/etc/resolv.conf": None,  # this machine's
    "/run/.containerenv": "",
    "/dev/termination-log": "",
}


class Bundle:
    """config.json in the making. `image` is the checkpoint view, mounted or unpacked; `spec` is changed.

    binds       destination in the container -> what of this machine is mounted there.
    network     a network namespace (a path) instead of a new one; "" for none.
    """

    def __init__(
        self,
        place: Workplace,
        image: Path,
        spec: dict[str, Any],
        config: Mapping[str, Any],
        binds: Mapping[str, str],
        network: str,
    ) -> None:
        self.spec = spec
        self._place = place
        self._image = image
        self._config = config
        self._binds = binds
        self._join = network
        self._used: set[str] = set()

    def write(self, root: Path, name: str) -> None:
        """RestoreError when the container needs something of the machine that this one lacks."""
        spec = self.spec
        spec["root"] = {**_mapping(spec.get("root")), "path": str(root)}
        spec.pop("hooks", None)
        _mapping(spec.get("annotations")).pop(CRIU_CONFIG, None)
        linux = _mapping(spec.get("linux"))
        linux["cgroupsPath"] = cgroup(name)
        self._fix_mounts()
        self._fix_namespaces(linux)
        if (group := _root_group(linux)) is not None:
            self._place.admit(group)
        (self._place / "bundle" / "config.json").write_text(json.dumps(spec))

    @property
    def terminal(self) -> bool:
        return bool(_mapping(self.spec.get("process")).get("terminal"))

    def annotate(self, key: str, value: str) -> None:
        self.spec["annotations"] = {**_mapping(self.spec.get("annotations")), key: value}

    def _fix_mounts(self) -> None:
        missing = []
        for one in _objects(self.spec.get("mounts"), "spec.dump: mounts"):
            if not _binds(one):
                continue
            destination, source = str(one.get("destination", "")), str(one.get("source", ""))
            found = self._source(destination, source)
            if found is None:
                missing.append(f"{destination} (was {source})")
            else:
                one["source"] = found
        if missing:
            hint = "say what is mounted there: --bind DESTINATION=SOURCE"
            raise RestoreError(f"the container mounts what this machine lacks: {', '.join(missing)}", hint=hint)
        if unknown := sorted(set(self._binds) - self._used):
            raise UsageError(
                f"--bind {unknown[0]}: the container has no such mount", hint="`ckptfs inspect REF --mounts`"
            )

    def _source(self, destination: str, source: str) -> str | None:
        """What is mounted on `destination` here; None when there is nothing for it."""
        if (chosen := self._binds.get(destination)) is not None:
            self._used.add(destination)
            if not os.path.exists(chosen):
                raise UsageError(f"--bind {destination}: there is no {chosen}")
            return os.path.abspath(chosen)
        if destination == "/dev/shm" and not source.startswith("/dev/shm"):
            return str(self._shared_memory())
        if (volume := self._volume(destination)) is not None:
            return str(volume)
        if os.path.exists(source):
            return source
        if destination not in _STAND_INS:
            return None
        path = self._place / "bundle" / destination.replace("/", "_")
        host = str(self.spec.get("hostname", "")) or "localhost"
        text = _STAND_INS[destination]
        path.write_text(
            Path("/etc/resolv.conf").read_text() if text is None else text.format(host=host), errors="replace"
        )
        return str(path)

    def _shared_memory(self) -> Path:
        path = self._place / "bundle" / "shm"
        if not path.is_dir():
            path.mkdir()
            size = self._config.get("shmSize")
            size = size if isinstance(size, int) and size > 0 else _SHM_BYTES
            mount("shm", path, "tmpfs", f"mode=1777,size={size}")
            copy_tree(self._image / "devshm-checkpoint", path)
        return path

    def _volume(self, destination: str) -> Path | None:
        """A named volume of podman, from the checkpoint, in a copy of its own; None where the image has none."""
        for volume in _objects(self._config.get("namedVolumes"), "config.dump: namedVolumes"):
            name = os.path.basename(str(volume.get("volumeName", "")))
            source = self._image / "volumes" / name
            if name and volume.get("dest") == destination and source.is_dir():
                target = self._place / "bundle" / f"volume_{name}"
                if not target.is_dir():  # else it is mounted twice: what is written there is seen here
                    target.mkdir()
                    copy_tree(source, target)
                return target
        return None

    def _fix_namespaces(self, linux: dict[str, Any]) -> None:
        """Namespaces that were joined and are not here are made new; the network's is empty but for loopback.

        One that has no name but a process's number (a pod's, of containerd and podman) is not: here that is another's.
        """
        namespaces = _objects(linux.get("namespaces"), "spec.dump: namespaces")
        if self._join and not any(one.get("type") == "network" for one in namespaces):
            raise UsageError("--network: the container has the network of its machine", hint="leave --network out")
        for one in namespaces:
            path, kind = str(one.get("path") or ""), one.get("type")
            if kind == "network" and self._join:
                one["path"] = self._join
            elif path and (path.startswith("/proc/") or not os.path.exists(path)):
                if kind == "network":
                    one["path"] = str(self._network())
                else:
                    del one["path"]

    def _network(self) -> Path:
        """A network namespace that a file keeps: criu joins it as it joined the engine's."""
        path = self._place / "bundle" / "netns"
        path.touch()
        up = ["ip", "link", "set", "lo", "up"]
        done = subprocess.run(["unshare", f"--net={path}", *up], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RestoreError(f"no network namespace can be made: {done.stderr.strip()}", hint="name one: --network")
        return path


def copy_tree(source: Path, target: Path) -> None:
    """Everything below `source`, with owners, times, links and attributes; nothing where there is no such directory."""
    if not source.is_dir():
        return
    command, plain = ["cp", "-a", f"{source}/.", str(target)], {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["cp failed"])[-1]
        if os.strerror(errno.EIO) in done.stderr:
            raise outage(said)
        raise RestoreError(f"{source} cannot be copied: {said}", hint=f"is there room in {target}?")


def _root_group(linux: Mapping[str, Any]) -> int | None:
    """Which group of this machine the container's root has; None without a user namespace of its own."""
    for one in _objects(linux.get("gidMappings"), "spec.dump: gidMappings"):
        group = one.get("hostID")
        if one.get("containerID") == 0 and isinstance(group, int) and 0 <= group < _NO_ID:
            return group
    return None


def _objects(value: object, what: str) -> list[dict[str, Any]]:
    """A list of objects; absent and null are empty. FormatError for all else."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise FormatError(f"{what} is not a list of objects")
    return value


def _binds(mounted: Mapping[str, Any]) -> bool:
    """Whether a mount of a spec shows a directory or file of the machine."""
    options = mounted.get("options")
    return mounted.get("type") == "bind" or (isinstance(options, list) and ("bind" in options or "rbind" in options))


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
