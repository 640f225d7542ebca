"""P5: bytes that came before the first tick with lazy pages, as a multiple of what criu had read by then.

criu reads in two processes. `criu restore` reads the metadata and the pages that are not lazy: that is known from the
images (criu/restore_plan.py). `criu lazy-pages` reads pages while the process starts: the kernel counts them, and what
the same program reads before there is a restore is taken off. The background fetch is off.
"""

import os
import statistics
from pathlib import Path

from bench.flows import LAZY, restoring, status_of
from bench.lab import SLOW, Image, Lab
from bench.rows import Row
from ckptfs.bench.reading import reading_of
from ckptfs.bench.results import Conditions
from tests.support.command import mounted
from tests.support.tools import end, start
from tests.support.workload import tree


def _measure(lab: Lab) -> None:
    ratios, bytes_fetched = {}, {}
    for megabytes in (lab.sizes[0], lab.sizes[-1]):
        image = lab.image(megabytes)
        with lab.room() as room, mounted(image.reference(lab.registry.host), room, "--no-background-fetch") as mount:
            by_restore = reading_of(mount.path, lazy=True).start_bytes
            by_start = _bytes_to_start(mount.path / "checkpoint", room)
        runs = [_run(lab, image, by_restore - by_start, number) for number in range(lab.runs)]
        found = [fetched / asked for fetched, asked in runs]
        ratios[megabytes] = statistics.median(found)
        name = f"bytes fetched before the first tick ÷ bytes criu read, {megabytes} MB"
        fetched, asked = (statistics.median(one) for one in zip(*runs, strict=True))
        bytes_fetched[megabytes] = fetched
        note = f"fetched {fetched / 1e6:.2f} MB, criu read {asked / 1e6:.2f} MB"
        lab.figure("P5", name, found, "×", limit=1.2, note=note, peer="eager", peer_value=image.compressed / asked)
    small, large = ratios.values()
    name = "the larger image's ratio ÷ the smaller's"
    lab.figure("P5", name, [max(large / small, small / large)], "×", limit=1.2)
    small, large = bytes_fetched.values()
    lab.figure("P5", "bytes fetched for the larger image ÷ for the smaller", [large / small], "×", limit=1.2)


def _run(lab: Lab, image: Image, other_reads: int, number: int) -> tuple[int, int]:
    """Bytes on the link, and bytes that criu has read, when the process ticks."""
    with restoring(lab, image, SLOW, "--no-background-fetch", lazy=True) as run:
        first = run.restored.first_tick().at - run.began
        asked = run.restored.bytes_read_by_lazy_daemon() + other_reads
        fetched = run.link.stats().bytes_down
        requests = status_of(run.mount)["network"]["requests"]
    conditions: Conditions = {**SLOW.conditions, "megabytes": image.megabytes, "background": "off"}
    values = {"first_tick": first, "bytes_at_first_tick": fetched, "bytes_criu_read": asked, "requests": requests}
    lab.sample("P5", LAZY, number, conditions, **values)
    return fetched, asked


def _bytes_to_start(images: Path, work: Path) -> int:
    """What `criu lazy-pages` reads until it is ready for a restore: its libraries, /proc, inventory and pstree."""
    ready, tell = os.pipe()
    daemon = start("criu", "lazy-pages", "-D", images, "-W", work, "--status-fd", str(tell), pass_fds=[tell])
    os.close(tell)
    try:
        with os.fdopen(ready, "rb") as status:
            status.read(1)
        return int(Path(f"/proc/{tree(daemon.pid)[-1]}/io").read_text().split()[1])
    finally:
        end(daemon)


ROW = Row("P5", "Bytes before the first tick", _measure, ("criu",))
