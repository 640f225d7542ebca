"""One task: core-PID.img (name, state, machine), and fs-PID.img (its directories).

Called by inspection and restore/.
"""

from typing import NamedTuple

from ckptfs.criu.images import DEFAULT_LIMITS, only_record
from ckptfs.settings import Limits

# GOARCH names, as image manifests have them, by core_entry.mtype
_MACHINES = {
    1: "amd64",
    2: "arm",
    3: "arm64",
    4: "ppc64le",
    5: "s390x",
    6: "mips64le",
    7: "loong64",
    8: "riscv64",
}
_STATES = {1: "Alive", 2: "Dead", 3: "Stopped", 6: "Zombie"}  # compel/include/uapi/task-state.h


class Core(NamedTuple):
    """`state` is Alive, Dead, Stopped, Zombie or Unknown; `machine` a GOARCH name, "" where it is none we know.

    `comm` is the kernel's name of the task, 15 bytes at most. Zombies have an exit code.
    """

    machine: str
    state: str
    comm: str
    exit_code: int

    @property
    def has_memory(self) -> bool:
        """Whether memory, descriptors and directories were dumped; a zombie has none."""
        return self.state in ("Alive", "Stopped")


def parse_core(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> Core:
    """The core of a process; those of its other threads have no `tc` and are named and stated by their thread part."""
    m = only_record(data, "core", name, limits)
    machine = _MACHINES.get(m.uint(1), "")
    if 3 not in m:
        thread = m.message(5)
        return Core(machine, "Alive", thread.text(13, ""), 0)
    task = m.message(3)
    return Core(machine, _STATES.get(task.uint(1), "Unknown"), task.text(6), task.uint(2))


class Directories(NamedTuple):
    """Ids in files.img of the working directory and of the root, and the umask."""

    cwd: int
    root: int
    umask: int | None


def parse_fs(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> Directories:
    m = only_record(data, "fs", name, limits)
    return Directories(m.uint(1), m.uint(2), m.uint(3) if 3 in m else None)
