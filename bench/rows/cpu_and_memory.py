"""P8: CPU of the daemon for each GB restored cold, and its memory with the largest image; beside skopeo and tar."""

from statistics import median

from bench.flows import EAGER, PLAIN, eagerly, through_mount
from bench.lab import LOOPBACK, Lab
from bench.rows import Row


def _measure(lab: Lab) -> None:
    image, largest = lab.image(lab.large), lab.image(lab.sizes[-1])
    gigabytes = image.plain / 1e9
    conditions = {**LOOPBACK.conditions, "megabytes": image.megabytes}
    ours, theirs = [], []
    for number in range(max(lab.few, 2)):
        found = through_mount(lab, image, LOOPBACK, lazy=False)
        ours.append(found.usage.cpu / gigabytes)
        lab.sample("P8", PLAIN, number, conditions, **found.values())
        eager = eagerly(lab, image, LOOPBACK)
        theirs.append(eager.usage.cpu / gigabytes)
        lab.sample("P8", EAGER, number, conditions, **eager.values())
    both = {"limit": 1.8, "peer": "skopeo and tar", "peer_value": median(theirs)}
    lab.figure("P8", f"CPU for each GB restored cold, {image.megabytes} MB", ours, "s/GB", **both)
    found = through_mount(lab, largest, LOOPBACK, lazy=False)
    lab.sample("P8", PLAIN, 0, {**conditions, "megabytes": largest.megabytes}, **found.values())
    most = [found.usage.peak_rss / 1e6]
    lab.figure("P8", f"most memory of the daemon, image of {largest.megabytes} MB", most, "MB", limit=200)


ROW = Row("P8", "CPU and memory", _measure, ("criu", "skopeo"))
