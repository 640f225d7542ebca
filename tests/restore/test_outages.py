"""What a restore makes of an image that cannot be read: never one without the files that nobody could look for."""

import gzip
import random
from pathlib import Path

import pytest

from ckptfs.bench.link import ShapedLink
from ckptfs.errors import UnavailableError
from ckptfs.inspection.source import LocalFiles
from ckptfs.model.oci import Digest
from tests.support import runc
from tests.support.blobs import TAR
from tests.support.command import ckptfs, mounted
from tests.support.criu import require_criu
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import FakeRegistry, Status, Truncate
from tests.support.restored import assert_nothing_left, start
from tests.support.tars import END, member
from tests.support.tools import require, wait_for

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]

IMAGE = b"checkpoint/inventory.img"
LARGE = random.Random(1).randbytes(4 << 20)


def test_what_a_mount_cannot_read_is_not_absent(tmp_path: Path) -> None:
    """The stream ends in the middle of the second file, and is not to be had again."""
    tar = member(IMAGE, b"x") + member(b"large", LARGE) + member(b"spec.dump", b"{}") + END
    with FakeRegistry({("/blobs/", 1): Truncate(1 << 20), ("/blobs/", None): Status(503)}) as registry:
        registry.add_image("repo", "latest", [(f"{TAR}+gzip", gzip.compress(tar, 1))])
        words = ("--view", "raw", "--read-deadline", "1")
        with mounted(registry.reference("repo:latest"), tmp_path, *words) as mount:
            files = LocalFiles(mount.path)
            assert files.size(IMAGE.decode()) == 1
            with pytest.raises(UnavailableError, match=r"spec\.dump cannot be read"):
                files.size("spec.dump")
            with pytest.raises(UnavailableError, match="large cannot be read"):
                files.read("large", 0, 4 << 20)
            with pytest.raises(UnavailableError, match="the checkpoint cannot be read"):
                files.list("")


def test_a_restore_says_that_it_cannot_read(tmp_path: Path) -> None:
    """It is not told to be an image without a checkpoint, nor taken for one of processes without a container."""
    tar = member(IMAGE, b"x") + member(b"large", LARGE) + member(b"spec.dump", b"{}") + END
    with FakeRegistry({("/blobs/", 1): Truncate(1 << 20), ("/blobs/", None): Status(503)}) as registry:
        registry.add_image("repo", "latest", [(f"{TAR}+gzip", gzip.compress(tar, 1))])
        words = ("--rootfs", tmp_path, "--dir", tmp_path / "place", "--cache-dir", tmp_path / "cache")
        done = ckptfs("restore", registry.reference("repo:latest"), *words, "--read-deadline", "2")
    assert (done.code, done.out) == (5, ""), done.err
    assert "cannot be read" in done.line
    assert_nothing_left(tmp_path)


def test_a_restore_says_that_bytes_are_wrong(tmp_path: Path) -> None:
    """They would be the next time as well: nobody is told to try again."""
    tar = member(IMAGE, b"x") + member(b"large", LARGE) + member(b"spec.dump", b"{}") + END
    packed, other = (gzip.compress(data, 0) for data in (tar, tar.replace(LARGE[:100], bytes(100))))
    assert len(packed) == len(other) and packed != other
    with FakeRegistry() as registry:
        registry.add_image("repo", "latest", [(f"{TAR}+gzip", packed)])
        registry.blobs[str(Digest.of(packed))] = other
        words = ("--rootfs", tmp_path, "--dir", tmp_path / "place", "--cache-dir", tmp_path / "cache")
        done = ckptfs("restore", registry.reference("repo:latest"), *words)
    assert (done.code, done.out) == (6, ""), done.err
    assert "try it again" not in done.err
    assert_nothing_left(tmp_path)


def test_a_runtime_that_could_not_read_is_not_to_blame(
    registry: DockerRegistry, scratch_folder: Path, tmp_path: Path
) -> None:
    """criu knows of an I/O error only; what it stands for is said, with the exit code of an outage."""
    require_criu()
    require("runc", root=True)
    folder = scratch_folder / "outage"
    folder.mkdir()
    reference = registry.reference("outages/ticker:1")
    assert ckptfs("push", runc.checkpoint(folder, "outage"), reference).code == 0
    with ShapedLink(registry.host, rate=3e6) as link:
        here = reference.replace(registry.host, link.address)
        options = ("--rootfs", folder / "rootfs", "--read-deadline", "1", "--no-lazy-pages")
        process = start(tmp_path, here, *options)
        wait_for("criu", (tmp_path / "place" / "work" / "restore.log").exists, patience=30)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (5, ""), err
    assert "runc could not restore" in err and "connection refused" in err
    assert_nothing_left(tmp_path)


def test_links_that_lead_nowhere_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "spec.dump").symlink_to("spec.dump")
    (tmp_path / "checkpoint").symlink_to("checkpoint/again")
    files = LocalFiles(tmp_path)
    assert files.size("spec.dump") is files.size("checkpoint/inventory.img") is None
    assert files.list("checkpoint") == ()
