"""The order in which a restore opens the images that are not pages.

Measured, not specified: inotify on the image directory while criu 4.1 restored a tree of three processes and runc a
podman container; kinds that neither has stand where criu's code puts them. Names in, names out. Called by restore_plan.
"""

from collections.abc import Iterable, Mapping, Sequence

from ckptfs.criu.images import parse_name
from ckptfs.criu.pstree import Task, restore_order

_BEFORE = ("inventory", "pstree", "ids", "memfd", "files", "remap-fpath", "userns", "cgroup", "mountpoints", "core")
_NAMESPACES = ("timens", "pidns", "netns", "netdev", "ifaddr", "route", "route6", "rule", "iptables", "ip6tables")
_MORE_NAMESPACES = ("nftables", "netns-ct", "netns-exp", "utsns", "ipcns-var", "ipcns-shm", "ipcns-msg", "ipcns-sem")
_MOUNTS = ("tmpfs-dev", "tmpfs", "autofs", "binfmt-misc", "tty-info", "tty-data", "apparmor", "seccomp", "filelocks")
_QUEUES = ("pipes-data", "fifo-data", "sk-queues", "bpfmap-data")
_OF_ONE_TASK = ("mm", "fdinfo", "fs")  # the three of a task, then the three of the next
_AFTER = ("pagemap", "ghost-file", "tcp-stream", "pagemap-shmem")
_KINDS = (*_BEFORE, *_NAMESPACES, *_MORE_NAMESPACES, *_MOUNTS, *_QUEUES, *_OF_ONE_TASK, *_AFTER)
_RANK = {kind: rank for rank, kind in enumerate(_KINDS)}
_NOT_READ = {"pages", "amdgpu-pages", "stats-dump", "stats-restore", "irmap-cache"}
_RUNTIME = "descriptors.json"  # runc reads it before it starts criu


def metadata_order(names: Iterable[str], tasks: Sequence[Task], files: Mapping[int, int]) -> tuple[str, ...]:
    """Those of `names` that are not pages, sorted by when they are opened; names with a slash are left out.

    tasks: as in pstree.img. files: pid -> number of its descriptor table (ids-PID.img), for fdinfo-N.img.
    """
    turn: dict[tuple[str, int | None], int] = {}
    for position, (task, _) in enumerate(restore_order(tasks)):
        turn.update(((kind, task.pid), position) for kind in ("mm", "fs", "pagemap", "core"))
        if task.pid in files:
            turn.setdefault(("fdinfo", files[task.pid]), position)

    def key(name: str) -> tuple[int, int, int, str]:
        image = parse_name(name)
        if image is None:  # logs and what runtimes add
            return (-1 if name == _RUNTIME else len(_RANK), 0, 0, name)
        rank = _RANK.get(image.kind, len(_RANK))
        position = turn.get((image.kind, image.number), len(turn))
        if image.kind == "core" and position:  # the root's comes early, another's just before its pagemap
            return _RANK["pagemap"], position, 0, name
        if image.kind == "pagemap":
            return rank, position, 1, name
        if image.kind in _OF_ONE_TASK:
            return _RANK[_OF_ONE_TASK[0]], position, rank, name
        return rank, position, image.number or 0, name

    return tuple(sorted(filter(_is_metadata, names), key=key))


def _is_metadata(name: str) -> bool:
    image = parse_name(name)
    return "/" not in name and (image is None or image.kind not in _NOT_READ)
