"""The checkpoint as a whole: inventory.img, and what CRIU counted: stats-dump."""

from typing import NamedTuple

from ckptfs.criu.images import DEFAULT_LIMITS, only_record
from ckptfs.settings import Limits

_LSM = {0: "", 1: "selinux", 2: "apparmor"}
_NETWORK_LOCKS = {0: "iptables", 1: "nftables"}  # enum NETWORK_LOCK_METHOD in cr_options.h


class Inventory(NamedTuple):
    """`uptime_us`: the machine's uptime when it was dumped, in microseconds, 0 in old images.

    `run_id` tells dumps apart (UUID), "" before CRIU 4.1; `plugins` were active when dumping. `network_lock` is the
    tool that a restore opens the network with: iptables, nftables, or "" for none.
    """

    version: int
    lsm: str
    uptime_us: int
    tcp_close: bool
    run_id: str
    plugins: tuple[str, ...]
    network_lock: str = "iptables"


def parse_inventory(data: bytes, name: str = "inventory.img", limits: Limits = DEFAULT_LIMITS) -> Inventory:
    m = only_record(data, "inventory", name, limits)
    plugins = tuple(m.message(12).texts(12)) if 12 in m else ()
    lock = _NETWORK_LOCKS.get(m.uint(11, 0), "")
    return Inventory(m.uint(1), _LSM.get(m.uint(6, 0), ""), m.uint(8, 0), m.flag(10), m.text(13, ""), plugins, lock)


class DumpStatistics(NamedTuple):
    """Times in microseconds, counts in pages; `shared_*` are shared memory's.

    `frozen_time` is how long the processes stood still.
    """

    freezing_time: int
    frozen_time: int
    memdump_time: int
    memwrite_time: int
    pages_scanned: int
    pages_skipped_parent: int
    pages_written: int
    pages_lazy: int
    shared_pages_scanned: int
    shared_pages_written: int


def parse_dump_statistics(
    data: bytes, name: str = "stats-dump", limits: Limits = DEFAULT_LIMITS
) -> DumpStatistics | None:
    """None where the file has statistics of something else."""
    m = only_record(data, "stats-dump", name, limits)
    if 1 not in m:
        return None
    d = m.message(1)
    times = d.uint(1), d.uint(2), d.uint(3), d.uint(4)
    return DumpStatistics(*times, d.uint(5), d.uint(6), d.uint(7), d.uint(9, 0), d.uint(12, 0), d.uint(14, 0))
