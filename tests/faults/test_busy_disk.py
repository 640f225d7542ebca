"""The cache's disk hangs while it writes: readers notice nothing, and the mount ends all the same."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tests.support.command import ckptfs
from tests.support.fake_registry import FakeRegistry
from tests.support.hanging import foreground, pages
from tests.support.tools import require, wait_for

pytestmark = pytest.mark.fuse

PAGE = 4096


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fusermount3")


class BusyDisk:
    """Of a mount; busy from `begin` on."""

    def __init__(self, busy: Path) -> None:
        self._busy = busy

    def begin(self) -> None:
        self._busy.touch()

    def hangs(self) -> bool:
        return self._busy.with_name("busy.hung").exists()

    def end(self) -> None:
        self._busy.unlink(missing_ok=True)


@contextmanager
def busy_mount(registry: FakeRegistry, folder: Path, *options: str) -> Iterator[tuple[Path, BusyDisk]]:
    disk = BusyDisk(folder / "busy")
    module = ("tests.support.busy_disk", str(folder / "busy"))
    with foreground(folder, registry.reference("repo:latest"), *options, module=module) as (mnt, process):
        try:
            yield mnt, disk
            assert ckptfs("umount", mnt).code == 0
            assert process.wait(10) == 0
        finally:
            disk.end()


def slowest(mnt: Path, count: int) -> float:
    """Of so many reads of single pages anywhere, every one of them right."""
    random, worst = Random(7), 0.0
    with (mnt / "checkpoint/pages-1.img").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for _ in range(count):
            at = random.randrange(len(pages()) // PAGE) * PAGE
            began = time.monotonic()
            assert os.pread(file.fileno(), PAGE, at) == pages()[at : at + PAGE]
            worst = max(worst, time.monotonic() - began)
    return worst


@pytest.mark.parametrize("background", [True, False])
def test_readers_do_not_wait_for_the_disk(hanging: FakeRegistry, tmp_path: Path, background: bool) -> None:
    """Two hundred reads, where forty requests are under way at most."""
    options = () if background else ("--prefetch=none", "--no-background-fetch")
    with busy_mount(hanging, tmp_path, *options) as (mnt, disk):
        disk.begin()
        assert slowest(mnt, 200) < 2
        wait_for("a write hangs", disk.hangs)
        assert ckptfs("status", mnt).code == 0
        disk.end()
        assert (mnt / "checkpoint/pages-1.img").read_bytes() == pages()
    hanging.log.clear()
    with foreground(tmp_path, hanging.reference("repo:latest"), "--prefetch=none", "--no-background-fetch") as (mnt, _):
        assert (mnt / "checkpoint/pages-1.img").read_bytes() == pages()
    asked = [access for access in hanging.log if "/blobs/" in access.path and access.range is not None]
    assert not asked, "everything has been kept"


def test_a_mount_ends_while_the_disk_hangs(hanging: FakeRegistry, tmp_path: Path) -> None:
    with busy_mount(hanging, tmp_path) as (mnt, disk):
        disk.begin()
        assert slowest(mnt, 20) < 2
        wait_for("a write hangs", disk.hangs)
