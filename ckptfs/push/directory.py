"""A checkpoint that lies in a directory: CRIU images as criu, runc and crun leave them, or an extracted archive.

Reads with lstat, never follows a link. Sockets are left out (criu's lazy-pages socket lies between its images).
"""

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ckptfs.errors import FormatError
from ckptfs.layers.zstd_chunked_writer import Payload
from ckptfs.model.times import within_reach
from ckptfs.model.toc import Inode
from ckptfs.push.checkpoint_files import Checkpoint, CheckpointFile, under_checkpoint
from ckptfs.sources.files import translated

_XATTRS = (b"user.", b"security.capability")  # labels and overlay marks belong to the host, not to the checkpoint


def read_directory(top: Path) -> Checkpoint:
    """All files under `top`. NotFoundError or AuthError when it cannot be read, FormatError when it holds nothing."""
    root = os.fsencode(top)
    files: list[CheckpointFile] = []
    seen: dict[tuple[int, int], bytes] = {}
    try:
        for path, status in sorted(_walk(root)):
            first = path
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                first = seen.setdefault((status.st_dev, status.st_ino), path)
            files.append(_file(os.path.join(root, path), path, first, status))
    except OSError as error:
        raise translated(error, Path(os.fsdecode(error.filename or root))) from None
    if not files:
        raise FormatError(f"{top} is empty", hint="name the directory that holds inventory.img or checkpoint/")
    return Checkpoint(under_checkpoint(files))


def _walk(top: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """All paths below `top`, which is left out: its owner, mode and time are those of whoever unpacked it."""
    pending = [b""]
    while pending:
        parent = pending.pop()
        for name in os.listdir(os.path.join(top, parent)):
            path = parent + b"/" + name if parent else name
            status = os.lstat(os.path.join(top, path))
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)
            if not stat.S_ISSOCK(status.st_mode):
                yield path, status


def _file(full: bytes, path: bytes, first: bytes, status: os.stat_result) -> CheckpointFile:
    """`first`: the first path of the same inode."""
    mode = status.st_mode
    inode = Inode(
        mode,
        status.st_uid,
        status.st_gid,
        status.st_size if stat.S_ISREG(mode) or stat.S_ISLNK(mode) else 0,
        within_reach(status.st_mtime_ns),
        status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0,
        os.readlink(full) if stat.S_ISLNK(mode) else b"",
        _xattrs(full),
    )
    return CheckpointFile(
        path, inode, first if first != path else None, partial(_open, full) if stat.S_ISREG(mode) else None
    )


def _open(path: bytes) -> Payload:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise translated(error, Path(os.fsdecode(path))) from None


def _xattrs(path: bytes) -> dict[bytes, bytes]:
    try:
        names = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
    except OSError:  # a file system without extended attributes
        return {}
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names if name.startswith(_XATTRS)}
