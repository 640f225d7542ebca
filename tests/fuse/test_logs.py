"""What a mount's daemon says: there while it lives and after a crash, gone when it has ended well."""

import os
import signal
import time
from pathlib import Path

import pytest

from ckptfs.control.client import MountFiles
from ckptfs.settings import Settings
from tests.support.command import ckptfs, mounted
from tests.support.tools import ROOT, wait_for

pytestmark = pytest.mark.fuse

REFERENCE = f"oci:{ROOT}/tests/data/corpus/counter/k8s-zstdchunked.oci"


def test_a_log_ends_with_its_mount(tmp_path: Path) -> None:
    with mounted(REFERENCE, tmp_path, "-v") as mount:
        log = MountFiles.of(str(mount.path)).log
        assert "is mounted on" in log.read_text()
    assert not log.exists()


def test_after_a_crash_it_stays_for_a_week(tmp_path: Path) -> None:
    with mounted(REFERENCE, tmp_path, "-v") as mount:
        log = MountFiles.of(str(mount.path)).log
        os.kill(mount.pid, signal.SIGKILL)
        wait_for("the end of the daemon", lambda: not Path(f"/proc/{mount.pid}/root/proc").exists())
    assert "is mounted on" in log.read_text()
    try:
        age = Settings().timeouts.old_log
        for seconds, kept in ((age - 3600, True), (age + 60, False)):
            os.utime(log, (time.time() - seconds,) * 2)
            with mounted(REFERENCE, tmp_path / "other"):
                assert log.exists() == kept
    finally:
        log.unlink(missing_ok=True)


def test_the_log_of_a_long_mount_is_not_old(tmp_path: Path) -> None:
    with mounted(REFERENCE, tmp_path, "-v") as mount:
        log = MountFiles.of(str(mount.path)).log
        os.utime(log, (1, 1))
        assert ckptfs("mount", "oci:/no/where", tmp_path / "mnt2", "--cache-dir", tmp_path / "cache").code != 0
        with mounted(REFERENCE, tmp_path / "other"):
            assert log.exists()
