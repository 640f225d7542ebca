"""The plan of a restore against real ones: what criu opens and reads, in which order.

Opens are seen by inotify on the image directory, reads in criu's own logs at -v4, which name each with its address.
strace would show more, but criu cannot attach to what is already traced.
"""

import ctypes
import os
import re
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from ckptfs.criu.images import parse_name
from ckptfs.criu.pagemap import parse_pagemap
from ckptfs.criu.restore_plan import PageRun, RestorePlan, plan_restore
from tests.support.criu import Checkpoint
from tests.support.tools import end, run, start, wait_for
from tests.support.workload import become_subreaper, kill_tree, reap

pytestmark = pytest.mark.restore

PAGE = 4096
IN_OPEN = 0x20
# "(00.061)   9720: pr9720-2 Read 401000 1 pages": task, image, address, pages; the daemon's log has no task
_READ = re.compile(r"^\([\d.]+\)\s+(?:(\d+):\s+)?pr(\d+)-\d+ Read ([0-9a-f]+) (\d+) pages", re.M)
_COPIED = re.compile(r"uffd: (\d+)-\d+: uffd_copy: 0x([0-9a-f]+)/(\d+)")
_PREADV = re.compile(r"pie: (\d+): Preadv (?:0x)?([0-9a-f]+):")
_RETURNED = re.compile(r"pie: (\d+): `- returned (\d+)")


class Opens:
    """Which files of a directory are opened, in order."""

    def __init__(self, directory: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self._fd, os.fsencode(directory), IN_OPEN) >= 0

    def names(self) -> list[str]:
        found: list[str] = []
        try:
            while True:
                data = os.read(self._fd, 1 << 16)
                while data:
                    (length,) = struct.unpack_from("I", data, 12)
                    if name := data[16 : 16 + length].rstrip(b"\0").decode():
                        found.append(name)
                    data = data[16 + length :]
        except BlockingIOError:
            return found

    def close(self) -> None:
        os.close(self._fd)


class Observed:
    """One restore: names opened by criu, and its logs."""

    def __init__(self, checkpoint: Checkpoint, work: Path, *, lazy: bool) -> None:
        become_subreaper()
        checkpoint.put_back()
        work.mkdir()
        daemon: subprocess.Popen[bytes] | None = None
        where = ("-D", checkpoint.images, "-W", work, "-v4")
        try:
            if lazy:
                daemon = start(
                    "timeout", "60", "criu", "lazy-pages", *where, "-o", "lazy.log", stderr=subprocess.DEVNULL
                )
                wait_for("criu lazy-pages", lambda: (work / "lazy-pages.socket").exists())
            opens = Opens(checkpoint.images)
            run("criu", "restore", "-d", *where, "-o", "restore.log", *(["--lazy-pages"] if lazy else []))
            self.opened = opens.names()
            opens.close()
            if daemon is not None:
                assert daemon.wait(60) == 0
        finally:
            kill_tree(next(iter(checkpoint.pids.values())))
            reap([next(iter(checkpoint.pids.values()))])
            if daemon is not None:
                end(daemon)
        self.log = (work / "restore.log").read_text(errors="replace")
        self.lazy_log = (work / "lazy.log").read_text(errors="replace") if lazy else ""

    def read_by(self, task: int) -> list[int]:
        """Addresses of the pages that a task read of its own images before it went into the restorer, in order."""
        found = (match.groups() for match in _READ.finditer(self.log))
        return pages((int(vaddr, 16), int(n)) for who, image, vaddr, n in found if who == image == str(task))


def pages(runs: Iterable[tuple[int, int]]) -> list[int]:
    return [vaddr + PAGE * n for vaddr, count in runs for n in range(count)]


def planned(checkpoint: Checkpoint, *, lazy: bool) -> RestorePlan:
    folder = checkpoint.images
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix != ".log"}
    plan = plan_restore(lambda name: (folder / name).read_bytes() if name in sizes else None, sizes, lazy=lazy)
    assert not plan.opaque
    return plan


def addresses(checkpoint: Checkpoint, runs: Iterable[PageRun]) -> list[int]:
    """The addresses of the pages of runs of one file, by the pagemap of their task: found the other way round."""
    out: list[int] = []
    for found in runs:
        name = f"pagemap-{found.task}.img"
        placed = list(parse_pagemap((checkpoint.images / name).read_bytes(), name).placed(PAGE))
        for offset in range(found.offset, found.offset + found.length, PAGE):
            place = next(p for p in placed if p.offset <= offset < p.offset + p.length)
            out.append(place.vaddr + offset - place.offset)
    return out


def of_stage(plan: RestorePlan, stage: str, task: int) -> list[PageRun]:
    return [r for s in plan.stages if s.name == stage for stream in s.streams for r in stream if r.task == task]


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
@pytest.mark.parametrize("which", ["single_checkpoint", "tree_checkpoint"])
def test_the_plan_is_what_criu_does(which: str, lazy: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(which)
    plan = planned(checkpoint, lazy=lazy)
    observed = Observed(checkpoint, tmp_path / "work", lazy=lazy)
    pids = list(checkpoint.pids.values())

    # metadata: the same names; in the same order until tasks run at the same time, and each task's own in order
    opened = list(dict.fromkeys(name for name in observed.opened if not name.startswith("pages-")))
    expected = [name for name in plan.metadata if not name.endswith(".log") and parse_name(name) is not None]
    assert set(opened) >= set(expected)
    forking = expected.index(f"pagemap-{pids[0]}.img") + 1
    assert opened[:forking] == expected[:forking]
    for pid in pids:
        mine = [f"mm-{pid}.img", f"fs-{pid}.img", f"pagemap-{pid}.img"]
        assert [name for name in opened if name in mine] == [name for name in expected if name in mine]

    # pages files are first opened in the order of the stages
    before_restore = [r.file for s in plan.stages if s.name in ("fork", "shared") for t in s.streams for r in t]
    first = [name for name in dict.fromkeys(observed.opened) if name.startswith("pages-")]
    assert set(before_restore) <= set(first)

    # what each task reads before it forks, page by page and in order
    for pid in pids:
        assert observed.read_by(pid) == addresses(checkpoint, of_stage(plan, "fork", pid))

    # shared memory: whole, by whoever comes first
    shared: dict[int, int] = defaultdict(int)
    for who, image, _, count in (match.groups() for match in _READ.finditer(observed.log)):
        if who != image:
            shared[int(image)] += int(count)
    in_plan = sum(r.length for s in plan.stages if s.name == "shared" for stream in s.streams for r in stream)
    assert sum(shared.values()) * PAGE == in_plan

    # the rest: one read per task from the first planned byte on, or the daemon's, each page once
    for pid in pids:
        later = of_stage(plan, "transfer" if lazy else "restore", pid)
        if not lazy:
            begun = [int(vaddr, 16) for who, vaddr in _PREADV.findall(observed.log) if int(who) == pid]
            assert begun[:1] == [r.vaddr for r in later[:1]]
            sizes = [int(size) for who, size in _RETURNED.findall(observed.log) if int(who) == pid]
            assert sum(sizes) == sum(r.length for r in later)
            continue
        mine = [found for found in _COPIED.findall(observed.lazy_log) if int(found[0]) == pid]
        copied = [(int(vaddr, 16), int(size) // PAGE) for _, vaddr, size in mine]
        assert sorted(pages(copied)) == sorted(addresses(checkpoint, later))
        background = [vaddr for vaddr, count in copied if count > 1]
        assert background == sorted(background)
