"""`ckptfs restore --detach`, and who listens to the command: what is said when it fails, and when nobody listens."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptfs.restore.runtimes import PID_FILE, children
from tests.support import runc
from tests.support.command import ckptfs
from tests.support.criu import require_criu
from tests.support.push import push_to_layout
from tests.support.restored import assert_nothing_left, processes, start
from tests.support.tools import ROOT, require, wait_for
from tests.support.workload import scratch

pytestmark = [pytest.mark.restore, pytest.mark.fuse]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """With a layout of a checkpoint, and the container's root file system."""
    require("runc", root=True)
    require_criu()
    with scratch() as name:
        folder = Path(name)
        push_to_layout(runc.checkpoint(folder, "detached"), folder / "layout")
        yield folder


def test_what_fails_is_said(folder: Path, tmp_path: Path) -> None:
    """As without --detach: by the daemon of the mount, and by the restore itself."""
    common = ("--rootfs", folder / "rootfs", "--dir", tmp_path / "place", "--cache-dir", tmp_path / "cache")
    for reference, options, code in (
        (f"oci:{folder}/none:latest", (), 3),
        (f"oci:{folder}/layout:latest", ("--bind", "/none=/tmp"), 2),
    ):
        said = [ckptfs("restore", reference, *common, *options, *detach) for detach in ((), ("--detach",))]
        assert said[0].code == said[1].code == code, said
        assert said[0].line == said[1].line
        assert_nothing_left(tmp_path)


def detached(folder: Path, place: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    words = ["restore", f"oci:{folder}/layout:latest", "--rootfs", folder / "rootfs", "--detach", "--json"]
    words += ["--dir", place / "place", "--cache-dir", place / "cache"]
    command = [sys.executable, "-m", "ckptfs", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, text=True, check=False, timeout=60, stderr=subprocess.PIPE, **options)


def test_what_cannot_be_told_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """As without --detach: who sees it fail would have a container that he knows nothing of."""
    with open("/dev/full", "w") as full:
        done = detached(folder, tmp_path, stdout=full)
    assert (done.returncode, done.stderr) == (8, "ckptfs: cannot write the output: No space left on device\n")
    assert_nothing_left(tmp_path)


def test_who_stays_keeps_no_descriptors_of_who_began_it(folder: Path, tmp_path: Path) -> None:
    """A lock of a script, or a pipe that somebody reads to its end."""
    reader, writer = os.pipe()
    done = detached(folder, tmp_path, stdout=subprocess.PIPE, pass_fds=[writer])
    os.close(writer)
    try:
        assert select.select([reader], [], [], 5)[0] and os.read(reader, 1) == b""
    finally:
        os.close(reader)
        os.kill(json.loads(done.stdout)["pid"], signal.SIGKILL)
    wait_for("the directory to go", lambda: not (tmp_path / "place").exists())
    assert_nothing_left(tmp_path)


def test_a_reader_of_events_may_leave(folder: Path, tmp_path: Path) -> None:
    """The container goes on."""
    process = start(tmp_path, f"oci:{folder}/layout:latest", "--rootfs", folder / "rootfs")
    assert process.stdout is not None and process.stderr is not None
    running = json.loads(process.stdout.readline())
    process.stdout.close()
    wait_for("the last page", lambda: not [words for words in processes(tmp_path) if "lazy-pages" in words])
    time.sleep(0.5)
    assert process.poll() is None and Path(f"/proc/{running['pid']}/root/data").exists()
    os.kill(running["pid"], signal.SIGKILL)
    assert (process.wait(60), process.stderr.read()) == (0, "")
    process.stderr.close()
    assert_nothing_left(tmp_path)


def test_nohup(folder: Path, tmp_path: Path) -> None:
    """What ends a terminal does not end what was started not to listen."""
    process = start(tmp_path, f"oci:{folder}/layout:latest", "--rootfs", folder / "rootfs", prefix=("nohup",))
    assert process.stdout is not None
    running = json.loads(process.stdout.readline())
    for _ in range(2):  # the first would have it stopped, the second killed
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
    assert process.poll() is None and Path(f"/proc/{running['pid']}/root/data").exists()
    os.kill(running["pid"], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert_nothing_left(tmp_path)


def test_interrupted_twice(folder: Path, tmp_path: Path) -> None:
    """Who is told that it has ended may begin again under the same name."""
    process = start(tmp_path, f"oci:{folder}/layout:latest", "--rootfs", folder / "rootfs", "--detach")
    wait_for("criu", (tmp_path / "place" / "work" / "restore.log").exists, step=0.001)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "ckptfs: interrupted\n")
    assert_nothing_left(tmp_path)


@pytest.mark.alone  # for a moment a cgroup is nobody's, which other tests would find
def test_who_stays_is_killed_before_it_says_so(folder: Path, tmp_path: Path) -> None:
    """The command does not wait for what nobody will say: the daemons of mounts could, for they live on."""
    process = start(tmp_path, f"oci:{folder}/layout:latest", "--rootfs", folder / "rootfs", "--detach")
    work = tmp_path / "place" / "work"
    wait_for("criu", (work / "restore.log").exists, step=0.001)
    (keeper,) = [pid for pid in children(process.pid) if os.getsid(pid) == pid]
    os.kill(keeper, signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "") and "ended early" in err
    noted = work / PID_FILE
    os.kill(int(wait_for("the container", lambda: noted.exists() and noted.read_text())), signal.SIGKILL)
    wait_for("its end", lambda: not processes(work))
    ckptfs("restore", f"oci:{folder}/none:latest", "--dir", tmp_path / "other", "--cache-dir", tmp_path / "cache")
    assert_nothing_left(tmp_path)
