"""The script of deploy/kubernetes/daemonset.yaml, run as its pod does."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from ckptfs.fuse.mountpoint import mount_at
from tests.support.command import ckptfs
from tests.support.hanging import ended
from tests.support.tools import ROOT, require, wait_for

pytestmark = pytest.mark.fuse

LAYOUT = ROOT / "tests/data/corpus/counter/k8s-zstdchunked.oci"


@contextmanager
def pod(folder: Path, *lines: str) -> Iterator[Path]:
    """Where its mounts are; `lines` are those of the ConfigMap."""
    documents = yaml.safe_load_all((ROOT / "deploy/kubernetes/daemonset.yaml").read_text())
    (container,) = next(d for d in documents if d["kind"] == "DaemonSet")["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    for theirs, ours in (("/var/lib/ckptfs/mounts", folder / "mounts"), ("/etc/ckptfs-mounts", folder / "etc")):
        assert theirs in script
        script = script.replace(theirs, str(ours))
        ours.mkdir(exist_ok=True)
    (folder / "etc/mounts").write_text("".join(f"{line}\n" for line in lines))
    program = folder / "ckptfs"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ckptfs "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"CKPTFS_CACHE_DIR": str(folder / "cache")}
    process = subprocess.Popen([*container["command"], script], env=environment, start_new_session=True)
    try:
        yield folder / "mounts"
        process.terminate()
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_pod_comes_again_whatever_ended_the_one_before(tmp_path: Path) -> None:
    """It left a dead mount; and a line that names no image takes none of the others away."""
    require("fusermount3", root=True)
    dead = tmp_path / "mounts/app"
    dead.mkdir(parents=True)
    pid = ckptfs("mount", f"oci:{LAYOUT}", dead, "--json", "--cache-dir", tmp_path / "cache").json["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for("its end", lambda: ended(pid))
    try:
        with pod(tmp_path, f"oci:{tmp_path}/none:1 none", "", f"oci:{LAYOUT} app") as mounts:
            wait_for("the mount", lambda: os.path.exists(mounts / "app/config.dump"), patience=30)
        assert mount_at(str(dead)) is None
    finally:
        ckptfs("umount", dead)
