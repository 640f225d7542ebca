"""The files of a checkpoint, wherever they come from: what every source of `push` is turned into.

Owns the nouns that the sources (directory.py, image_files.py) share with the planner. Reads nothing by itself.
"""

import posixpath
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptfs.errors import LimitExceeded
from ckptfs.image.views import gathering
from ckptfs.layers.zstd_chunked_writer import Payload, read_exactly
from ckptfs.model.toc import Inode


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointFile:
    """One path of the checkpoint. `link`: a hard link to that path. `open`: its bytes, for regular files.

    Extents of the inode are the source's own business; everybody else reads through `open`.
    """

    path: bytes
    inode: Inode
    link: bytes | None = None
    open: Callable[[], Payload] | None = None

    @property
    def name(self) -> bytes:
        return self.path.rpartition(b"/")[2]

    @property
    def directory(self) -> bytes:
        return self.path.rpartition(b"/")[0]

    @property
    def is_regular(self) -> bool:
        """Whether it has bytes of its own."""
        return self.link is None and self.inode.is_file

    def read(self, limit: int) -> bytes:
        """All its bytes; LimitExceeded when there are more than `limit`."""
        size = self.inode.size
        if size > limit:
            raise LimitExceeded(f"{self.path.decode('utf-8', 'replace')!r} has {size} bytes, more than {limit}")
        if self.open is None or not size:
            return b""
        data = bytearray(size)
        payload = self.open()
        try:
            read_exactly(payload, memoryview(data), self.path)
        finally:
            payload.close()
        return bytes(data)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`files` sorted by path, parents first, each path once; `annotations` and `architecture` of the source image."""

    files: Sequence[CheckpointFile]
    annotations: Mapping[str, str] = field(default_factory=dict)
    architecture: str = ""

    def find(self, path: bytes) -> CheckpointFile | None:
        return next((file for file in self.files if file.path == path), None)


def under_checkpoint(files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
    """The flat layout: a directory of CRIU images (criu, runc, crun, docker, LXC) is what lies in `checkpoint/`.

    Where no directory is called so already, the one that holds inventory.img is, and not a pre-dump's (`parent` leads
    to it). With several the files stay as they are.
    """
    tops = {file.directory for file in files if file.name == b"inventory.img"}
    if any(top == b"checkpoint" or top.endswith(b"/checkpoint") for top in tops):
        return list(files)
    tops -= set(parent_directories(files))
    if len(tops) != 1:
        return list(files)
    (top,) = tops
    links = {f.directory: f.inode.target for f in files if f.name == b"parent" and stat.S_ISLNK(f.inode.mode)}
    known = {file.path for file in files}
    moves = gathering(top, links.get, known.__contains__)
    moved = [_moved(file, moves) for file in files]
    if not any(file.path == b"checkpoint" for file in moved):
        moved.append(CheckpointFile(b"checkpoint", _like(files)))
    return _linked_to_first(sorted(moved, key=lambda file: file.path))


def parent_directories(files: Sequence[CheckpointFile]) -> list[bytes]:
    """Directories that the `parent` symlink of an increment leads to (criu/image.c: open_parent), deepest first."""
    known = {file.path for file in files if file.inode.is_dir}
    found = set()
    for file in files:
        if file.name == b"parent" and stat.S_ISLNK(file.inode.mode):
            target = posixpath.normpath(posixpath.join(file.directory, file.inode.target))
            if target in known:
                found.add(target)
    return sorted(found, key=lambda path: (-path.count(b"/"), path))


def _moved(file: CheckpointFile, moves: Sequence[tuple[bytes, bytes]]) -> CheckpointFile:
    def under(path: bytes) -> bytes:
        for source, target in moves:
            if not source:
                return target + b"/" + path if path else target
            if path == source or path.startswith(source + b"/"):
                return target + path[len(source) :]
        return path

    return CheckpointFile(under(file.path), file.inode, None if file.link is None else under(file.link), file.open)


def _linked_to_first(files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
    """Of the paths of one file the first has the bytes, whichever had them before the move: links go behind it."""
    first: dict[bytes, bytes] = {}
    out = []
    for file in files:
        owner = first.setdefault(file.path if file.link is None else file.link, file.path)
        out.append(replace(file, link=owner if owner != file.path else None))
    return out


def _like(files: Sequence[CheckpointFile]) -> Inode:
    """A directory for images that came without one: private, like CRIU's, as old as the dump."""
    inventory = next(file for file in files if file.name == b"inventory.img").inode
    return Inode(stat.S_IFDIR | 0o700, inventory.uid, inventory.gid, mtime_ns=inventory.mtime_ns)
