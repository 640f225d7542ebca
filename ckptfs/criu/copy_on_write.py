"""Which mappings CRIU fills before a task forks, so that parent and child share the pages copy-on-write.

CRIU's rule (criu/mem.c, prepare_cow_vmas and vma_force_premap), in our words. Values in, values out; called by
restore_plan.
"""

from collections.abc import Iterator, Mapping, Sequence

from ckptfs.criu.mm import MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_HUGETLB, PLUGIN, SHADOW_STACK, Mm, Vma
from ckptfs.criu.pstree import Task


def filled_before_fork(tasks: Sequence[Task], spaces: Mapping[int, Mm]) -> dict[int, set[int]]:
    """pid -> positions in its `vmas`. `spaces`: pid -> mm, for the tasks that have one."""
    out = {task.pid: set(_by_itself(spaces[task.pid].vmas)) if task.pid in spaces else set() for task in tasks}
    for task in tasks:
        mine, theirs = spaces.get(task.pid), spaces.get(task.ppid)
        if mine is None or theirs is None or mine.executable != theirs.executable:
            continue
        at = {vma.start: position for position, vma in enumerate(theirs.vmas)}
        for position, vma in enumerate(mine.vmas):
            other = at.get(vma.start)
            if other is not None and _may_share(vma, theirs.vmas[other]):
                out[task.pid].add(position)
                out[task.ppid].add(other)
    return out


def _may_share(a: Vma, b: Vma) -> bool:
    """Same bounds, both private, neither huge, alike in growing down and in being anonymous, and of the same file."""
    return (
        a.end == b.end
        and a.private
        and b.private
        and not (a.flags | b.flags) & MAP_HUGETLB
        and not (a.flags ^ b.flags) & (MAP_GROWSDOWN | MAP_ANONYMOUS)
        and (bool(a.flags & MAP_ANONYMOUS) or a.shmid == b.shmid)
        and not (a.status | b.status) & PLUGIN
    )


def _by_itself(vmas: Sequence[Vma]) -> Iterator[int]:
    """Shadow stacks, and a stack right above another mapping."""
    for position, vma in enumerate(vmas):
        touches = position > 0 and vmas[position - 1].end == vma.start
        if vma.status & SHADOW_STACK or (vma.flags & MAP_GROWSDOWN and touches):
            yield position
