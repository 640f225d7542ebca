"""The process tree: pstree.img, and what ids-PID.img says about what tasks share."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ckptfs.criu.images import DEFAULT_LIMITS, only_record, records
from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.settings import Limits


class Task(NamedTuple):
    """One process. The pid names its other images; `ppid` is 0 for the root; `threads` are thread ids, its own too."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    threads: tuple[int, ...]


def parse_pstree(data: bytes, name: str = "pstree.img", limits: Limits = DEFAULT_LIMITS) -> tuple[Task, ...]:
    """The tasks in the order of the file, where parents stand before their children.

    FormatError when a pid is there twice, when a parent is unknown or when there is no task.
    """
    tasks: list[Task] = []
    depth = {0: 0}
    for record in records(data, "pstree", name, limits):
        m = record.message
        task = Task(m.uint(1), m.uint(2), m.uint(3), m.uint(4), tuple(m.uints(5)))
        if task.pid in depth:
            raise FormatError(f"{name} names process {task.pid} twice")
        if task.ppid not in depth:
            raise FormatError(f"{name}: the parent of process {task.pid}, {task.ppid}, does not stand before it")
        depth[task.pid] = depth[task.ppid] + 1
        if depth[task.pid] > limits.process_depth:
            raise LimitExceeded(f"{name} has more than {limits.process_depth} generations of processes")
        tasks.append(task)
    if not tasks:
        raise FormatError(f"{name} names no process")
    return tuple(tasks)


def restore_order(tasks: Sequence[Task]) -> Iterator[tuple[Task, int]]:
    """Each task with its depth, in the order in which CRIU walks the tree: parents first, youngest child first.

    CRIU puts each task it reads at the head of its parent's list (criu/pstree.c), so siblings come out reversed.
    """
    children: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        children[task.ppid].append(task)
    stack = [(task, 0) for task in reversed(children[0])]
    while stack:
        task, depth = stack.pop()
        yield task, depth
        stack.extend((child, depth + 1) for child in children[task.pid])


class SharedIds(NamedTuple):
    """Numbers of what a task may share: tasks with the same `files` have one descriptor table (fdinfo-N.img)."""

    files: int


def parse_ids(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> SharedIds:
    m = only_record(data, "ids", name, limits)
    return SharedIds(m.uint(2))
