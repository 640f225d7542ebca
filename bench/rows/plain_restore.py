"""P3: from `ckptfs mount` to the first tick of a plain restore, as a multiple of what the link needs for the bytes."""

from statistics import median

from bench.flows import EAGER, PLAIN, eagerly, through_mount
from bench.lab import SLOW, Lab
from bench.rows import Row


def _measure(lab: Lab) -> None:
    image = lab.image()
    bound = image.compressed * 8 / SLOW.rate
    conditions = {**SLOW.conditions, "megabytes": image.megabytes}
    plain, eager = [], []
    for number in range(max(lab.few, 2)):
        found = through_mount(lab, image, SLOW, lazy=False)
        plain.append(found.first_tick / bound)
        lab.sample("P3", PLAIN, number, conditions, **found.values())
    for number in range(lab.few):
        found = eagerly(lab, image, SLOW)
        eager.append(found.first_tick / bound)
        lab.sample("P3", EAGER, number, conditions, **found.values())
    name = "plain restore: first tick ÷ (bytes ÷ bandwidth)"
    note = f"{image.compressed / 1e6:.1f} MB compressed: the link needs {bound:.2f} s"
    lab.figure("P3", name, plain, "×", limit=1.15, peer=EAGER, peer_value=median(eager), note=note)


ROW = Row("P3", "Plain restore", _measure, ("criu", "skopeo"))
