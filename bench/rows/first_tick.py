"""P2: from `ckptfs mount` to the first tick of the process, with lazy pages; beside pulling, unpacking, restoring."""

from statistics import median

from bench.flows import EAGER, LAZY, eagerly, through_mount
from bench.lab import SLOW, Image, Lab
from bench.rows import Row


def _measure(lab: Lab) -> None:
    image = lab.image()
    lazy = restore_samples(lab, "P2", image, lab.runs)
    eager = []
    for number in range(lab.few):
        found = eagerly(lab, image, SLOW)
        eager.append(found.first_tick)
        lab.sample("P2", EAGER, number, {**SLOW.conditions, "megabytes": image.megabytes}, **found.values())
    pulled = median(eager)
    first = lab.figure("P2", "mount to first tick, lazy pages", lazy, "s", limit=0.350, peer=EAGER, peer_value=pulled)
    share = [pulled / first.value]
    lab.figure("P2", "times sooner than the eager flow", share, "×", limit=15, least=True, peer=EAGER, peer_value=1.0)


def restore_samples(lab: Lab, row: str, image: Image, runs: int) -> list[float]:
    """Seconds to the first tick with lazy pages, of each run."""
    ticks = []
    for number in range(runs):
        found = through_mount(lab, image, SLOW, lazy=True)
        ticks.append(found.first_tick)
        lab.sample(row, LAZY, number, {**SLOW.conditions, "megabytes": image.megabytes}, **found.values())
    return ticks


ROW = Row("P2", "First tick with lazy pages", _measure, ("criu", "skopeo"))
