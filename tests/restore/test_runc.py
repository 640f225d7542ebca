"""`ckptfs restore` of containers that runc ran without an engine, with what engines seldom ask for."""

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs.model.annotations import ROOTFS_DIGEST
from ckptfs.restore.checking import unprivileged_userfaultfd
from tests.support import runc
from tests.support.command import ckptfs
from tests.support.criu import require_criu
from tests.support.other_user import as_nobody
from tests.support.push import push_to_layout
from tests.support.restored import assert_nothing_left, restored, start
from tests.support.tools import require
from tests.support.workload import scratch

pytestmark = [pytest.mark.restore, pytest.mark.fuse]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Which everybody may enter: with a user namespace the container's root must."""
    require("runc", root=True)
    require_criu()
    with scratch() as name:
        Path(name).chmod(0o711)
        yield Path(name)


def test_a_container_with_a_user_namespace(folder: Path) -> None:
    """Its root reads the images and finds its root file system; nobody else on this machine does either."""
    push_to_layout(runc.checkpoint(folder, "userns", user_namespace=True), folder / "layout")
    words = (f"oci:{folder}/layout:latest", "--rootfs", folder / "rootfs")
    last = runc.ticks(folder / "rootfs")[-1].number
    with restored(folder, *words, "--no-lazy-pages") as container:
        container.assert_continues(last)
        assert (container.root / "data/ticker.out").stat().st_uid == 100_000
        pages = folder / "place/image/checkpoint/pages-1.img"
        assert pages.stat().st_mode & 0o777 == 0o644  # as criu makes them, for everybody
        for path in (pages, folder / "place/merged/ticker"):
            assert "Permission denied" in as_nobody("cat", str(path)).stderr
    common = ("--cache-dir", folder / "cache")
    assert ckptfs("check", *words, "--no-lazy-pages", *common).code == 0
    if unprivileged_userfaultfd():
        with restored(folder, *words) as container:
            container.assert_continues(last)
        return
    for command in ("check", "restore"):
        done = ckptfs(command, *words, *common)
        assert done.code == 8
        assert "no lazy pages for containers with a user namespace; restore with --no-lazy-pages" in done.out + done.err


def test_whatever_umask_root_has(folder: Path) -> None:
    """With 077 no user in the container but root could look a name up."""
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    push_to_layout(runc.checkpoint(folder, "umask", binds={"/etc/hosts": hosts}), folder / "layout")
    hosts.unlink()
    words = (f"oci:{folder}/layout:latest", "--rootfs", folder / "rootfs")
    with restored(folder, *words, prefix=("sh", "-c", 'umask 077; exec "$@"', "sh")) as container:
        shown = container.root / "etc/hosts"
        assert (shown.stat().st_mode & 0o777, shown.read_text()[:19]) == (0o644, "127.0.0.1 localhost")


def test_a_terminal_where_paths_are_long(folder: Path) -> None:
    """Longer than an address of a socket may be."""
    push_to_layout(runc.checkpoint(folder, "terminal", terminal=True), folder / "layout")
    last = runc.ticks(folder / "rootfs")[-1].number
    deep = folder / ("deep" * 30)
    deep.mkdir()
    with restored(deep, f"oci:{folder}/layout:latest", "--rootfs", folder / "rootfs") as container:
        container.assert_continues(last)
        assert os.readlink(container.root / "proc/1/fd/1").startswith("/dev/pts/")
    assert (container.code, container.err) == (0, "")


def test_images_without_a_spec(folder: Path) -> None:
    """As runc and docker leave them. With the bundle's config.json beside it, the container runs again."""
    dump = runc.checkpoint(folder, "bare")
    (dump / "spec.dump").unlink()
    (dump / "config.dump").unlink()
    common = ("--rootfs", folder / "rootfs", "--cache-dir", folder / "cache")
    push_to_layout(dump / "checkpoint", folder / "layout", "bare")
    for command in ("check", "restore"):
        done = ckptfs(command, f"oci:{folder}/layout:bare", *common)
        assert done.code == 7 and "of a container, and has no spec.dump" in done.out + done.err
    shutil.copy(folder / "config.json", dump / "spec.dump")
    push_to_layout(dump, folder / "layout")
    last = runc.ticks(folder / "rootfs")[-1].number
    with restored(folder, f"oci:{folder}/layout:latest", "--rootfs", folder / "rootfs") as container:
        container.assert_continues(last)


def test_a_runtime_that_was_told_to_do_something_else(folder: Path) -> None:
    push_to_layout(runc.checkpoint(folder, "other"), folder / "layout")
    process = start(folder, f"oci:{folder}/layout:latest", "--rootfs", folder / "rootfs", extra=("--help",))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 8
    assert err.endswith("ckptfs: runc ended well and restored nothing; what follows -- are options of its restore\n")
    assert_nothing_left(folder)


def test_a_failure_is_no_outage_because_something_else_was_not_there(folder: Path) -> None:
    """An image that was copied without the root file system that it names, which `--rootfs` makes needless."""
    dump = runc.checkpoint(folder, "copied")
    with tarfile.open(dump / "rootfs-diff.tar", "w") as delta:
        delta.addfile(tarfile.TarInfo("data/new"))
    notes = ("--annotation", f"{ROOTFS_DIGEST}=sha256:{'0' * 64}")
    assert ckptfs("push", dump, f"oci:{folder}/layout:latest", *notes).code == 0
    process = start(folder, f"oci:{folder}/layout:latest", "--rootfs", folder / "rootfs", extra=("--unknown",))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 8
    assert "flag provided but not defined: -unknown; the logs are in" in err
    assert_nothing_left(folder)
