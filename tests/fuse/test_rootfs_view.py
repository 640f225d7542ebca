"""The root file system view of checkpoints whose delta lacks something."""

import os
import tarfile
from pathlib import Path

import pytest

from tests.support.command import mounted
from tests.support.push import push_to_layout
from tests.support.trees import layout_of

pytestmark = pytest.mark.fuse


def test_nothing_was_deleted(tmp_path: Path) -> None:
    """Without deleted.files the view is complete all the same; asking for it must not wait for the view itself."""
    source = tmp_path / "checkpoint-of"
    (source / "checkpoint").mkdir(parents=True)
    (source / "checkpoint" / "inventory.img").write_bytes(b"\x16\x31\x31\x58")
    (source / "added").write_text("new\n")
    with tarfile.open(source / "rootfs-diff.tar", "w") as delta:
        delta.add(source / "added", "data/added")
    (source / "added").unlink()
    push_to_layout(source, tmp_path / "checkpoint", "ck")
    (tmp_path / "kept").write_text("old\n")
    with tarfile.open(tmp_path / "base.tar", "w") as base:
        base.add(tmp_path / "kept", "data/kept")
    layout = layout_of((tmp_path / "base.tar").read_bytes(), tmp_path / "base")
    with mounted(f"oci:{tmp_path}/checkpoint:ck", tmp_path, "--view", "rootfs", "--base", f"oci:{layout}") as mount:
        assert sorted(os.listdir(mount.path / "data")) == ["added", "kept"]
