"""Rows L1 to L4: the life of a mount when handlers have bugs, readers hang, signals come and people unmount."""

import errno
import inspect
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import pytest

from ckptfs.control.client import MountFiles
from ckptfs.fuse.mountpoint import mount_at
from ckptfs.fuse.operations import Operations
from tests.support.command import ckptfs, mounted
from tests.support.fake_registry import FakeRegistry, Trickle
from tests.support.faulty_mount import BUGS, handlers
from tests.support.hanging import LAZY, SMALL_FILES, Figure, assert_told, ended, errno_of, foreground, hang
from tests.support.readers import reading
from tests.support.tools import require, wait_for

pytestmark = pytest.mark.fuse

LAYOUT = Path(__file__).parent.parent / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"
DEADLINE = 12  # seconds


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fusermount3")


# -- L1: a bug in a handler --------------------------------------------------------------------------------------------


@pytest.mark.row("L1")
def test_a_bug_costs_one_answer(tmp_path: Path, record_property: Figure) -> None:
    armed = tmp_path / "armed"
    armed.touch()
    with foreground(tmp_path, f"oci:{LAYOUT}", module=("tests.support.faulty_mount", str(armed))) as (mnt, process):
        links = [path for path in mnt.rglob("*") if path.is_symlink()]
        files = [path for path in sorted(mnt.rglob("*.img")) if path.stat().st_size]
        assert links and len(files) > 10
        fresh = iter(range(1000))

        def forget_pages(path: Path) -> int:
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            return file

        def closed(path: Path, arm: str) -> None:
            """Open while all is well, then close with the bug."""
            file = os.open(path, os.O_RDONLY)
            armed.write_text(arm)
            os.close(file)

        def read(path: Path, arm: str) -> None:
            file = forget_pages(path)
            armed.write_text(arm)
            try:
                os.read(file, 100)
            finally:
                armed.write_text("")
                os.close(file)

        # What makes the kernel ask, and whether it passes the answer on.
        provoke: dict[str, Callable[[str], object]] = {
            "lookup": lambda _: os.stat(mnt / f"absent-{next(fresh)}"),
            "getattr": lambda _: uncached_stat(mnt / "config.dump"),
            "readlink": lambda _: os.readlink(links[0]),
            "opendir": lambda _: os.listdir(mnt / "checkpoint"),
            "readdir": lambda _: os.listdir(mnt / "checkpoint"),
            "open": lambda _: os.open(files[0], os.O_RDONLY),
            "read": lambda arm: read(files[1], arm),
            "flush": lambda arm: closed(files[2], arm),
            "getxattr": lambda _: os.getxattr(files[3], "user.any"),
            "listxattr": lambda _: os.listxattr(files[4]),
            "statfs": lambda _: os.statvfs(mnt),
        }
        silent: dict[str, Callable[[str], object]] = {
            "release": lambda arm: closed(files[5], arm),
            "releasedir": lambda arm: closed(mnt / "checkpoint", arm),
        }
        never_asked = {"access"}  # the kernel judges by itself: default_permissions
        assert set(provoke) | set(silent) | never_asked == set(handlers())
        asked = {name for name in vars(Operations) if hasattr(pyfuse3.Operations, name)}
        answering = {name for name in asked if inspect.iscoroutinefunction(getattr(Operations, name))}
        assert answering - {"forget"} == set(handlers()), "no handler without its net; forget has nothing to do"

        def tracebacks(name: str) -> int:
            return (tmp_path / "stderr").read_text().count(f"{name} failed unexpectedly")

        count = 0
        for name, action in (provoke | silent).items():
            for kind, bug in enumerate(BUGS):
                for _ in range(2):
                    arm = f"{name} {bug}"
                    late = name in ("read", "flush", *silent)
                    armed.write_text("" if late else arm)
                    got = errno_of(lambda: action(arm))  # noqa: B023
                    if name in silent:  # told after the call has returned
                        wait_for(arm, lambda: tracebacks(name) > kind)  # noqa: B023
                        time.sleep(0.02)
                    armed.write_text("")
                    assert got == (0 if name in silent else errno.EIO), (name, bug)
                    count += 1
                    assert errno_of(lambda: os.stat(mnt / f"absent-{next(fresh)}")) == errno.ENOENT
                    assert b"{" in (mnt / "config.dump").read_bytes()
        assert process.poll() is None
        status = ckptfs("status", mnt, "--json").json
        assert any("internal error in" in error for error in status["errors"])
    log = (tmp_path / "stderr").read_text()
    for name in provoke | silent:
        assert log.count(f"{name} failed unexpectedly") == len(BUGS), "one for each site and kind"
    assert log.count("Traceback") >= len(BUGS) * len(provoke | silent)
    record_property("figure", f"{count} bugs in {len(provoke | silent)} handlers: one EIO each, the mount lives")


