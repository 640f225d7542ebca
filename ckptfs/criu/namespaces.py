"""What namespaces held: mountpoints-N.img, utsns-N.img, and memfd.img.

Called by inspection.
"""

from typing import NamedTuple

from ckptfs.criu.images import DEFAULT_LIMITS, only_record, records
from ckptfs.settings import Limits

# mnt_entry.fstype; AUTO carries the name in a field of its own
_FILE_SYSTEMS = {
    1: "proc",
    2: "sysfs",
    3: "devtmpfs",
    4: "binfmt_misc",
    5: "tmpfs",
    6: "devpts",
    7: "simfs",
    8: "pstore",
    9: "securityfs",
    10: "fusectl",
    11: "debugfs",
    12: "cgroup",
    13: "aufs",
    14: "mqueue",
    15: "fuse",
    17: "overlay",
    18: "autofs",
    19: "tracefs",
    23: "cgroup2",
}


class MountPoint(NamedTuple):
    """One mount, as in /proc/PID/mountinfo. `key` names an external mount, which the restorer must be given."""

    id: int
    parent: int
    root: str
    path: str
    source: str
    file_system: str
    options: str
    key: str


def parse_mountpoints(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> tuple[MountPoint, ...]:
    out = []
    for record in records(data, "mountpoints", name, limits):
        m = record.message
        file_system = _FILE_SYSTEMS.get(m.uint(1)) or m.text(14, "")
        place = m.uint(2), m.uint(4), m.text(6), m.text(7), m.text(8)
        out.append(MountPoint(*place, file_system, m.text(9), m.text(18, "")))
    return tuple(out)


def parse_uts(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> tuple[str, str]:
    """(host name, domain name)."""
    m = only_record(data, "utsns", name, limits)
    return m.text(1), m.text(2)


class Memfd(NamedTuple):
    """A memfd, or memory that processes share through /dev/zero; `shmid` names its pagemap-shmem-SHMID.img."""

    id: int
    name: str
    size: int
    shmid: int


def parse_memfds(data: bytes, name: str = "memfd.img", limits: Limits = DEFAULT_LIMITS) -> tuple[Memfd, ...]:
    found = (record.message for record in records(data, "memfd", name, limits))
    return tuple(Memfd(m.uint(7), m.text(1), m.uint(4), m.uint(5)) for m in found)
