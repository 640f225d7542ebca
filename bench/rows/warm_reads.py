"""P7: what this node has already, read through the mount and through bindfs; and the second mount of a cached digest.

Three states of the kernel's caches: nothing cached (a node after a reboot), the cache's files cached (a new mount of a
digest in use), the same mount read again. bindfs shows an unpacked copy on the same disk.
"""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench.flows import read_all, status_of
from bench.lab import SLOW, Image, Lab
from bench.quiet import forget_files
from bench.rows import Row
from tests.support.command import Mounted, mounted
from tests.support.images import extract
from tests.support.tools import run

_STATES = ("after a reboot", "new mount", "same mount again")
_RANDOM_READS = 4000


def _measure(lab: Lab) -> None:
    image = lab.image()
    with lab.room() as room:
        cache = room / "cache"
        with mounted(image.reference(lab.registry.host), room / "first", cache=cache) as mount:
            read_all(mount.path)
            _until_complete(mount)
        copy = extract(image.reference(lab.registry.host), room / "eager")
        _second_mount(lab, image, room, cache)
        times: dict[tuple[str, str], list[float]] = {}
        for number in range(max(lab.few, 3)):
            for way in ("ckptfs", "bindfs"):
                for state, seconds in _reads(lab, image, room, cache, copy, way).items():
                    times.setdefault((way, state), []).append(seconds)
                    lab.sample("P7", way, number, {"megabytes": image.megabytes, "state": state}, seconds=seconds)
        for state in (*_STATES, "4 KiB at random"):
            theirs, ours = times["bindfs", state], times["ckptfs", state]
            ratios = [there / here for there, here in zip(theirs, ours, strict=True)]
            limit = None if state == "4 KiB at random" else 0.8
            speeds = [image.plain / 1e6 / median(way) for way in (ours, theirs)]
            waits = [median(way) / _RANDOM_READS * 1e6 for way in (ours, theirs)]
            note = "{:.0f} MB/s, bindfs {:.0f}".format(*speeds) if limit else "{:.0f} µs, bindfs {:.0f}".format(*waits)
            peer = {"peer": "bindfs", "peer_value": 1.0, "note": note}
            lab.figure("P7", f"warm reads ÷ bindfs, {state}", ratios, "×", limit=limit, least=True, **peer)


def _second_mount(lab: Lab, image: Image, room: Path, cache: Path) -> None:
    took, packets = [], []
    for number in range(lab.runs):
        with lab.link(SLOW) as link:
            began = time.time()
            with mounted(image.pinned(link.address), room / f"again-{number}", cache=cache) as mount:
                (mount.path / "checkpoint" / "inventory.img").read_bytes()
                took.append(time.time() - began)
                time.sleep(1.2)  # longer than the background waits
                packets.append(link.stats().connections)
        lab.sample("P7", "second mount", number, {}, seconds=took[-1], connections=packets[-1])
    lab.figure("P7", "second mount of a cached digest, until a file is read", took, "s", limit=0.250)
    lab.figure("P7", "connections that the second mount makes", [max(packets)], "", limit=0)


def _reads(lab: Lab, image: Image, room: Path, cache: Path, copy: Path, way: str) -> dict[str, float]:
    """Seconds of the same reads by state."""

    @contextmanager
    def shown() -> Iterator[Path]:
        if way == "ckptfs":
            with mounted(image.pinned(lab.registry.host), room / "warm", "--offline", cache=cache) as mount:
                yield mount.path
        else:
            with _bindfs(copy, room / "bound") as path:
                yield path

    found = {}
    forget_files()
    with shown() as path:
        found["after a reboot"], _ = read_all(path)
    with shown() as path:
        found["new mount"], _ = read_all(path)
        found["same mount again"], _ = read_all(path)
    with shown() as path:
        found["4 KiB at random"] = _at_random(path)
    return found


def _at_random(directory: Path) -> float:
    """Seconds of single pages anywhere in the largest pages file, without the kernel's read-ahead."""
    pages = max((directory / "checkpoint").glob("pages-*.img"), key=lambda path: path.stat().st_size)
    chance, size = random.Random(1), pages.stat().st_size
    offsets = [chance.randrange(size // 4096) * 4096 for _ in range(_RANDOM_READS)]
    descriptor = os.open(pages, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        began = time.time()
        for offset in offsets:
            os.pread(descriptor, 4096, offset)
        return time.time() - began
    finally:
        os.close(descriptor)


@contextmanager
def _bindfs(source: Path, target: Path) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    run("bindfs", "--no-allow-other", source, target)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


def _until_complete(mount: Mounted) -> None:
    deadline = time.monotonic() + 120
    while not status_of(mount)["complete"]:
        if time.monotonic() > deadline:
            raise TimeoutError("the image is not complete after two minutes")
        time.sleep(0.1)


ROW = Row("P7", "Warm reads", _measure, ("criu", "skopeo", "bindfs"))
