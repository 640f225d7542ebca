"""P4: how much of the link a front-to-back read of a pages file uses at 200 ms round-trip time."""

import time
from statistics import median

from bench.lab import Image, Lab, LinkShape
from bench.rows import Row
from tests.support.command import mounted
from tests.support.tools import run

_LONG = LinkShape(0.200, 200e6)


def _measure(lab: Lab) -> None:
    image = lab.image()
    ours = [_reading(lab, image, number) for number in range(max(lab.few, 2))]
    skopeo = [_copying(lab, image, number) for number in range(lab.few)]
    name = "share of the link that reading pages uses at 200 ms"
    lab.figure("P4", name, ours, "%", limit=85, least=True, peer="skopeo copy", peer_value=median(skopeo))


def _reading(lab: Lab, image: Image, number: int) -> float:
    with lab.room() as room, lab.link(_LONG) as link:
        lab.cold(image.repository)
        with mounted(image.reference(link.address), room, "--no-background-fetch") as mount:
            pages = max((mount.path / "checkpoint").glob("pages-*.img"), key=lambda path: path.stat().st_size)
            before, began = link.stats().bytes_down, time.time()
            with open(pages, "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
            took = time.time() - began
            share = (link.stats().bytes_down - before) * 8 / _LONG.rate / took * 100
    lab.sample("P4", "ckptfs", number, {**_LONG.conditions, "megabytes": image.megabytes}, percent=share, seconds=took)
    return share


def _copying(lab: Lab, image: Image, number: int) -> float:
    with lab.room() as room, lab.link(_LONG) as link:
        lab.cold(image.repository)
        began = time.time()
        source = f"docker://{image.reference(link.address)}"
        run("skopeo", "copy", "--quiet", "--src-tls-verify=false", source, f"dir:{room}/copy", timeout=300)
        took = time.time() - began
        share = link.stats().bytes_down * 8 / _LONG.rate / took * 100
    conditions = {**_LONG.conditions, "megabytes": image.megabytes}
    lab.sample("P4", "skopeo copy", number, conditions, percent=share, seconds=took)
    return share


ROW = Row("P4", "Use of a link with a long delay", _measure, ("criu", "skopeo"))
