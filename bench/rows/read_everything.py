"""P1: mount and read every file, cold, on loopback; beside `skopeo copy`, tar and the same reads, and `ckptfs pull`."""

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
_OWN_PULL = "ckptfs pull, read all"


def _measure(lab: Lab) -> None:
    image = lab.image(lab.large)
    mounts, pulls, own_pulls = [], [], []
    for number in range(max(lab.few, 3)):  # in turns: the machine's speed changes from minute to minute
        mounts.append(_mounting(lab, image, number))
        pulls.append(_pulling(lab, image, number, _PULL))
        own_pulls.append(_pulling(lab, image, number, _OWN_PULL))
    ratios = [mount / pull for mount, pull in zip(mounts, pulls, strict=True)]
    note = f"{image.megabytes} MB in {median(mounts):.2f} s, the peer {median(pulls):.2f} s"
    name = "read everything through a cold mount ÷ pull, unpack, read"
    lab.figure("P1", name, ratios, "×", limit=0.7, peer=_PULL, peer_value=1.0, note=note)
    ratios = [own / pull for own, pull in zip(own_pulls, pulls, strict=True)]
    lab.figure("P1", "ckptfs pull, read ÷ pull, unpack, read", ratios, "×", peer=_PULL, peer_value=1.0)


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


def _pulling(lab: Lab, image: Image, number: int, flow: str) -> float:
    with lab.room() as room:
        lab.cold(image.repository)
        before, began = children_cpu(), time.time()
        reference = image.reference(lab.registry.host)
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
