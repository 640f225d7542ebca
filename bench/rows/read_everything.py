"""P1: mount and read every file, cold, on loopback; beside `skopeo copy`, tar and the same reads, and `ckptfs pull`.

What tar unpacks is the same checkpoint as others push it: with zstd, which is fastest, and with gzip, podman's default.
"""

import time
from statistics import median

from bench.flows import children_cpu, read_all
from bench.lab import LOOPBACK, Image, Lab
from bench.rows import Row
from ckptfs.bench.machine import usage
from tests.support.command import ckptfs, mounted
from tests.support.images import extract

_MOUNT = "mount, read all"
_PULL = "skopeo, tar, read all"
_PULL_GZIP = "skopeo, tar, read all (gzip)"
_OWN_PULL = "ckptfs pull, read all"


def _measure(lab: Lab) -> None:
    image = lab.image(lab.large)
    ours = image.repository
    theirs, gzip = lab.conventional(ours), lab.conventional(ours, "gzip")
    mounts, pulls, gzip_pulls, own_pulls = [], [], [], []
    for number in range(max(lab.few, 3)):  # in turns: the machine's speed changes from minute to minute
        mounts.append(_mounting(lab, image, number))
        pulls.append(_pulling(lab, image, theirs, number, _PULL))
        gzip_pulls.append(_pulling(lab, image, gzip, number, _PULL_GZIP))
        own_pulls.append(_pulling(lab, image, ours, number, _OWN_PULL))
    note = f"{image.megabytes} MB in {median(mounts):.2f} s, the peer {median(pulls):.2f} s"
    name = "read everything through a cold mount ÷ pull, unpack, read"
    lab.figure("P1", name, _ratios(mounts, pulls), "×", limit=0.7, peer=_PULL, peer_value=1.0, note=note)
    note = f"the peer {median(gzip_pulls):.2f} s"
    lab.figure("P1", f"{name}, gzip", _ratios(mounts, gzip_pulls), "×", peer=_PULL_GZIP, peer_value=1.0, note=note)
    name = "ckptfs pull, read ÷ pull, unpack, read"
    lab.figure("P1", name, _ratios(own_pulls, pulls), "×", peer=_PULL, peer_value=1.0)


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def _mounting(lab: Lab, image: Image, number: int) -> float:
    with lab.room() as room:
        lab.cold(image.repository)
        began = time.time()
        with mounted(image.reference(lab.registry.host), room) as mount:
            _, count = read_all(mount.path)
            took, cpu = time.time() - began, usage(mount.pid).cpu
        assert count == image.plain, (count, image.plain)
    lab.sample("P1", _MOUNT, number, {"megabytes": image.megabytes}, seconds=took, cpu=cpu)
    return took


def _pulling(lab: Lab, image: Image, repository: str, number: int, flow: str) -> float:
    with lab.room() as room:
        lab.cold(repository)
        before, began = children_cpu(), time.time()
        reference = lab.registry.reference(repository)
        if flow == _OWN_PULL:
            done = ckptfs("pull", reference, room / "eager", "--quiet")
            if done.code:
                raise RuntimeError(done.err)
            read_all(room / "eager")
        else:
            read_all(extract(reference, room / "eager"))
        took = time.time() - began
    conditions = {**LOOPBACK.conditions, "megabytes": image.megabytes}
    lab.sample("P1", flow, number, conditions, seconds=took, cpu=children_cpu() - before)
    return took


ROW = Row("P1", "Read everything", _measure, ("criu", "skopeo"))
