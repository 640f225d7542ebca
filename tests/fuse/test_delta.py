"""The delta over its base is what the engine's own restore gives: as an overlay, and as the root file system view.

podman and CRI-O unpack rootfs-diff.tar over the base and then remove what deleted.files lists; containerd applies an
OCI layer. One thing is better here: a directory that was deleted and made again keeps what is new in it, which podman
unpacks and then removes with the rest.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import golden
from tests.support.command import ckptfs, mounted
from tests.support.producers import containerd_cri, cri_o, deltas, podman, unpack, volumes
from tests.support.push import push_to_layout
from tests.support.tools import require, run
from tests.support.trees import layout_of
from tests.support.views import Entries, show

pytestmark = pytest.mark.fuse

FLAT: dict[str, Callable[[Path], None]] = {"podman": podman, "CRI-O": cri_o, "containerd CRI": containerd_cri}


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("fusermount3", "tar", root=True)


@pytest.fixture(params=FLAT)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and the root file system that it was taken of."""
    checkpoint, base = tmp_path / "checkpoint", tmp_path / "base"
    checkpoint.mkdir()
    FLAT[request.param](checkpoint)
    make_base(base)
    if request.param != "containerd CRI":  # its layer says of each directory all there is
        os.setxattr(base / "opt", "user.note", b"of the base")
    return checkpoint, base


