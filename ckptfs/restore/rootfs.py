"""The root file system of a restored container: an overlay whose upper directory is its own and starts empty.

Below is either the root file system view of the image (base and delta, lazily from a registry), or the delta's
directory in the checkpoint view over a base that is on this machine. Owns the overlay and its attributes, not where the
base comes from. Called by container.py.
"""

import os
import stat
from pathlib import Path

from ckptfs.restore.workplace import Workplace, mount


def mount_rootfs(place: Workplace, lower: Path, delta: Path | None, root_mode: int | None) -> Path:
    """Mount the overlay; returns where. `delta` goes over `lower`; `root_mode` are the root's permissions for criu."""
    upper, merged = place / "upper", place / "merged"
    _copy_attributes(lower, upper)
    if root_mode is not None:
        upper.chmod(root_mode)
    layers = [lower]
    if delta is not None and delta.is_dir():
        _keep_attributes(delta, lower, upper)
        layers.insert(0, delta)
    below = ":".join(_escaped(layer) for layer in layers)
    options = f"lowerdir={below},upperdir={_escaped(upper)},workdir={_escaped(place / 'overlay')}"
    mount("overlay", merged, "overlay", options)
    return merged


def _keep_attributes(delta: Path, lower: Path, upper: Path) -> None:
    """Directories that the delta only leads through keep the base's mode and owner.

    Engines record a directory in the delta only when it is new; the view makes the others up, with a time of zero. In
    an overlay the topmost directory's attributes count, so those of the base are repeated on top of the delta.
    """
    pending = [""]
    while pending:
        inside = pending.pop()
        with os.scandir(delta / inside) as entries:
            for entry in entries:
                path = f"{inside}/{entry.name}" if inside else entry.name
                base = lower / path
                if not entry.is_dir(follow_symlinks=False) or base.is_symlink() or not base.is_dir():
                    continue
                if any(name.endswith(".overlay.opaque") for name in os.listxattr(entry.path)):
                    continue
                (upper / path).mkdir()
                made_up = entry.stat(follow_symlinks=False).st_mtime_ns == 0
                _copy_attributes(base if made_up else delta / path, upper / path)
                pending.append(path)


def _copy_attributes(source: Path, target: Path) -> None:
    status = source.stat()
    os.chown(target, status.st_uid, status.st_gid)
    for name in os.listxattr(source):
        if ".overlay." not in name:
            os.setxattr(target, name, os.getxattr(source, name))
    target.chmod(stat.S_IMODE(status.st_mode))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _escaped(path: Path) -> str:
    """As overlay's options have it: backslash, colon and comma are escaped."""
    text = str(path)
    for char in "\\:,":
        text = text.replace(char, "\\" + char)
    return text
