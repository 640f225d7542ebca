"""Incremental checkpoints: criu follows `parent` out of a mount, whatever the directories were called.

This kernel has no soft-dirty tracking, so criu makes no pre-dumps here: a real dump is split in two, half of its memory
in the parent, as `criu pre-dump` and `criu dump --prev-images-dir` would have left it.
"""

import os
import shutil
from pathlib import Path

import pytest

from ckptfs.criu.pagemap import PARENT, PRESENT, parse_pagemap
from tests.support.command import ckptfs, mounted
from tests.support.criu import Checkpoint, restore
from tests.support.criu_images import pagemap
from tests.support.docker_registry import DockerRegistry
from tests.support.restored import restored
from tests.support.tools import run, wait_for
from tests.support.workload import kill_tree

pytestmark = [pytest.mark.restore, pytest.mark.fuse]

_PAGE = 4096


@pytest.fixture(scope="module")
def increments(single_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dumps/1, and dumps/2 whose parent that is."""
    top = tmp_path_factory.mktemp("increments")
    parent, child = top / "dumps" / "1", top / "dumps" / "2"
    shutil.copytree(single_checkpoint.images, child)
    parent.mkdir(mode=0o700)
    shutil.copy(child / "inventory.img", parent)
    (name,) = (path.name for path in child.glob("pagemap-[0-9]*.img"))
    found = parse_pagemap((child / name).read_bytes(), name)
    data = (child / found.file).read_bytes()
    kept, moved = [], []
    pages = {parent: bytearray(), child: bytearray()}
    at = 0
    for run_ in found.runs:
        assert run_.flags & PRESENT
        piece = data[at : at + run_.pages * _PAGE]
        at += len(piece)
        half = run_.pages // 2
        ends = run_.vaddr + half * _PAGE
        if half:
            moved.append((run_.vaddr, half, PRESENT))
            kept.append((run_.vaddr, half, PARENT))
            pages[parent] += piece[: half * _PAGE]
        kept.append((ends, run_.pages - half, run_.flags))
        pages[child] += piece[half * _PAGE :]
    for directory, runs in ((parent, moved), (child, kept)):
        (directory / name).write_bytes(pagemap(found.pages_id, *runs))
        (directory / found.file).write_bytes(pages[directory])
    (child / "parent").symlink_to("../1")
    return top


@pytest.mark.parametrize("way", ["archive", "pushed"])
def test_criu_restores_from_both(
    way: str, increments: Path, single_checkpoint: Checkpoint, registry: DockerRegistry, tmp_path: Path
) -> None:
    if way == "archive":
        run("tar", "--create", "--file", tmp_path / "dumps.tar", "--directory", increments, "dumps")
        reference = f"archive:{tmp_path}/dumps.tar"
    else:
        reference = registry.reference("restore/increments:2")
        assert ckptfs("push", increments, reference).code == 0
    with mounted(reference, tmp_path) as mount:
        images = os.open(mount.path / "checkpoint", os.O_RDONLY | os.O_DIRECTORY)
        try:  # as criu does it (criu/image.c: open_parent)
            assert os.readlink("parent", dir_fd=images) == "../1"
            parent = os.open("parent", os.O_RDONLY, dir_fd=images)
        finally:
            os.close(images)
        try:
            assert sorted(os.listdir(parent)) == sorted(os.listdir(increments / "dumps" / "1"))
        finally:
            os.close(parent)
        with restore(single_checkpoint, tmp_path / "work", images=mount.path / "checkpoint") as restored:
            restored.assert_continues()
        assert mount.status()["errors"] == []


def test_one_without_the_checkpoint_before_is_refused(
    increments: Path, single_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """podman exports each of a chain by itself: nobody could restore from the last one alone, both together are one."""
    chain, both, cache = tmp_path / "chain", tmp_path / "both", ("--cache-dir", tmp_path / "cache")
    both.mkdir()
    for number, name in (("1", "pre-checkpoint"), ("2", "checkpoint")):
        shutil.copytree(increments / "dumps" / number, chain / name, symlinks=True)
    (chain / "checkpoint/parent").unlink()
    (chain / "checkpoint/parent").symlink_to("../pre-checkpoint")
    for name in ("pre-checkpoint", "checkpoint"):
        run("tar", "--create", "--file", tmp_path / f"{name}.tar", "--directory", chain, name)
        run("tar", "--extract", "--file", tmp_path / f"{name}.tar", "--directory", both)
    alone = tmp_path / "checkpoint.tar"
    pushed = ckptfs("push", alone, f"oci:{tmp_path}/layout:alone")
    assert pushed.code == 7 and "memory is in the checkpoint before, '../pre-checkpoint'" in pushed.line
    for command in ("check", "restore"):
        done = ckptfs(command, f"archive:{alone}", *cache)
        assert done.code == 7 and "the image has no checkpoint/parent" in done.out + done.err
    reference = f"oci:{tmp_path}/layout:both"
    assert ckptfs("push", both, reference).code == 0
    single_checkpoint.put_back()
    offset = len(single_checkpoint.output_bytes)
    with restored(tmp_path, reference) as container:
        ticks = wait_for("a tick", lambda: single_checkpoint.output.lines(what="tick", offset=offset))
        assert ticks[0].number == single_checkpoint.last_tick("ticker") + 1
    kill_tree(container.pid)
