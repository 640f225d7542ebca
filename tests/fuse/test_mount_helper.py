"""mount.ckptfs under the real mount(8): options, fstab, umount(8), exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptfs.cli.mount_helper import mount_for_mount8, translate
from ckptfs.errors import UsageError
from tests.support.criu_images import CORPUS
from tests.support.tools import ROOT, require

pytestmark = pytest.mark.fuse
IMAGE = f"oci:{CORPUS}/counter/k8s-zstdchunked.oci"

# mount(8) looks for its helpers in /sbin and nowhere else: in a namespace of our own there is one more.
_NAMESPACE = """
set -e
mount -t overlay overlay -o "lowerdir=/usr/sbin,upperdir=$1/sbin,workdir=$1/work" /usr/sbin
touch "$1/fstab"
mount --bind "$1/fstab" /etc/fstab
cd "$1"
"""


def in_namespace(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    require("unshare", root=True)
    for name in ("sbin", "work", "mnt"):
        (folder / name).mkdir()
    helper = folder / "sbin" / "mount.ckptfs"
    helper.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m ckptfs.cli.mount_helper "$@"\n')
    helper.chmod(0o755)
    command = ["unshare", "--mount", "sh", "-c", _NAMESPACE + script, "sh", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_mount_and_umount(tmp_path: Path) -> None:
    done = in_namespace(
        tmp_path,
        f"""
        mount -t ckptfs {IMAGE} mnt -o view=raw,allow_other,cache_dir=$1/cache,_netdev,x-systemd.automount
        head -c 4 mnt/checkpoint/inventory.img | od -An -tx1
        grep "$1/mnt" /proc/self/mountinfo
        umount mnt
        ls mnt
        """,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.split() == ["16", "31", "31", "58"]
    assert "fuse.ckptfs" in second and "allow_other" in second and "ro," in second


def test_fstab(tmp_path: Path) -> None:
    done = in_namespace(
        tmp_path,
        f"""
        echo "{IMAGE} $1/mnt ckptfs ro,view=checkpoint,cache_dir=$1/cache,noauto 0 0" > /etc/fstab
        mount mnt
        ls mnt/checkpoint | head -1
        umount mnt
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()


def test_failures_have_the_exit_codes_of_mount8(tmp_path: Path) -> None:
    done = in_namespace(
        tmp_path,
        f"""
        mount -t ckptfs {IMAGE}-missing mnt || echo $?
        mount -t ckptfs {IMAGE} mnt -o nonsense=1 || echo $?
        mount -t ckptfs {IMAGE} mnt -o view || echo $?
        """,
    )
    assert done.stdout.split() == ["32", "1", "1"]
    lines = [line for line in done.stderr.splitlines() if line.startswith("ckptfs:")]
    assert len(lines) == 3
    assert "there is no mount option 'nonsense'" in lines[1]
    assert not os.listdir(tmp_path / "mnt")


def test_every_option_of_mount_is_a_mount_option() -> None:
    text = "rw,noauto,verify=strict,cache_size=2G,no_background_fetch,plain_http,read_deadline=hard,x-y=z,comment=a"
    wanted = ["--verify=strict", "--cache-size=2G", "--no-background-fetch", "--plain-http", "--read-deadline=hard"]
    assert translate(text) == wanted
    for wrong in ("views=raw", "offline=1", "json", "foreground"):
        with pytest.raises(UsageError):
            translate(wrong)


def test_a_fake_mount_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert mount_for_mount8(["REF", "/nowhere", "-f", "-o", "rw"]) == 0
    assert mount_for_mount8(["REF"]) == 1
    assert mount_for_mount8(["--help"]) == 0
    assert "mount.ckptfs REF DIR" in capsys.readouterr().out
