"""Mount points as the kernel sees them: what is mounted where, whether it is ours, whether it is dead.

Reads /proc/self/mountinfo and never touches the file system in question, so a hung or dead mount cannot hang us.
"""

import errno
import os
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

from ckptfs.errors import MountError
from ckptfs.namespace import unmount

FSTYPE = "fuse.ckptfs"
_CONFIGURATION = "/etc/fuse.conf"
_LINKS = 4  # containers/storage: l/SHORT -> ../ID/diff -> the layer store


class Mount(NamedTuple):
    """One line of mountinfo (proc_pid_mountinfo(5)). `options` are those of the mount, `data` of its file system."""

    path: str
    device: tuple[int, int]
    fstype: str
    source: str
    options: frozenset[str]
    data: str = ""

    @property
    def ours(self) -> bool:
        return self.fstype == FSTYPE

    @property
    def user(self) -> int | None:
        """Who has mounted it, of a FUSE file system."""
        return next((int(word[8:]) for word in self.data.split(",") if word.startswith("user_id=")), None)


def mounts() -> list[Mount]:
    """All mounts of this namespace, the topmost of several on one path last."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.rstrip("\n").partition(" - ")
            fields, tail = left.split(" "), right.split(" ")
            major, _, minor = fields[2].partition(":")
            options = frozenset(fields[5].split(","))
            device = (int(major), int(minor))
            found.append(Mount(_unescape(fields[4]), device, tail[0], _unescape(tail[1]), options, _unescape(tail[2])))
    return found


def mount_at(path: str) -> Mount | None:
    """The topmost mount whose mount point is exactly this path."""
    for mount in reversed(mounts()):
        if mount.path == path:
            return mount
    return None


def overlays_over(path: str) -> list[str]:
    """Where overlays are mounted that have a lower directory in the mount at `path`, as engines make them.

    containers/storage names lower directories by symlinks, absolute or relative to the directory above the overlay's;
    only links are read, and none inside of the mount.
    """
    return [mount.path for mount in mounts() if mount.fstype == "overlay" and _stands_on(mount, path)]


def _stands_on(overlay: Mount, path: str) -> bool:
    lower = next((word[9:] for word in overlay.data.split(",") if word.startswith("lowerdir=")), "")
    home = os.path.dirname(os.path.dirname(overlay.path))
    for directory in lower.split(":"):
        place = os.path.join(home, directory)
        for _ in range(_LINKS):
            if place.startswith(path + "/"):
                return True
            try:
                place = os.path.normpath(os.path.join(os.path.dirname(place), os.readlink(place)))
            except OSError:
                break
    return False


def canonical(path: str | Path) -> str:
    """Absolute, symlinks resolved in the parents only: the last component may be a dead mount that cannot be asked."""
    absolute = os.path.abspath(path)
    parent, name = os.path.split(absolute)
    resolved = os.path.join(os.path.realpath(parent), name)
    if mount_at(resolved) is None and os.path.islink(resolved):
        return os.path.realpath(resolved)
    return resolved


def is_dead(path: str) -> bool:
    """Whether the daemon of the mount at `path` is gone.

    statfs(2) is never answered from the kernel's cache, as stat(2) of the root would be: ENOTCONN means dead.
    """
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def prepare(path: str) -> None:
    """Make sure that something can be mounted at `path`; detaches a dead mount of ours. MountError otherwise."""
    mount = mount_at(path)
    if mount is not None and mount.ours:
        if not is_dead(path):
            raise MountError(f"{path} is mounted already", hint=f"run: ckptfs umount {shlex.quote(path)}")
        detach(path)
        mount = mount_at(path)
    if mount is not None:
        raise MountError(f"{path} has a {mount.fstype} file system mounted", hint="name an empty directory")
    try:
        if not os.path.isdir(path):
            if os.path.lexists(path):
                raise MountError(f"the mount point {path} is not a directory", hint="name an empty directory")
            raise MountError(f"the mount point {path} does not exist", hint=f"run: mkdir -p {shlex.quote(path)}")
        if os.listdir(path):
            raise MountError(f"the mount point {path} is not empty", hint="name an empty directory")
    except OSError as error:
        raise MountError(f"the mount point {path} cannot be used: {error.strerror}") from None
    if not os.path.exists("/dev/fuse"):
        raise MountError(
            "/dev/fuse is missing", hint="load the module: modprobe fuse; in a container give --device /dev/fuse"
        )
    if os.geteuid() != 0 and not _on_path("fusermount3"):
        raise MountError("fusermount3 is missing", hint="install the package fuse3, or run as root")
    if os.geteuid() != 0 and not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError("/dev/fuse is not open to you", hint="ask for: chmod 666 /dev/fuse, or run as root")


def admits_others() -> bool:
    """Whether ordinary users may mount for other users too: fuse.conf(5)."""
    try:
        with open(_CONFIGURATION, encoding="utf-8", errors="replace") as lines:
            return any(line.strip() == "user_allow_other" for line in lines)
    except FileNotFoundError:
        return False
    except OSError:  # fusermount3 can read it, and we cannot know
        return True


def detach(path: str) -> None:
    """Lazy unmount: the name is free at once, whoever still reads keeps reading. What is gone already is fine."""
    if os.geteuid() == 0:
        try:
            unmount(path, lazily=True)
            return
        except OSError as error:
            reason = str(error.strerror)
    else:
        done = subprocess.run(["fusermount3", "-u", "-z", path], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
    if mount_at(path) is not None:
        raise MountError(f"{path} cannot be unmounted: {reason}")


def _unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash as three octal digits."""
    if "\\" not in text:
        return text
    for escape, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escape, char)
    return text


def _on_path(program: str) -> bool:
    import shutil  # with bz2 and lzma, 3 ms of every mount

    return shutil.which(program) is not None
