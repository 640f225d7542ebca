"""What the command line asks a daemon for, and when its command was started.

Pickled to a daemon that waits already (standby.py). Called by cli/, restore/ and everything here.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ckptfs.model.oci import Reference
from ckptfs.settings import Settings


class MountRequest(NamedTuple):
    """What the command line asked for. `started`: in monotonic seconds, see `command_start`."""

    reference: Reference
    mountpoint: str
    started: float
    view: Literal["checkpoint", "raw", "rootfs"] = "checkpoint"
    cache_dir: Path = Path()
    cache_key: bytes | None = None
    offline: bool = False
    ephemeral: bool = False
    strict: bool = False
    prefetch: bool = True
    background: bool = True
    publish_index: bool = False
    base: Reference | None = None
    allow_other: bool = False
    plain_http: bool = False
    record: Path | None = None
    transfer_rate: float = 0.0  # see engine/reader.py
    stats: Path | None = None
    metrics: tuple[str, int] | None = None  # IP address and port to serve metrics at
    ready_fd: int | None = None
    figures: bool = False  # whether who waits is told a whole status, 2 µs for each chunk; else that it is ready
    settings: Settings = Settings()

    def __repr__(self) -> str:
        return f"MountRequest({self.reference}, {self.mountpoint!r}, …)"  # without `cache_key`


class StoreRequest(NamedTuple):
    """What `ckptfs store` asked for: an additional layer store (serve_store.py). Names as in a MountRequest."""

    mountpoint: str
    started: float
    cache_dir: Path = Path()
    cache_key: bytes | None = None
    offline: bool = False
    strict: bool = False
    background: bool = True
    allow_other: bool = False
    plain_http: bool = False
    metrics: tuple[str, int] | None = None
    ready_fd: int | None = None
    figures: bool = False
    settings: Settings = Settings()

    def __repr__(self) -> str:
        return f"StoreRequest({self.mountpoint!r}, …)"  # without `cache_key`


Request = MountRequest | StoreRequest
Announce = Callable[[dict[str, Any]], None]  # tells whoever waits that a read has worked; see `MountRequest.figures`


def command_start() -> float:
    """When this command was started, on the monotonic clock (proc_pid_stat(5), field 22; steps of 10 ms)."""
    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age
