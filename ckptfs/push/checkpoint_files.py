"""The files of a checkpoint, wherever they come from: what every source of `push` is turned into.

Owns the nouns that the sources (directory.py, image_files.py) share with the planner. Reads nothing by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.layers.zstd_chunked_writer import Payload
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
            at = 0
            while at < size:
                count = payload.readinto(memoryview(data)[at:])
                if not count:
                    raise FormatError(f"{self.path.decode('utf-8', 'replace')!r} ends early")
                at += count
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
    """The flat layout: a plain directory of CRIU images (criu, runc, crun, docker) is what lies in `checkpoint/`."""
    if not any(file.path == b"inventory.img" for file in files):
        return list(files)
    moved = [
        CheckpointFile(
            b"checkpoint/" + file.path if file.path else b"checkpoint",
            file.inode,
            b"checkpoint/" + file.link if file.link is not None else None,
            file.open,
        )
        for file in files
    ]
    if not any(file.path == b"checkpoint" for file in moved):
        moved.insert(0, CheckpointFile(b"checkpoint", _like(files)))
    return moved


def _like(files: Sequence[CheckpointFile]) -> Inode:
    """A directory for images that came without one: private, like CRIU's, as old as the dump."""
    inventory = next(file for file in files if file.path == b"inventory.img").inode
    return Inode(0o040700, inventory.uid, inventory.gid, mtime_ns=inventory.mtime_ns)