def make_base(base: Path) -> None:
    """What the delta changes and deletes, under directories whose owners and modes are not the usual ones."""
    for name in ("data/kept", "etc/passwd", "etc/app.conf", "opt/app/old", "opt/app/sub/deep", "opt/other"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(f"{name} of the base\n")
    for name in ("srv/gone.txt", "srv/gonedir/deep", "srv/kept"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("to be deleted\n")
    os.symlink("data", base / "link")
    os.chown(base / "data", 5, 6)
    (base / "data").chmod(0o1770)
    (base / "srv").chmod(0o711)
    os.chown(base / "opt", 7, 8)
    for name in ("data", "srv", "opt", "etc"):
        os.utime(base / name, ns=(10**18, 10**18))


def engine_restores(checkpoint: Path, base: Path, into: Path) -> Entries:
    """As the engine does it, with its one mistake mended."""
    run("cp", "-a", base, into)
    root, names = deltas(checkpoint, into.parent / "unpacked")
    for whiteout in root.rglob(".wh.*"):
        remove(into / whiteout.relative_to(root).parent / whiteout.name.removeprefix(".wh."))
    gzip = ("--gzip",) if (checkpoint / "rootfs-diff.tar").read_bytes()[:2] == b"\x1f\x8b" else ()
    keep = ("--numeric-owner", "--same-owner", "-p", "--xattrs", "--xattrs-include=*", "--exclude=.wh.*")
    unpacked = ("tar", "--extract", *gzip, "--file", checkpoint / "rootfs-diff.tar", "--directory", into, *keep)
    run(*unpacked)
    deleted = checkpoint / "deleted.files"
    again = []
    for path in json.loads(deleted.read_text()) if deleted.exists() else ():
        remove(into / path.lstrip("/"))
        again += [name for name in names if name.startswith(path.lstrip("/") + "/")]
    if again:
        run(*unpacked, *sorted(again))
    return listing(into)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def listing(folder: Path) -> Entries:
    """Without the times of directories, which unpacking changes."""
    return timeless(golden.directory_listing(folder)["entries"])


def timeless(entries: Entries) -> Entries:
    for entry in entries.values():
        entry.pop("mtime_ns", None)
        if entry["type"] == "dir":
            entry.pop("mtime", None)
    return entries


def differences(found: Entries, expected: Entries) -> dict[str, object]:
    return {
        path: (found.get(path), expected.get(path))
        for path in sorted(found.keys() | expected.keys())
        if found.get(path) != expected.get(path)
    }


@contextmanager
def overlay(upper: Path, base: Path, place: Path) -> Iterator[Path]:
    """`upper` over `base`, read-only."""
    merged = place / "merged"
    merged.mkdir()
    run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={upper}:{base}", merged)
    try:
        yield merged
    finally:
        subprocess.run(["umount", str(merged)], check=True)


def base_image(base: Path, folder: Path) -> str:
    """The base as an image of two layers, the way images are: no entry for the root."""
    archive = folder / "base.tar"
    keep = ("--format=pax", "--xattrs", "--xattrs-include=*", "--numeric-owner")
    run("tar", *keep, "--create", "--file", archive, "--directory", base, *sorted(os.listdir(base)))
    return f"oci:{layout_of(archive.read_bytes(), folder / 'base-image')}"


def test_as_an_overlay_over_the_base(folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, base = folders
    expected = engine_restores(checkpoint, base, tmp_path / "restored")
    run("tar", "--create", "--file", tmp_path / "ck.tar", "--directory", checkpoint, *sorted(os.listdir(checkpoint)))
    image = base_image(base, tmp_path)
    with (
        mounted(f"archive:{tmp_path}/ck.tar", tmp_path, "--base", image) as mount,
        overlay(mount.path / "rootfs-diff", base, tmp_path) as merged,
    ):
        assert differences(listing(merged), expected) == {}
        assert mount.status()["errors"] == []


def test_without_a_known_base_only_directories_in_between_differ(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Engines record a directory only when it is new: above changed files it is shown as root's, 0755."""
    checkpoint, base = folders
    expected = engine_restores(checkpoint, base, tmp_path / "restored")
    run("tar", "--create", "--file", tmp_path / "ck.tar", "--directory", checkpoint, *sorted(os.listdir(checkpoint)))
    with (
        mounted(f"archive:{tmp_path}/ck.tar", tmp_path) as mount,
        overlay(mount.path / "rootfs-diff", base, tmp_path) as merged,
    ):
        wrong = differences(listing(merged), expected)
        made_up = {"type": "dir", "mode": "0755", "uid": 0, "gid": 0}
        assert set(wrong) <= {"data", "opt", "srv", "opt/app"}
        assert all(found == made_up for found, _ in wrong.values())  # type: ignore[misc]
        assert all(os.lstat(mount.path / "rootfs-diff" / path).st_mtime == 0 for path in wrong), "how they are told"
        assert mount.status()["errors"] == []
    with mounted(f"archive:{tmp_path}/ck.tar", tmp_path, "--base", f"oci:{tmp_path}/nowhere") as mount:
        os.listdir(mount.path / "rootfs-diff" / "data")
        errors = mount.status()["errors"]
        assert ["root's, 0755: there is no directory" in error for error in errors] == [True] * bool(wrong)


def test_pushed_with_its_root_file_system(folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, base = folders
    expected = engine_restores(checkpoint, base, tmp_path / "restored")
    push_to_layout(checkpoint, tmp_path / "pushed", "ck", base=base_image(base, tmp_path))
    reference = f"oci:{tmp_path}/pushed:ck"
    with (
        mounted(reference, tmp_path) as mount,
        overlay(mount.path / "rootfs-diff", base, tmp_path) as merged,
    ):
        assert differences(listing(merged), expected) == {}
    view = timeless(show(reference, tmp_path / "other-cache", "rootfs").entries)
    assert differences(view, expected) == {}


def test_as_the_root_file_system_view(folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, base = folders
    expected = engine_restores(checkpoint, base, tmp_path / "restored")
    run("tar", "--create", "--file", tmp_path / "ck.tar", "--directory", checkpoint, *sorted(os.listdir(checkpoint)))
    image = base_image(base, tmp_path)
    with mounted(f"archive:{tmp_path}/ck.tar", tmp_path, "--view", "rootfs", "--base", image) as mount:
        assert differences(listing(mount.path), expected) == {}
    pulled = ckptfs("pull", f"archive:{tmp_path}/ck.tar", tmp_path / "pulled", "--view", "rootfs", "--base", image)
    assert pulled.code == 0, pulled.err
    assert differences(listing(tmp_path / "pulled"), expected) == {}


def test_the_other_tars_are_directories_too(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    volumes(checkpoint)
    run("tar", "--create", "--file", tmp_path / "ck.tar", "--directory", checkpoint, *sorted(os.listdir(checkpoint)))
    with mounted(f"archive:{tmp_path}/ck.tar", tmp_path) as mount:
        for name in ("devshm-checkpoint", "volumes/data"):
            expected = unpack(checkpoint / f"{name}.tar", tmp_path / "unpacked" / name)
            found, wanted = os.lstat(mount.path / name), os.lstat(expected)
            fields = ("st_mode", "st_uid", "st_gid", "st_mtime_ns")
            assert [getattr(found, field) for field in fields] == [getattr(wanted, field) for field in fields]
            assert golden.directory_listing(mount.path / name) == golden.directory_listing(expected)
            with (mount.path / f"{name}.tar").open("rb") as tar:
                assert tar.read() == (checkpoint / f"{name}.tar").read_bytes()


@pytest.mark.row("M6")
def test_a_list_that_deletes_below_a_file_changes_nothing(tmp_path: Path) -> None:
    """A directory of the base became a file: what was in it is listed as deleted and hidden anyway."""
    checkpoint, base = tmp_path / "checkpoint", tmp_path / "base"
    checkpoint.mkdir()
    podman(checkpoint)
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "srv").write_text("a file now\n")
    run("tar", "--create", "--file", checkpoint / "rootfs-diff.tar", "--directory", tmp_path / "delta", "srv")
    (checkpoint / "deleted.files").write_text(json.dumps(["/srv/gone.txt", "/srv/gonedir/deep"]))
    make_base(base)
    run("tar", "--create", "--file", tmp_path / "ck.tar", "--directory", checkpoint, *sorted(os.listdir(checkpoint)))
    image = base_image(base, tmp_path)
    with (
        mounted(f"archive:{tmp_path}/ck.tar", tmp_path) as mount,
        overlay(mount.path / "rootfs-diff", base, tmp_path) as merged,
    ):
        assert (merged / "srv").read_text() == "a file now\n"
    with mounted(f"archive:{tmp_path}/ck.tar", tmp_path, "--view", "rootfs", "--base", image) as mount:
        assert (mount.path / "srv").read_text() == "a file now\n"
