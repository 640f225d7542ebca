"""The daemon at rest: CPU and memory after a restore whose pages have all come, with nobody reading."""

import time

from bench.flows import restoring
from bench.lab import LOOPBACK, Lab
from bench.rows import Row
from ckptfs.bench.machine import usage

_SECONDS = 15


def _measure(lab: Lab) -> None:
    image = lab.image()
    with restoring(lab, image, LOOPBACK, lazy=False) as run:
        run.restored.first_tick()
        time.sleep(5)  # settings: what was left to fetch in the background has come
        before = usage(run.mount.pid)
        time.sleep(_SECONDS)
        after = usage(run.mount.pid)
    percent = (after.cpu - before.cpu) / _SECONDS * 100
    lab.sample("rest", "daemon", 0, {"megabytes": image.megabytes}, percent=percent, rss=after.rss)
    lab.figure("rest", "CPU of the daemon at rest", [percent], "%", limit=1.0)
    lab.figure("rest", "memory of the daemon at rest", [after.rss / 1e6], "MB", limit=60.0)


ROW = Row("rest", "The daemon at rest", _measure, ("criu",))
