"""What users do with a checkpoint in a registry, measured: restore it from a mount, or pull, unpack and restore it.

Owns the clock and the counters of one run. Every run starts cold, in a folder of its own. Called by the rows.
"""

import itertools
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lab import Image, Lab, LinkShape
from ckptfs.bench.link import ShapedLink
from ckptfs.bench.machine import Usage, usage
from ckptfs.bench.reading import replay, whole_files
from ckptfs.bench.watch import Watcher
from ckptfs.control.client import MountFiles, ask
from tests.support.command import Mounted, mounted
from tests.support.criu import RestoredProcess, restore
from tests.support.images import extract

LAZY = "ckptfs, lazy pages"
PLAIN = "ckptfs, plain restore"
EAGER = "skopeo, tar, criu"


@dataclass(frozen=True, slots=True)
class Restored:
    """Seconds since the first command, and what came over the link. `status` is the mount's, at the end."""

    ready: float
    first_tick: float
    resident: float
    bytes_at_first_tick: int
    bytes: int
    longest_pause: float
    status: dict[str, Any]
    usage: Usage

    def values(self) -> dict[str, float]:
        """As a sample has them."""
        out: dict[str, float] = {
            "ready": self.ready,
            "first_tick": self.first_tick,
            "resident": self.resident,
            "bytes_at_first_tick": self.bytes_at_first_tick,
            "bytes": self.bytes,
            "longest_pause": self.longest_pause,
            "cpu": self.usage.cpu,
            "peak_rss": self.usage.peak_rss,
        }
        if self.status:
            reads, prefetch = self.status["reads"], self.status["prefetch"]
            out |= {name: reads[name] for name in ("memory_hits", "disk_hits", "misses", "wait_ms_p50", "wait_ms_p99")}
            out |= {"reads": reads["count"], "read_bytes": reads["bytes"]}
            out |= {"prefetched": prefetch["bytes"], "prefetched_used": prefetch["used_bytes"]}
            out["requests"] = self.status["network"]["requests"]
        return out


def status_of(mount: Mounted) -> dict[str, Any]:
    """What `ckptfs status` prints, asked for without starting a command."""
    answer: dict[str, Any] = ask(MountFiles.of(str(mount.path)), "status")
    return answer


def through_mount(lab: Lab, image: Image, shape: LinkShape, *options: str, lazy: bool) -> Restored:
    """`ckptfs mount`, then criu from the mounted directory, until every page is there."""
    with restoring(lab, image, shape, *options, lazy=lazy) as run:
        first = run.restored.first_tick(patience=300).at - run.began
        fetched = run.link.stats().bytes_down
        resident = run.restored.wait_resident(patience=300) - run.began if lazy else first
        time.sleep(0.1)  # a few more ticks: the pause that the last pages cause is one as well
        return Restored(
            ready=run.ready,
            first_tick=first,
            resident=resident,
            bytes_at_first_tick=fetched,
            bytes=run.link.stats().bytes_down,
            longest_pause=longest_pause(run.restored),
            status=status_of(run.mount),
            usage=usage(run.mount.pid),
        )


@dataclass(frozen=True, slots=True)
class Running:
    """A restore that has begun: its process may not have ticked yet."""

    began: float  # real-time clock
    ready: float  # seconds from `began` until `ckptfs mount` returned
    link: ShapedLink
    mount: Mounted
    restored: RestoredProcess
    watcher: Watcher | None = None  # the link's figures are its own until the end


@contextmanager
def restoring(
    lab: Lab, image: Image, shape: LinkShape, *options: str, lazy: bool, watched: bool = False
) -> Iterator[Running]:
    """The beginning of `through_mount`, for who wants to look at it while it happens, as `watched` does."""
    with ExitStack() as stack:
        room = stack.enter_context(lab.room())
        link = stack.enter_context(lab.link(shape))
        lab.cold(image.repository)
        watcher = stack.enter_context(Watcher(link, room / "mnt")) if watched else None
        began = time.time()
        mount = stack.enter_context(mounted(image.reference(link.address), room, *options))
        ready = time.time() - began
        images = mount.path / "checkpoint"
        restored = stack.enter_context(restore(image.checkpoint, room / "work", images=images, lazy=lazy))
        yield Running(began, ready, link, mount, restored, watcher)


def eagerly(lab: Lab, image: Image, shape: LinkShape) -> Restored:
    """skopeo copies the image, tar unpacks it, criu restores from the disk."""
    theirs = lab.conventional(image.repository)
    with lab.room() as room, lab.link(shape) as link:
        lab.cold(theirs)
        before = children_cpu()
        began = time.time()
        images = extract(f"{link.address}/{theirs}", room / "eager") / "checkpoint"
        ready = time.time() - began
        cpu = children_cpu() - before
        with restore(image.checkpoint, room / "work", images=images) as restored:
            first = restored.first_tick().at - began
            fetched = link.stats().bytes_down
            return Restored(ready, first, first, fetched, fetched, 0.0, {}, Usage(cpu, 0, 0))


def longest_pause(restored: RestoredProcess) -> float:
    """Seconds between two ticks, at most, since the first one after the restore."""
    role = next(iter(restored.checkpoint.pids))
    offset = len(restored.checkpoint.output_bytes)
    times = [line.at for line in restored.output.lines(role=role, what="tick", offset=offset)]
    return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


def read_all(directory: Path) -> tuple[float, int]:
    """Seconds and bytes of reading every file once, one after another."""
    began = time.time()
    count = replay(directory, [(whole_files(directory),)])
    return time.time() - began, count


def children_cpu() -> float:
    """CPU seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
