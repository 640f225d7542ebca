"""Row F4: twenty processes restored out of a directory and out of a mount: the same memory, mapped the same way."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import mounted
from tests.support.criu import Checkpoint, RestoredProcess, dump, require_criu, restore
from tests.support.push import push_to_layout
from tests.support.tools import require, run
from tests.support.workload import Workload, process_tree, ticker

pytestmark = [pytest.mark.restore, pytest.mark.fuse]

Figure = Callable[[str, object], None]

# Sizes from one page table to several chunks; reading, writing, and at rest; alone and three with shared memory.
WORKLOADS: dict[str, Callable[[Path], Workload]] = {
    **{f"{size} MB": lambda folder, size=size: ticker(folder, size) for size in (1, 2, 3, 7, 16, 33, 48)},  # type: ignore[misc]
    **{f"{size} MB, read": lambda folder, size=size: ticker(folder, size, touch=50) for size in (1, 4, 9, 24)},  # type: ignore[misc]
    **{f"{size} MB, written": lambda folder, size=size: ticker(folder, size, dirty=0) for size in (2, 8, 32)},  # type: ignore[misc]
    **{f"{size} MB, a set": lambda folder, size=size: ticker(folder, size, set=100) for size in (5, 20)},  # type: ignore[misc]
    **{f"tree of {size} MB": lambda folder, size=size: process_tree(folder, size) for size in (1, 4, 8, 16)},  # type: ignore[misc]
}


@pytest.fixture
def _tools() -> None:
    require_criu()
    require("fusermount3")


@pytest.mark.row("F4")
@pytest.mark.usefixtures("_tools")
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_restore_out_of_a_mount_is_that_out_of_a_directory(
    name: str, scratch_folder: Path, tmp_path: Path, record_property: Figure
) -> None:
    number = list(WORKLOADS).index(name)
    folder = scratch_folder / f"workload-{number}"
    folder.mkdir()
    with WORKLOADS[name](folder) as workload:
        checkpoint = dump(workload, folder / "checkpoint")
    reference = image_of(checkpoint, tmp_path, pushed=number % 2 == 0)
    expected = seen(restore(checkpoint, tmp_path / "plain"))
    with mounted(reference, tmp_path) as mount:
        images = mount.path / "checkpoint"
        for lazy in (False, True):
            found = seen(restore(checkpoint, tmp_path / f"mounted-{lazy}", images=images, lazy=lazy))
            assert found == expected, lazy
        assert mount.status()["errors"] == []
    if number == len(WORKLOADS) - 1:
        record_property(
            "figure", f"{len(WORKLOADS)} workloads, plain and lazy: maps and memory are those of a directory"
        )


def image_of(checkpoint: Checkpoint, folder: Path, *, pushed: bool) -> str:
    """As `ckptfs push` writes it, or as the tar that engines write."""
    tar = folder / "checkpoint.tar.gz"
    run("tar", "--create", "--gzip", "--file", tar, "--directory", checkpoint.images.parent, "checkpoint")
    if not pushed:
        return f"archive:{tar}"
    push_to_layout(checkpoint.images.parent, folder / "layout")
    return f"oci:{folder / 'layout'}"


def seen(process: RestoredProcess) -> tuple[dict[str, int], dict[str, list[str]]]:
    """What each role's memory hashes to, and its mappings."""
    with process as restored:
        restored.assert_continues()
        restored.wait_resident()
        return restored.hashes(), {role: mappings(pid) for role, pid in restored.checkpoint.pids.items()}


def mappings(pid: int) -> list[str]:
    """Without inode numbers: those of shared anonymous memory are new in each restore."""
    return [re.sub(r"(:\w\w) \d+ ", r"\1 ", line) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
