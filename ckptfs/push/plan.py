"""Which file goes into which layer, and in what order: one layer per role and, for what is large, per file.

Every layer carries the directories above its files, so that unpacking it over others (overlay) changes no owner and no
mode. The images of a pre-dump parent have layers of their own: the next increment has them too, bit for bit. Decides
only; opens nothing. The same files give the same plan.
"""

import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ckptfs.criu.images import parse_name
from ckptfs.push.checkpoint_files import Checkpoint, CheckpointFile, parent_directories
from ckptfs.settings import MiB

Role = Literal["meta", "data", "pages", "rootfs-diff"]

_LARGE = 4 * MiB  # a pages file from here on has a layer of its own: a process that slept shares the whole blob
_MOST_LARGE = 64  # layers of that kind: overlay stacks at most 128, containers/storage fewer
_DATA_KINDS = frozenset(("ghost-file", "tmpfs", "tmpfs-dev", "ipcns-shm"))
_PAGES_KINDS = frozenset(("pages", "pages-shmem", "amdgpu-pages"))
_DUMPS = frozenset(
    b"config.dump spec.dump status status.dump stats-dump network.status bind.mounts descriptors.json pod.dump "
    b"pod.options io.kubernetes.cri-o.LogPath parent".split()
)
_DELTA = frozenset((b"rootfs-diff.tar", b"deleted.files"))
_ORDER: tuple[Role, ...] = ("meta", "data", "pages", "rootfs-diff")


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """`files` in archive order: sorted by path, directories before what is in them."""

    role: Role
    files: Sequence[CheckpointFile]


def role_of(file: CheckpointFile) -> Role:
    """By name alone; whatever is not known is data."""
    if file.name in _DELTA:
        return "rootfs-diff"
    if file.name in _DUMPS or file.inode.is_dir:
        return "meta"
    name = parse_name(file.name.decode("utf-8", "replace"))
    if name is None:
        return "data"
    if name.kind in _PAGES_KINDS:  # a link to one is in the parent's directory of an increment (increment.py)
        return "meta" if stat.S_ISLNK(file.inode.mode) else "pages"
    return "data" if name.kind in _DATA_KINDS else "meta"


def plan_layers(checkpoint: Checkpoint) -> list[PlannedLayer]:
    """The layers of M, in the order of the manifest."""
    every = {file.path: file for file in checkpoint.files}
    directories = {path: file for path, file in every.items() if file.inode.is_dir}
    parents = parent_directories(checkpoint.files)
    roles = {file.path: role_of(file) for file in checkpoint.files if not file.inode.is_dir}
    alone = _large_pages(file for file in checkpoint.files if roles.get(file.path) == "pages" and file.is_regular)
    groups: dict[tuple[bytes, int, bytes], list[CheckpointFile]] = {}
    for file in checkpoint.files:
        if file.inode.is_dir:
            continue
        owner = file if file.link is None else every[file.link]
        role = roles[owner.path]  # a hard link goes where its file is
        parent = next((top for top in parents if owner.path.startswith(top + b"/")), b"")
        key = (parent, _ORDER.index(role), owner.path if owner.path in alone else b"")
        groups.setdefault(key, []).append(file)
    used = {path for files in groups.values() for file in files for path in _above(file.path)}
    for path, directory in directories.items():  # directories that hold nothing
        if path not in used:
            parent = next((top for top in parents if path == top or path.startswith(top + b"/")), b"")
            groups.setdefault((parent, 0, b""), []).append(directory)
    return [
        PlannedLayer(_ORDER[order], _with_directories(files, directories))
        for (_, order, _), files in sorted(groups.items(), key=lambda item: item[0])
    ]


def _with_directories(
    files: Iterable[CheckpointFile], directories: dict[bytes, CheckpointFile]
) -> list[CheckpointFile]:
    wanted = {file.path: file for file in files}
    for path in list(wanted):
        for above in _above(path):
            if above in directories:
                wanted[above] = directories[above]
    return [wanted[path] for path in sorted(wanted)]


def _above(path: bytes) -> Iterable[bytes]:
    """All directories that `path` lies in, the root included."""
    while path:
        path = path.rpartition(b"/")[0]
        yield path


def _large_pages(files: Iterable[CheckpointFile]) -> set[bytes]:
    large = sorted((f for f in files if f.inode.size >= _LARGE), key=lambda f: (-f.inode.size, f.path))
    return {file.path for file in large[:_MOST_LARGE]}
