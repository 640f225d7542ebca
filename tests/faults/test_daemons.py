"""Rows L5 to L9: daemons that die, mounts of others, several at once, and what is true of a mount that is ready."""

import errno
import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from ckptfs.control.client import MountFiles
from ckptfs.fuse.mountpoint import mount_at
from ckptfs.model.oci import Digest
from tests.support.command import ckptfs, mounted
from tests.support.each import each
from tests.support.fake_registry import FakeRegistry, Trickle
from tests.support.hanging import BLOB, LAZY, SILENT, TAR, Figure, assert_told, ended, errno_of, foreground, hang, pages
from tests.support.readers import reading
from tests.support.registry_faults import Paused
from tests.support.tars import member
from tests.support.tools import ROOT, require, wait_for

pytestmark = pytest.mark.fuse

STARTS = int(os.environ.get("CKPTFS_SOAK_STARTS", "20"))  # scripts/soak: 200
LAYOUT = Path(__file__).parent.parent / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fusermount3")


# -- L5, L6: dead daemons and foreign mounts ---------------------------------------------------------------------------


@pytest.mark.row("L5")
def test_a_killed_daemon_is_an_error_and_never_an_empty_directory(
    hanging: FakeRegistry, tmp_path: Path, record_property: Figure
) -> None:
    with mounted(hanging.reference("repo:latest"), tmp_path, *LAZY) as mount:
        hang(hanging, mount.path)
        answers: list[object] = []
        stop = threading.Event()

        def look() -> None:
            while not stop.is_set():
                try:
                    answers.append(len(os.listdir(mount.path)))
                except OSError as error:
                    answers.append(error.errno)

        watcher = threading.Thread(target=look)
        watcher.start()
        with reading(mount.path / "checkpoint" / "pages-1.img", 20) as hung:
            began = time.monotonic()
            os.kill(mount.pid, signal.SIGKILL)
            results = hung.results(5)
            seconds = time.monotonic() - began
        stop.set()
        watcher.join()
        assert errno_of(lambda: os.listdir(mount.path)) == errno.ENOTCONN
        assert set(answers) <= {2, errno.ENOTCONN, errno.ECONNABORTED}, set(answers)
        assert_told(results, 20)
        began = time.monotonic()
        hanging.script = {}
        again = ckptfs("mount", hanging.reference("repo:latest"), mount.path, "--cache-dir", mount.cache)
        assert again.code == 0, again.err
        mended = time.monotonic() - began
        same = (mount.path / "checkpoint" / "pages-1.img").read_bytes() == pages()
        assert same  # without a diff of 64 MB
    record_property("figure", f"readers told after {seconds:.2f} s, mounted again after {mended:.2f} s")
    assert seconds <= 1 and mended <= 2


@pytest.mark.row("L6")
@pytest.mark.parametrize("kind", ["tmpfs", "bind", "bindfs"])
def test_foreign_mounts_are_left_alone(kind: str, tmp_path: Path) -> None:
    require(*(["bindfs"] if kind == "bindfs" else []), root=True)
    target, other = tmp_path / "mnt", tmp_path / "other"
    target.mkdir()
    other.mkdir()
    (other / "file").write_text("here")
    command = {
        "tmpfs": ["mount", "-t", "tmpfs", "none", target],
        "bind": ["mount", "--bind", other, target],
        "bindfs": ["bindfs", other, target],
    }[kind]
    subprocess.run(command, check=True)
    try:
        before = sorted(os.listdir(target))
        for attempt in (("mount", f"oci:{LAYOUT}", target, "--cache-dir", tmp_path / "cache"), ("umount", target)):
            refused = ckptfs(*attempt)
            assert refused.code == 8 and "mount" in refused.line
        assert mount_at(str(target)) and sorted(os.listdir(target)) == before
    finally:
        subprocess.run(["umount", target], check=True)


@pytest.mark.row("L6")
def test_a_stale_mount_is_mended_only_where_it_is(tmp_path: Path) -> None:
    """Two stale mounts, one is mended: the other stays as it is until somebody asks for it."""
    with mounted(f"oci:{LAYOUT}", tmp_path / "a") as one, mounted(f"oci:{LAYOUT}", tmp_path / "b") as two:
        for mount in (one, two):
            os.kill(mount.pid, signal.SIGKILL)
            wait_for("the daemon ends", lambda pid=mount.pid: ended(pid))
        assert ckptfs("mount", f"oci:{LAYOUT}", one.path, "--cache-dir", one.cache).code == 0
        assert (one.path / "config.dump").exists()
        assert errno_of(lambda: os.statvfs(two.path)) == errno.ENOTCONN
        shown = ckptfs("status").out
        assert f"{two.path}" in shown and "dead" in shown


