"""Row M10: devices, set-user-id files and attributes that would act on whoever mounts, copies or layers the image."""

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.command import ckptfs, mounted
from tests.support.fake_registry import FakeRegistry
from tests.support.hanging import errno_of
from tests.support.other_user import NOBODY, as_nobody
from tests.support.tars import member, pax
from tests.support.tools import require

pytestmark = [pytest.mark.fuse, pytest.mark.row("M10")]

TAR = "application/vnd.oci.image.layer.v1.tar"
SHOWN = {b"user.mine": b"1", b"security.capability": b"\1\0\0\2" + bytes(16)}
HIDDEN = {
    b"trusted.overlay.redirect": b"/etc",
    b"trusted.overlay.opaque": b"y",
    b"trusted.overlay.metacopy": b"",
    b"user.overlay.redirect": b"/etc",
    b"security.selinux": b"system_u:object_r:etc_t:s0",
    b"security.ima": b"\1" * 20,
    b"system.posix_acl_access": b"\2\0\0\0",
    b"trusted.anything": b"1",
}
Figure = Callable[[str, object], None]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    attributes = [(b"SCHILY.xattr." + name, value) for name, value in (SHOWN | HIDDEN).items()]
    layer = (
        member(b"null", flag=b"3", device=(1, 3), mode=0o666)
        + member(b"disk", flag=b"4", device=(8, 0), mode=0o666)
        + member(b"rootly", b"#!/bin/sh\nid -u\n", mode=0o4755)
        + pax(attributes)
        + member(b"file", b"x")
        + member(b"Name", b"upper")
        + member(b"name", b"lower")
        + bytes(1024)
    )
    with FakeRegistry() as registry:
        registry.add_image("repo", "latest", [(TAR, layer)])
        yield registry


def test_nothing_acts_on_the_host(registry: FakeRegistry, tmp_path: Path, record_property: Figure) -> None:
    require("fusermount3", root=True)
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o011)
    reference = registry.reference("repo:latest")
    with mounted(reference, tmp_path, "--view", "raw", "--allow-other") as mount:
        with open("/proc/self/mountinfo", encoding="utf-8") as lines:
            flags = next(line.split()[5].split(",") for line in lines if line.split()[4] == str(mount.path))
        assert {"ro", "nodev", "nosuid"} <= set(flags)
        for name in ("null", "disk"):
            assert errno_of(lambda: os.open(mount.path / name, os.O_RDONLY)) == errno.EACCES  # noqa: B023
        assert as_nobody(str(mount.path / "rootly")).stdout == f"{NOBODY}\n"
        assert {name.encode() for name in os.listxattr(mount.path / "file")} == set(SHOWN)
        for name, value in SHOWN.items():
            assert os.getxattr(mount.path / "file", name) == value
        for name in HIDDEN:
            refused = errno_of(lambda: os.getxattr(mount.path / "file", name))  # noqa: B023
            assert refused in (errno.ENODATA, errno.EOPNOTSUPP)
        assert (mount.path / "Name").read_bytes() == b"upper" and (mount.path / "name").read_bytes() == b"lower"
    record_property("figure", f"ro,nodev,nosuid; {len(HIDDEN)} of {len(HIDDEN)} attributes hidden")


def test_a_copy_has_no_devices_and_no_set_user_id(registry: FakeRegistry, tmp_path: Path) -> None:
    options = ("--view", "raw", "--cache-dir", tmp_path / "cache")
    done = ckptfs("cp", registry.reference("repo:latest"), "/", tmp_path / "copy", *options)
    assert done.code == 0 and done.err.count("left out") == 2
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["Name", "file", "name", "rootly"]
    assert not (tmp_path / "copy" / "rootly").stat().st_mode & stat.S_ISUID
    shown = subprocess.run(["find", tmp_path / "copy", "-type", "b,c"], capture_output=True, check=True)
    assert shown.stdout == b""
