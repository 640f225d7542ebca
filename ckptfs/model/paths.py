"""Names out of archives, TOCs, indexes and profiles made into paths of entries: the one place where a path is judged.

Every format passes every path through `normalise` or, where it was written by us, `plain`; once: nobody behind them
looks for `..` again. So it is with what else has limits of the kernel: links, extended attributes and device numbers.
"""

import os
from collections.abc import Iterator

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.model.oci import parse_json
from ckptfs.settings import Limits

_MOST_MAJOR, _MOST_MINOR = (1 << 12) - 1, (1 << 20) - 1
MOST_DEVICE = os.makedev(_MOST_MAJOR, _MOST_MINOR)  # as st_rdev: all of 32 bits


def normalise(name: bytes, limits: Limits) -> bytes:
    """The path as `Entry.path` wants it: relative, no '.', no empty parts, no trailing slash; b"" is the root.

    As engines have it, `a/../b` is `b` whatever `a` is, and leading slashes are dropped. FormatError for NUL and for a
    name that leaves the root, LimitExceeded for what no Linux file system could hold (NAME_MAX, PATH_MAX, depth).
    """
    # Most names are fine as they are; the hundred thousand names of a big image should not cost more than this.
    if (
        0 < len(name) <= min(limits.name_bytes, limits.path_depth)
        and b"/." not in name
        and b"//" not in name
        and b"\0" not in name
        and name[0] not in b"./"
        and name[-1] != 0x2F
    ):
        return name
    if len(name) > limits.path_bytes:
        raise LimitExceeded(f"the path {show(name)} has {len(name)} bytes, more than {limits.path_bytes}")
    if b"\0" in name:
        raise FormatError(f"the path {show(name)} contains a NUL")
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise FormatError(f"the path {show(name)} leaves the image with '..'")
            parts.pop()
        elif part and part != b".":
            parts.append(part)
    if len(parts) > limits.path_depth:
        raise LimitExceeded(f"the path {show(name)} is {len(parts)} levels deep, more than {limits.path_depth}")
    if len(name) > limits.name_bytes and max(map(len, parts), default=0) > limits.name_bytes:
        raise LimitExceeded(f"the path {show(name)} has a part of more than {limits.name_bytes} bytes")
    return b"/".join(parts)


def deleted_paths(data: bytes, limits: Limits) -> list[bytes]:
    """deleted.files of a checkpoint, which podman and CRI-O write: a JSON list of absolute paths; sorted, each once.

    What lies below another of them is left out: engines remove what is listed with all that is below, and a whiteout
    there would bring the directories above it back. FormatError for anything but such a list, and for the root.
    """
    if not data:
        return []
    listed = parse_json(data, "deleted.files")
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        raise FormatError("deleted.files is not a list of paths")
    try:
        paths = {normalise(path.encode("utf-8", "surrogateescape"), limits) for path in listed}
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can say and Go does not write
        raise FormatError("deleted.files has a path that is no text") from None
    if b"" in paths:
        raise FormatError("deleted.files names the root")
    return sorted(path for path in paths if paths.isdisjoint(parents(path)))


def parents(path: bytes) -> Iterator[bytes]:
    """The directories that `path` lies in, from the inside out, without the root."""
    while path := path.rpartition(b"/")[0]:
        yield path


def plain(path: bytes, limits: Limits) -> bytes:
    """`path` if it is as `normalise` would make it; another is refused, not mended. FormatError, LimitExceeded."""
    if normalise(path, limits) != path:
        raise FormatError(f"the path {show(path)} is not plain")
    return path


def symlink_target(target: bytes, path: bytes, limits: Limits) -> bytes:
    """A symbolic link's text, which is data; only readlink(2)'s limits hold. Who follows it is symlinks.py."""
    if b"\0" in target or not target:
        raise FormatError(f"the symbolic link {show(path)} has an empty target or one with a NUL")
    if len(target) >= limits.path_bytes:
        raise LimitExceeded(f"the target of the symbolic link {show(path)} has {len(target)} bytes")
    return target


def check_xattr(name: bytes, value: bytes, limits: Limits) -> None:
    """What setxattr(2) would refuse. FormatError, LimitExceeded."""
    if not name or b"\0" in name:
        raise FormatError(f"an extended attribute is called {show(name)}")
    if len(name) > limits.name_bytes or len(value) > limits.xattr_bytes:
        raise LimitExceeded(f"the extended attribute {show(name)} has {len(value)} bytes")


def device_number(major: int, minor: int, path: bytes) -> int:
    """st_rdev of a device; FormatError for numbers that mknod(2) refuses: Linux has 12 bits for one, 20 for the other.

    FUSE would hand out their low bits, which are those of another device: 4096:0 would be an overlay's whiteout.
    """
    if not (0 <= major <= _MOST_MAJOR and 0 <= minor <= _MOST_MINOR):
        raise FormatError(f"the device {show(path)} has the numbers {major}, {minor}")
    return os.makedev(major, minor)


def show(name: bytes) -> str:
    """A name for an error message: printable, one line, short."""
    return repr(name[:80].decode("utf-8", "backslashreplace"))
