"""The longest pause between two ticks of a process that touches a page at random every 10 ms while its memory arrives.

The peer restores with lazy pages from an unpacked copy on this machine: what CRIU's own page faults cost.
"""

from pathlib import Path
from statistics import median

from bench.flows import LAZY, Restored, longest_pause, through_mount
from bench.lab import SLOW, Lab
from bench.rows import Row
from tests.support.criu import Checkpoint, restore
from tests.support.images import extract


def _measure(lab: Lab) -> None:
    image = lab.image(workload="toucher")
    conditions = {**SLOW.conditions, "megabytes": image.megabytes, "touched per tick": 1}
    found: list[Restored] = []
    for number in range(lab.runs):
        found.append(through_mount(lab, image, SLOW, lazy=True))
        lab.sample("pauses", LAZY, number, conditions, **found[-1].values())
    local = []
    with lab.room() as room:
        images = extract(image.reference(lab.registry.host), room / "eager") / "checkpoint"
        for number in range(lab.runs):
            local.append(_locally(image.checkpoint, images, room / f"work-{number}"))
            lab.sample("pauses", "criu, local images", number, conditions, longest_pause=local[-1])
    pauses = [run.longest_pause for run in found]
    peer = {"peer": "local images", "peer_value": median(local)}
    lab.figure("pauses", "longest pause between two ticks, lazy pages", pauses, "s", limit=0.150, **peer)
    waits = [run.status["reads"]["wait_ms_p99"] / 1000 for run in found]
    lab.figure("pauses", "p99 of a read that waits for the network", waits, "s")


def _locally(checkpoint: Checkpoint, images: Path, work: Path) -> float:
    with restore(checkpoint, work, images=images, lazy=True) as restored:
        restored.wait_resident()
        restored.output.next("tick", role="ticker")
        return longest_pause(restored)


ROW = Row("pauses", "Pauses of a running process", _measure, ("criu", "skopeo"))
