"""The story of one restore: bytes that came, bytes that were read, the first tick, all pages there; lazy and eager.

No figure hangs on these runs: they are watched, which costs the mount a little.
"""

import time

from bench.flows import EAGER, LAZY, PLAIN, restoring
from bench.lab import SLOW, Lab
from bench.rows import Row
from ckptfs.bench.results import Series
from ckptfs.bench.watch import Watcher
from tests.support.criu import restore
from tests.support.images import extract


def _measure(lab: Lab) -> None:
    image = lab.image()
    conditions = {**SLOW.conditions, "megabytes": image.megabytes, "compressed": image.compressed}
    for flow, lazy in ((LAZY, True), (PLAIN, False)):
        with restoring(lab, image, SLOW, lazy=lazy, watched=True) as run:
            first = run.restored.first_tick().at - run.began
            resident = run.restored.wait_resident() - run.began if lazy else first
            time.sleep(0.3)
            assert run.watcher is not None
            points = run.watcher.points
        marks = {"mounted": run.ready, "first tick": first, "all pages there": resident}
        lab.add(Series("timeline", flow, conditions, Watcher.columns, points, marks))
    theirs = lab.conventional(image.repository)
    with lab.room() as room, lab.link(SLOW) as link:
        lab.cold(theirs)
        with Watcher(link) as watcher:
            began = time.time()
            images = extract(f"{link.address}/{theirs}", room / "eager") / "checkpoint"
            ready = time.time() - began
            with restore(image.checkpoint, room / "work", images=images) as restored:
                first = restored.first_tick().at - began
        marks = {"unpacked": ready, "first tick": first, "all pages there": first}
        lab.add(Series("timeline", EAGER, conditions, Watcher.columns, watcher.points, marks))


ROW = Row("timeline", "Timeline of a restore", _measure, ("criu", "skopeo"))
