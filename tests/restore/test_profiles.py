"""The working set of a real restore: recorded by `ckptfs profile record`, pushed, fetched first by the next mount."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptfs.bench.link import ShapedLink
from tests.support.command import ckptfs, mounted
from tests.support.criu import Checkpoint, RestoredProcess, restore
from tests.support.docker_registry import DockerRegistry
from tests.support.tools import wait_for

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]


def touch(restored: RestoredProcess) -> float:
    """Has the process read its 200 scattered pages; seconds from asking to the end."""
    role, pid = next(iter(restored.checkpoint.pids.items()))
    offset, began = restored.output.size(), restored.first_tick().at
    os.kill(pid, signal.SIGUSR2)
    said = wait_for("it", lambda: restored.output.lines(role=role, what="touched", offset=offset), patience=60)
    return said[0].at - began


def record(reference: str, checkpoint: Checkpoint, folder: Path) -> Path:
    """The profile of a restore beside a `ckptfs profile record` whose command only waits."""
    folder.mkdir()
    profile, ready, over = folder / "profile.json", folder / "ready", folder / "over"
    wait = f'echo "$CKPTFS_MOUNT" > {ready}; while [ ! -e {over} ]; do sleep 0.02; done'
    command = [sys.executable, "-m", "ckptfs", "profile", "record", reference, "--out", profile, "-q"]
    command += ["--cache-dir", folder / "cache", "--", "sh", "-c", wait]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as recording:
        try:
            wait_for("the mount", lambda: ready.exists() and ready.read_text().endswith("\n"))
            images = Path(ready.read_text().strip()) / "checkpoint"
            with restore(checkpoint, folder / "work", images=images, lazy=True) as restored:
                touch(restored)
        finally:
            over.touch()
    assert recording.returncode == 0
    return profile


@pytest.mark.alone  # counts what criu reads before its first tick
def test_a_recorded_working_set_is_there_when_it_is_needed(
    single_checkpoint: Checkpoint, registry: DockerRegistry, tmp_path: Path
) -> None:
    name = "profiles/single:1"
    reference = registry.reference(name)
    assert ckptfs("push", single_checkpoint.images, reference).code == 0
    profile = record(reference, single_checkpoint, tmp_path / "record")
    shown = ckptfs("profile", "show", profile, "--json").json
    pages = next(file for file in shown["files"] if file["path"] == "checkpoint/pages-1.img")
    size = (single_checkpoint.images / "pages-1.img").stat().st_size
    assert pages["runs"] > 80 and pages["bytes"] < 0.1 * size, "the faults, and not what the daemon transferred"

    def restored_over_the_link(kind: str) -> tuple[int, int]:
        """Reads of pages that had to wait, and bytes on the link, until the working set has been read."""
        with (
            ShapedLink(registry.host) as link,
            mounted(f"{link.address}/{name}", tmp_path / kind, "--no-background-fetch") as mount,
            restore(single_checkpoint, tmp_path / kind / "work", images=mount.path / "checkpoint", lazy=True) as one,
        ):
            touch(one)
            misses, fetched = mount.status()["reads"]["misses"], link.stats().bytes_down
            assert (mount.status()["profile"] is not None) == (kind == "recorded")
            one.assert_continues()
            one.wait_resident()
            assert mount.status()["errors"] == []
        return misses, fetched

    cold = restored_over_the_link("cold")
    assert ckptfs("profile", "push", profile, reference).code == 0
    recorded = restored_over_the_link("recorded")
    assert recorded[0] < cold[0] / 2 and recorded[1] < cold[1] / 2