@pytest.mark.row("L1")
def test_nonsense_on_the_control_socket_costs_one_answer(tmp_path: Path) -> None:
    nonsense = (
        b"\n",
        b"x\n",
        b"[" * 60_000 + b"\n",
        b'{"command": {}}\n',
        b'{"command": "no"}\n',
        b"1\n",
        b"",
        b"x" * 70_000,
    )
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        for line in nonsense:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(MountFiles.of(str(mount.path)).socket))
                client.sendall(line)
                client.shutdown(socket.SHUT_WR)
                client.settimeout(5)
                assert b"unknown command" in client.recv(1000), line[:20]
        assert mount.status()["errors"] == [] and (mount.path / "config.dump").read_bytes()


def uncached_stat(path: Path) -> None:
    """stat(2) that asks the file system even if the kernel knows the answer (statx, AT_STATX_FORCE_SYNC)."""
    done = subprocess.run(["stat", "--cached=never", path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(errno.EIO if "Input/output error" in done.stderr else -1, done.stderr)


# -- L2: hung reads ----------------------------------------------------------------------------------------------------


@pytest.mark.row("L2")
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_metadata_answers_while_a_thousand_reads_hang(
    direct: bool, hanging: FakeRegistry, tmp_path: Path, record_property: Figure
) -> None:
    with mounted(hanging.reference("repo:latest"), tmp_path, *LAZY) as mount:
        hang(hanging, mount.path)
        with reading(mount.path / "checkpoint" / "pages-1.img", 1000, direct=direct) as hung:
            waiting = mount.status()["reads"]["waiting"]
            times = []
            for number in range(2000):
                began = time.monotonic()
                assert errno_of(lambda: os.stat(mount.path / f"absent-{number}")) == errno.ENOENT  # noqa: B023
                times.append(time.monotonic() - began)
            listed = subprocess.run(["find", mount.path, "-ls"], capture_output=True, text=True, check=True)
            assert len(listed.stdout.splitlines()) >= SMALL_FILES
            assert mount.status()["reads"]["waiting"] >= waiting >= 200
            # What is here already is read at once, whoever waits for the rest.
            began = time.monotonic()
            assert (mount.path / "config.dump").read_bytes() == b"{}"
            hit = time.monotonic() - began
            assert ckptfs("umount", mount.path).code == 0
            assert_told(hung.results(10), 1000)
    p99 = statistics.quantiles(times, n=100)[98]
    record_property("figure", f"{waiting} hung: stat p99 {p99 * 1000:.1f} ms, a hit {hit * 1000:.1f} ms")
    assert p99 <= 0.05 and hit <= 0.1


# -- L3, L4: signals and unmounting ------------------------------------------------------------------------------------


@pytest.mark.row("L3")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("readers", [0, 50])
def test_a_signal_drains_and_ends(
    readers: int, number: int, hanging: FakeRegistry, tmp_path: Path, record_property: Figure
) -> None:
    with foreground(tmp_path, hanging.reference("repo:latest"), *LAZY) as (mnt, process):
        hang(hanging, mnt)
        with reading(mnt / "checkpoint" / "pages-1.img", readers) as hung:
            began = time.monotonic()
            process.send_signal(number)
            assert process.wait(10) == 0
            seconds = time.monotonic() - began
            assert not os.path.ismount(mnt)
            assert_told(hung.results(5), readers)
        assert not MountFiles.of(str(mnt)).socket.exists() and str(mnt) not in ckptfs("status").out
    record_property("figure", f"{readers} readers: exit 0 after {seconds:.1f} s")
    assert seconds <= 6


@pytest.mark.row("L3")
@pytest.mark.parametrize("_", range(4))
def test_a_signal_as_soon_as_there_is_a_mount(_: int, tmp_path: Path) -> None:
    """Who sends it need not know whether the daemon is ready."""
    (tmp_path / "mnt").mkdir()
    words = [f"oci:{LAYOUT}", tmp_path / "mnt", "--foreground", "--cache-dir", tmp_path / "cache"]
    process = subprocess.Popen([sys.executable, "-m", "ckptfs", "mount", *map(str, words)], stderr=subprocess.PIPE)
    while mount_at(str(tmp_path / "mnt")) is None and process.poll() is None:
        pass
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert (process.returncode, mount_at(str(tmp_path / "mnt"))) == (0, None), said


@pytest.mark.row("L3")
def test_readers_that_can_be_served_are_served_first(hanging: FakeRegistry, tmp_path: Path) -> None:
    with foreground(tmp_path, hanging.reference("repo:latest"), *LAZY) as (mnt, process):
        hang(hanging, mnt, Trickle(0.02, 64 * 1024))
        with reading(mnt / "checkpoint" / "pages-1.img", 8) as slow:
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
            assert all(one.errno == 0 and one.right for one in slow.results(5))


@pytest.mark.row("L3")
def test_the_second_signal_unmounts_at_once(hanging: FakeRegistry, tmp_path: Path, record_property: Figure) -> None:
    with foreground(tmp_path, hanging.reference("repo:latest"), *LAZY) as (mnt, process):
        hang(hanging, mnt)
        with reading(mnt / "checkpoint" / "pages-1.img", 50) as hung:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert os.path.ismount(mnt), "it drains"
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(10)
            seconds = time.monotonic() - began
            assert not os.path.ismount(mnt)
            assert_told(hung.results(5), 50)
        assert str(mnt) not in ckptfs("status").out
        again = ckptfs("mount", f"oci:{LAYOUT}", mnt, "--cache-dir", tmp_path / "cache")
        assert again.code == 0, again.err
    record_property("figure", f"gone after {seconds:.2f} s")
    assert seconds <= 1


@pytest.mark.row("L4")
@pytest.mark.parametrize("how", ["ckptfs umount", "umount -l"])
def test_nobody_is_stuck_after_unmounting(
    how: str, hanging: FakeRegistry, tmp_path: Path, record_property: Figure
) -> None:
    require(root=True)
    began = time.monotonic()
    with mounted(hanging.reference("repo:latest"), tmp_path, *LAZY, "--read-deadline", DEADLINE) as mount:
        with reading(mount.path / "checkpoint" / "pages-1.img", 50) as served:
            hang(hanging, mount.path)
            with reading(mount.path / "checkpoint" / "pages-1.img", 100, direct=True) as hung:
                command = ["umount", "-l", mount.path] if how == "umount -l" else None
                if command is None:
                    assert ckptfs("umount", mount.path).code == 0
                else:
                    subprocess.run(command, check=True)
                assert os.listdir(mount.path) == []
                results = served.results(DEADLINE + 5) + hung.results(DEADLINE + 5)
        wait_for("the daemon ends", lambda: ended(mount.pid), patience=DEADLINE + 5)
    record_property("figure", f"{how}: 0 of {len(results)} stuck after {time.monotonic() - began:.0f} s")
    assert_told(results, 150, told=50)
