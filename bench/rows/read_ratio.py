"""P5: bytes that came before the first tick with lazy pages, as a multiple of what criu had read by then.

What criu reads is counted in a run of its own, on a mount with the kernel's read-ahead switched off: there each read
that reaches the mount is one that criu asked for. The background fetch is off in all of them.
"""

import os
import statistics
from pathlib import Path

from bench.flows import LAZY, restoring, status_of
from bench.lab import SLOW, Image, Lab
from bench.rows import Row
from ckptfs.bench.results import Conditions
from tests.support.command import mounted
from tests.support.criu import restore


def _measure(lab: Lab) -> None:
    ratios = {}
    for megabytes in (lab.sizes[0], lab.sizes[-1]):
        image = lab.image(megabytes)
        asked = _bytes_that_criu_reads(lab, image)
        found = [_bytes_fetched(lab, image, number) / asked for number in range(max(lab.few, 2))]
        ratios[megabytes] = statistics.median(found)
        name = f"bytes fetched before the first tick ÷ bytes criu read, {megabytes} MB"
        note = f"criu read {asked / 1e6:.2f} MB"
        peer = {"peer": "eager", "peer_value": image.compressed / asked}
        lab.figure("P5", name, found, "×", limit=1.2, note=note, **peer)
    small, large = ratios.values()
    lab.figure("P5", "the largest image's ratio ÷ the smallest's", [large / small], "×", limit=1.2)


def _bytes_that_criu_reads(lab: Lab, image: Image) -> float:
    counts: list[float] = []
    for number in range(3):
        with lab.room() as room, mounted(image.reference(lab.registry.host), room, "--no-background-fetch") as mount:
            device = os.stat(mount.path).st_dev
            ahead = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
            ahead.write_text("0")
            images = mount.path / "checkpoint"
            with restore(image.checkpoint, room / "work", images=images, lazy=True) as restored:
                restored.first_tick()
                counts.append(status_of(mount)["reads"]["bytes"])
        lab.sample("P5", "criu's own reads", number, {"megabytes": image.megabytes}, read_bytes=counts[-1])
    return statistics.median(counts)


def _bytes_fetched(lab: Lab, image: Image, number: int) -> int:
    """On the link, when the process ticks."""
    with restoring(lab, image, SLOW, "--no-background-fetch", lazy=True) as run:
        first = run.restored.first_tick().at - run.began
        fetched = run.link.stats().bytes_down
        requests = status_of(run.mount)["network"]["requests"]
    conditions: Conditions = {**SLOW.conditions, "megabytes": image.megabytes, "background": "off"}
    lab.sample("P5", LAZY, number, conditions, first_tick=first, bytes_at_first_tick=fetched, requests=requests)
    return fetched


ROW = Row("P5", "Bytes before the first tick", _measure, ("criu",))
