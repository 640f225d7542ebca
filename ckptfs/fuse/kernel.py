"""Kernel settings of one mount that pyfuse3 has no hook for: how far is read ahead, how much may be on its way.

Where a setting is refused (not root) the mount is slower, not wrong. docs/performance.md has the measurements.
"""

import logging
import os

from ckptfs import namespace
from ckptfs.fuse.mountpoint import Mount
from ckptfs.settings import Sizes

log = logging.getLogger(__name__)

_CONNECTIONS = "/sys/fs/fuse/connections"


def set_read_ahead(mount: Mount, sizes: Sizes) -> None:
    """Read-ahead of 128 KiB, the default, makes a plain restore over 20 ms ten times slower than 4 MiB.

    Only after the first answer from the mount: the kernel lowers the value again when FUSE_INIT is answered
    (process_init_reply in fs/fuse/inode.c). It also decides how large buffered reads are: up to 1 MiB then.
    """
    major, minor = mount.device
    path = f"/sys/class/bdi/{major}:{minor}/read_ahead_kb"
    try:
        _write(path, sizes.read_ahead // 1024)
    except OSError as error:
        log.info("%s stays as it is: %s", path, error.strerror)


def set_max_background(mount: Mount, sizes: Sizes) -> None:
    """12 buffered reads at a time, the default, are 1.5 MiB: less than most links hold.

    Before the mount is ready: what has been queued because of the old value waits until one of those 12 ends
    (fuse_conn_max_background_write wakes who waits for a place, and does not look into the queue).

    The control file system is not mounted everywhere (containers, minimal systems): then it is mounted for a moment in
    a mount namespace of its own, which nobody else sees.
    """
    settings = f"{_CONNECTIONS}/{mount.device[1]}"

    def write() -> None:
        if not os.path.isdir(settings):
            namespace.mount("fusectl", _CONNECTIONS)
        _write(f"{settings}/max_background", sizes.max_background)
        _write(f"{settings}/congestion_threshold", sizes.max_background * 3 // 4)

    failure = ""
    try:
        if os.path.isdir(settings):
            write()
        elif os.geteuid() == 0:
            failure = namespace.in_own_namespace(write)
    except OSError as error:
        failure = str(error)
    if failure:
        log.info("max_background stays as it is: %s", failure)


def _write(path: str, value: int) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(str(value))
