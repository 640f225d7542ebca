"""`ckptfs umount` and `status`: what daemons are asked from outside, and mounts whose daemon is dead.

Called by cli/ and restore/.
"""

import contextlib
import logging
import os
import shlex
import time
from typing import Any

from ckptfs.control.client import MountFiles, ask, ensure_runtime_dir, known_mounts
from ckptfs.daemon.claim import Lock, sweep
from ckptfs.errors import MountError, UnavailableError
from ckptfs.fuse.mountpoint import canonical, detach, mount_at, overlays_over
from ckptfs.settings import Timeouts

log = logging.getLogger(__name__)

_ENDS = Timeouts().daemon_end
_ALL = "`ckptfs status` without a directory shows all mounts"
_DEAD = "dead; run: ckptfs umount {}"


def umount(directory: str, *, force: bool = False) -> None:
    """Stop the daemon of the mount, or detach a dead mount; MountError when there is no ckptfs mount.

    One that other file systems stand on (a container's root on a layer store) is stopped only with `force`.
    """
    path = canonical(directory)
    mounted = mount_at(path)
    if mounted is not None and not mounted.ours:
        how = f"run: umount {shlex.quote(path)}"
        raise MountError(f"{path} is a {mounted.fstype} mount, not one of ckptfs", hint=how)
    if not force and mounted is not None and (above := overlays_over(path)):
        raise MountError(
            f"{path} is in use: it is below {len(above)} overlay mounts, the first on {above[0]}",
            hint="stop the containers and unmount the images that use it, or give --force",
        )
    ensure_runtime_dir()
    lock = Lock(path)
    lock.open()  # before the daemon is told: it holds this one until it has ended, who mounts here next has another
    with contextlib.closing(lock):
        try:
            ask(lock.files, "stop")
        except UnavailableError:
            if mounted is not None:
                detach(path)
            if lock.take():
                lock.remove()
            elif mounted is not None:  # it was stopped; its files are its own to remove, or of whoever finds it dead
                log.warning("%s is unmounted; its daemon does not answer, and ends once it runs again", path)
            if mounted is None:
                raise MountError(f"nothing is mounted on {path}", hint="`ckptfs status` shows the mounts") from None
            return
        deadline = time.monotonic() + _ENDS
        while lock.current() and not lock.take():
            if time.monotonic() > deadline:
                detach(path)
                return
            time.sleep(0.01)
        lock.remove()


# What a daemon of an earlier version, which still runs, does not say.
_OLDER: dict[str, Any] = {"seconds": 0.0, "background": True, "metrics": None, "layers": [], "roles": {}, "reading": []}


def statuses(directory: str | None, *, detail: bool = False) -> list[dict[str, Any]]:
    """The status of one mount, or of all, dead ones too. `detail`: with layers, roles and what is being read now."""
    if directory is not None:
        return [_status_at(canonical(directory), detail=detail)]
    sweep()
    found = []
    for files, state in known_mounts():
        try:
            found.append({**_OLDER, **ask(files, "status", detail=detail)})
        except UnavailableError:
            if mount_at(state["mountpoint"]) is None:
                _remove_left(state["mountpoint"])
            else:
                found.append({**state, "state": _DEAD.format(shlex.quote(state["mountpoint"]))})
    return found


def _status_at(path: str, *, detail: bool) -> dict[str, Any]:
    """MountError unless a daemon serves a mount of ours there."""
    files, mounted = MountFiles.of(path), mount_at(path)
    if mounted is None and not files.state.exists():
        raise MountError(f"nothing is mounted on {path}", hint=_ALL)
    if mounted is not None and not mounted.ours:
        raise MountError(f"{path} is a {mounted.fstype} mount, not one of ckptfs", hint=_ALL)
    try:
        return {**_OLDER, **ask(files, "status", detail=detail)}
    except UnavailableError:
        left = mount_at(path)
    if left is None:
        _remove_left(path)
        raise MountError(f"the daemon of {path} is gone")
    if left.user not in (None, os.geteuid()):  # its daemon answers nobody else
        raise MountError(f"{path} is mounted by another user (uid {left.user})", hint="only that user can ask it")
    if not files.lock.exists():  # a daemon that was killed leaves it
        hint = f"ask there; if its daemon is dead, run: ckptfs umount {shlex.quote(path)}"
        raise MountError(f"{path} was mounted in a container, or with another $XDG_RUNTIME_DIR", hint=hint)
    raise MountError(f"the daemon of {path} is " + _DEAD.format(shlex.quote(path)))


def _remove_left(path: str) -> None:
    """What a daemon that is gone has left, unless somebody is about to mount there."""
    with contextlib.suppress(MountError, FileNotFoundError), Lock(path) as lock:
        lock.remove()