@pytest.mark.row("L6")
@each("number", [signal.SIGCONT, signal.SIGKILL], at_once=2)
def test_the_mount_of_a_stopped_daemon_is_unmounted(number: int, tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        files = MountFiles.of(str(mount.path))
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            done = ckptfs("umount", mount.path)
            assert done.code == 0 and "does not answer" in done.line
            assert not os.path.ismount(mount.path)
            assert ckptfs("mount", f"oci:{LAYOUT}", mount.path, "--cache-dir", mount.cache).code == 8
        finally:
            os.kill(mount.pid, number)
        wait_for("the daemon ends", lambda: ended(mount.pid), patience=30)
        assert str(mount.path) not in ckptfs("status").out
        assert not files.state.exists() and not files.socket.exists()
        assert ckptfs("mount", f"oci:{LAYOUT}", mount.path, "--cache-dir", mount.cache).code == 0


@pytest.mark.row("L5")
def test_what_a_killed_daemon_has_left_goes_with_the_next_mount(tmp_path: Path) -> None:
    """Its mount was removed by umount(8), which knows nothing of files; so it is for one that was never ready."""
    early = MountFiles.of(str(tmp_path / "early"))
    with mounted(f"oci:{LAYOUT}", tmp_path / "a") as one:
        early.lock.touch()
        early.socket.touch()
        files = MountFiles.of(str(one.path))
        os.kill(one.pid, signal.SIGKILL)
        wait_for("the daemon ends", lambda: ended(one.pid))
        with mounted(f"oci:{LAYOUT}", tmp_path / "b") as two:
            assert files.lock.exists() and files.state.exists()  # there is a mount to be mended
            assert not early.lock.exists() and not early.socket.exists()
            subprocess.run(["umount", one.path], check=True)
            with mounted(f"oci:{LAYOUT}", tmp_path / "c"):
                assert not any(path.exists() for path in (files.lock, files.state, files.socket))
            assert (two.path / "config.dump").exists()
            assert two.status()["pid"] == two.pid


# -- L7: two mounts on one directory -----------------------------------------------------------------------------------


@pytest.mark.row("L7")
def test_of_several_at_once_exactly_one_gets_the_directory(tmp_path: Path, record_property: Figure) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    codes: list[int] = []

    def attempt(name: Path) -> None:
        codes.append(ckptfs("mount", f"oci:{LAYOUT}", name, "--cache-dir", tmp_path / "cache").code)

    rounds = 3
    for _ in range(rounds):
        codes.clear()
        names = (target, tmp_path / "link", tmp_path / "." / "mnt", target)
        threads = [threading.Thread(target=attempt, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        try:
            assert sorted(codes) == [0, 8, 8, 8]
        finally:
            assert ckptfs("umount", target).code == 0
    record_property("figure", f"1 of 4, {rounds} times")


# -- L8, L9: start-up --------------------------------------------------------------------------------------------------


@pytest.mark.row("L8")
@pytest.mark.timeout(60 + 3 * STARTS)
def test_a_mount_that_says_it_is_ready_is(tmp_path: Path, record_property: Figure) -> None:
    expected = None
    for _ in range(STARTS):
        with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
            data = (mount.path / "config.dump").read_bytes()
            expected = expected or data
            assert data == expected
            assert ckptfs("status", mount.path, "--json").json["pid"] == mount.pid
    record_property("figure", f"0 races in {STARTS} starts")


@pytest.mark.row("L8")
@pytest.mark.timeout(60 + 3 * STARTS)
def test_a_descriptor_that_tells_when_it_is_ready(tmp_path: Path, record_property: Figure) -> None:
    """--ready-fd, read in the moment that it says so."""
    expected = None
    for _ in range(STARTS // 2):
        with foreground(tmp_path, f"oci:{LAYOUT}") as (mnt, _process):
            data = (mnt / "config.dump").read_bytes()
            expected = expected or data
            assert data == expected
    record_property("figure", f"0 in {STARTS // 2} with --ready-fd")


@pytest.mark.row("L8")
def test_nothing_is_left_of_a_mount_whose_command_was_killed(hanging: FakeRegistry, tmp_path: Path) -> None:
    """Nobody gets to know that it is ready: the daemon ends by itself, and has no failure to tell of in a log."""
    go_on = threading.Semaphore(0)
    hanging.script = {(BLOB, None): Paused((0,), go_on)}
    target, files = tmp_path / "mnt", MountFiles.of(str(tmp_path / "mnt"))
    target.mkdir()
    command = ["mount", hanging.reference("repo:latest"), target, "--cache-dir", tmp_path / "cache"]
    with subprocess.Popen([sys.executable, "-m", "ckptfs", *map(str, command)]) as process:
        wait_for("a request for the layer", lambda: hanging.requests(BLOB))
        process.kill()
    go_on.release(1000)
    wait_for("the end of the daemon", lambda: not files.lock.exists())
    assert not os.path.ismount(target)
    assert not any(path.exists() for path in (files.socket, files.state, files.log))


@pytest.mark.row("L8")
def test_nothing_is_told_before_a_read_works(hanging: FakeRegistry, tmp_path: Path) -> None:
    """The registry hangs before a byte of a file can be had: no exit, and nothing mounted after Ctrl-C."""
    hanging.script = {(BLOB, None): SILENT}
    target = tmp_path / "mnt"
    target.mkdir()
    command = ["mount", hanging.reference("repo:latest"), target, "--cache-dir", tmp_path / "cache"]
    with subprocess.Popen([sys.executable, "-m", "ckptfs", *map(str, command)], stderr=subprocess.PIPE) as process:
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert not os.path.ismount(target)
    assert str(target) not in ckptfs("status").out


@pytest.mark.row("L8")
@pytest.mark.parametrize("known", ["directories", "a file that a layer above can hide"])
def test_ready_does_not_wait_for_names_that_are_still_on_their_way(known: str, tmp_path: Path) -> None:
    """A stream takes minutes; so much of it has come that something is known, and no file for good."""
    late = member(b"late", Random(1).randbytes(8 << 20)) + bytes(1024)
    directories = b"".join(member(b"d%05d/" % number, flag=b"5", mode=0o755) for number in range(2100))
    layers = [(f"{TAR}+gzip", gzip.compress(directories + late, 1))]
    if known != "directories":
        layers.insert(0, (TAR, member(b"early", b"early") + bytes(1024)))
    with FakeRegistry() as registry:
        registry.add_image("repo", "latest", layers)
        registry.script[BLOB + str(Digest.of(layers[-1][1])), None] = Trickle(0.5, 16 * 1024)
        began = time.monotonic()
        with mounted(registry.reference("repo:latest"), tmp_path, "--view", "raw") as mount:
            assert time.monotonic() - began < 20 and not mount.status()["complete"]
            assert os.stat(mount.path / "d00000").st_mode & 0o777 == 0o755


@pytest.mark.row("L9")
@pytest.mark.parametrize(
    "entry", ["from ckptfs.cli import run; run(sys.argv[1:])", "import ckptfs.__main__ as m; m.main()"]
)
def test_nothing_runs_when_the_daemon_forks(tmp_path: Path, entry: str) -> None:
    """No thread, no event loop and no FUSE in the parent: a fork takes only the thread that called it."""
    (tmp_path / "mnt").mkdir()
    script = f"""
import os, sys, threading
fork = os.fork
def spy():
    print(threading.active_count(), len(os.listdir("/proc/self/task")), "trio" in sys.modules, "pyfuse3" in sys.modules)
    sys.stdout.flush()
    return fork()
os.fork = spy
cache = {str(tmp_path / "cache")!r}
sys.argv = ["ckptfs", "mount", {f"oci:{LAYOUT}"!r}, {str(tmp_path / "mnt")!r}, "--cache-dir", cache]
{entry}
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        assert done.returncode == 0 and done.stdout.splitlines() == ["1 1 False False"], done
    finally:
        with suppress(AssertionError):
            assert ckptfs("umount", tmp_path / "mnt").code == 0


@pytest.mark.parametrize("words", [["--no-such-option"], ["/no/such/directory"], ["/dev/null", "--view", "none"]])
def test_a_daemon_that_gets_no_request_ends_with_the_command(tmp_path: Path, words: list[str]) -> None:
    reference = f"localhost:1/{tmp_path.name.replace('_', '-')}"
    failed = ckptfs("mount", reference, *words)
    assert failed.code in (2, 8) and failed.line
    wait_for("the end of it", lambda: not processes_of(reference))


def test_a_daemon_that_died_while_it_waited_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    script = f"""
import os, signal, sys
from ckptfs.daemon import standby
from ckptfs.cli import run
standby.fork([])
os.kill(standby._waiting.pid, signal.SIGKILL)
os.waitpid(standby._waiting.pid, 0)
sys.exit(run(["mount", {f"oci:{LAYOUT}"!r}, {str(tmp_path / "mnt")!r}, "--cache-dir", {str(tmp_path / "cache")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        assert done.returncode == 0, done
        assert b"{" in (tmp_path / "mnt" / "config.dump").read_bytes()
    finally:
        assert ckptfs("umount", tmp_path / "mnt").code == 0


def processes_of(word: str) -> list[str]:
    """Process ids of commands with this word."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and word.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(entry.name)
    return found
