"""Mounting without root, where fusermount3 and /dev/fuse allow it."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs.fuse.mountpoint import admits_others
from tests.support.command import ckptfs
from tests.support.other_user import as_nobody, let_in
from tests.support.tools import ROOT, require

pytestmark = pytest.mark.fuse

LAYOUT = Path(__file__).parent.parent / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"
NOBODY = 65534


@pytest.fixture
def open_device() -> Iterator[None]:
    """/dev/fuse as distributions have it, open to everybody; some sandboxes close it."""
    require("fusermount3", root=True)
    before = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", 0o666)
    yield
    os.chmod("/dev/fuse", before)


def test_an_ordinary_user_mounts_reads_and_unmounts(open_device: None, tmp_path: Path) -> None:
    home = tmp_path / "home"
    run = home / ("deep" * 40)  # longer than the address of a socket may be: 107 bytes
    for folder in (home, home / "mnt", run):
        folder.mkdir(mode=0o700)
        os.chown(folder, NOBODY, NOBODY)
    let_in(tmp_path)
    # The interpreter may lie in root's home directory: this one right lets the user's processes read it.
    rights = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search", "--bounding-set=+all"]
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *rights]
    env = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(run), "PYTHONPATH": str(ROOT)}
    env.pop("XDG_CACHE_HOME", None)

    def as_reader(*words: str) -> None:
        command = [*user, sys.executable, "-m", "ckptfs", *words]
        done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    def as_user(*words: str) -> str:
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    as_reader("mount", f"oci:{LAYOUT}", str(home / "mnt"))
    try:
        assert '"name": "counter"' in as_user("cat", str(home / "mnt" / "config.dump"))
        assert "inventory.img" in as_user("ls", str(home / "mnt" / "checkpoint"))
    finally:
        as_reader("umount", str(home / "mnt"))
    assert not os.path.ismount(home / "mnt")


def test_what_allow_other_needs_is_named() -> None:
    require("setpriv", "unshare", "fusermount3", root=True)
    script = f'mkdir mnt && ckptfs mount oci:{LAYOUT} "$PWD/mnt" --allow-other && ckptfs umount "$PWD/mnt"'
    done = as_nobody("sh", "-c", script, fuse=True)
    if admits_others():
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 8 and "needs a line user_allow_other in /etc/fuse.conf" in done.stderr, done.stderr


def test_why_fusermount_refuses_is_said() -> None:
    require("setpriv", "unshare", "fusermount3", root=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as closed:
        os.chmod(closed, 0o755)
        done = as_nobody("ckptfs", "mount", f"oci:{LAYOUT}", closed, fuse=True)
    words = f"{closed} cannot be mounted: user has no write access to mountpoint {closed}; name a directory of your own"
    assert (done.returncode, done.stderr) == (8, f"ckptfs: {words}\n")


def test_a_mount_of_another_runtime_directory_is_not_called_dead() -> None:
    """One by cron or `su`, asked in a session that has one of its own; on a node, one of a container."""
    require("setpriv", "unshare", "fusermount3", root=True)
    script = (
        f'mkdir mnt && ckptfs mount oci:{LAYOUT} mnt && XDG_RUNTIME_DIR="$PWD" ckptfs status mnt; ckptfs umount mnt'
    )
    done = as_nobody("sh", "-c", script, fuse=True)
    assert "with another $XDG_RUNTIME_DIR; ask there" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_directories_that_only_root_can_enter(tmp_path: Path) -> None:
    """runc makes checkpoint/ of mode 0600: an ordinary user's copies of it could be neither looked into nor removed."""
    require("setpriv", "unshare", "fusermount3", "skopeo", "tar", root=True)
    image = tmp_path / "image"
    assert ckptfs("pull", f"oci:{LAYOUT}", image).code == 0
    (image / "checkpoint").chmod(0o600)
    layout = Path(tempfile.mkdtemp(dir="/var/tmp")) / "layout"
    try:
        assert ckptfs("push", image, f"oci:{layout}:1").code == 0
        subprocess.run(["chmod", "-R", "a+rX", layout.parent], check=True)
        look = "ls pulled/checkpoint/inventory.img copied/inventory.img && rm -r pulled copied"
        bench = f"ckptfs bench oci:{layout}:1 --out results --runs 1 --rtt 1ms --rate 0"
        script = f"ckptfs pull oci:{layout}:1 pulled && ckptfs cp oci:{layout}:1 checkpoint copied && {look} && {bench}"
        done = as_nobody("sh", "-c", script, fuse=True)
    finally:
        shutil.rmtree(layout.parent)
    assert done.returncode == 0 and "skopeo, tar: until" in done.stdout, done.stderr


@pytest.mark.parametrize("source", ["closed", "closed/a.tar", "a.tar", "open"])
def test_a_source_that_may_not_be_read(source: str) -> None:
    require("setpriv", "unshare", "fusermount3", root=True)
    made = "mkdir -p closed open/checkpoint && touch a.tar && echo > open/checkpoint/inventory.img"
    script = f'{made} && chmod 0 closed a.tar open/checkpoint/inventory.img; ckptfs push "$PWD/{source}" oci:$PWD/out:1'
    done = as_nobody("sh", "-c", script, fuse=True)
    assert done.returncode == 4 and "may not be read by this user" in done.stderr, done.stderr
