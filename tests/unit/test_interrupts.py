"""Signals while a command begins: in the middle of an import, right before a system call that blocks, in a daemon."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs.control.client import MountFiles
from ckptfs.daemon.mounting import begin
from ckptfs.daemon.requests import MountRequest
from ckptfs.interrupts import interrupt_by, lines
from ckptfs.model.oci import Reference
from tests.support.fake_registry import FakeRegistry, Silent
from tests.support.restored import processes
from tests.support.tools import ROOT, wait_for


@pytest.fixture
def _interruptible() -> Iterator[None]:
    before = interrupt_by(signal.SIGUSR1, once=True)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_import_is_finished_before_a_signal_is_heard(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\nwhole = True\n"
    )
    script = """
import signal, sys, time
from ckptfs.interrupts import interrupt_by
interrupt_by(signal.SIGINT)
try:
    import slow
    time.sleep(10)
except KeyboardInterrupt:
    sys.exit(7 if sys.modules["slow"].whole else 1)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 7


@pytest.mark.usefixtures("_interruptible")
def test_a_program_is_started_before_a_signal_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody knew of it: criu lazy-pages of a restore that was interrupted stayed for ever."""
    fork_exec = subprocess._fork_exec  # type: ignore[attr-defined]

    def forked(*arguments: object) -> int:
        pid: int = fork_exec(*arguments)
        os.kill(os.getpid(), signal.SIGUSR1)
        return pid

    monkeypatch.setattr(subprocess, "_fork_exec", forked)
    process = None
    with pytest.raises(KeyboardInterrupt):
        process = subprocess.Popen(["sleep", "60"])
        time.sleep(10)
    assert process is not None
    process.kill()
    process.wait()


@pytest.mark.usefixtures("_interruptible")
def test_the_second_signal_is_ignored() -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(10)
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.usefixtures("_interruptible")
def test_a_signal_that_no_system_call_of_ours_hears_is_heard() -> None:
    """Another thread takes it: as if it had come right before the call, nothing ends that."""
    reader, writer = os.pipe()
    taken = threading.Event()

    def take() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        taken.wait()

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    thread = threading.Thread(target=take)
    sender = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    end = threading.Timer(10, os.close, (writer,))  # a wait for ever would be no failure
    try:
        for each in (thread, sender, end):
            each.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            list(lines(reader))
        assert time.monotonic() - began < 5
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        end.cancel()
        taken.set()
        thread.join()
        os.close(reader)


def test_lines_come_one_by_one() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb", buffering=0) as pipe:
        found = lines(reader)
        pipe.write(b"one\ntwo\nth")
        assert [next(found), next(found)] == [b"one", b"two"]
        pipe.write(b"ree\nlost")
    assert list(found) == [b"three"]
    os.close(reader)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_mount_on_its_way_ends_its_daemon(number: int, tmp_path: Path) -> None:
    """`timeout 5 ckptfs mount` of a registry that does not answer: the next mount was told that there is one."""
    (tmp_path / "mnt").mkdir()
    with FakeRegistry({("/manifests/", None): Silent()}) as registry:
        words = ["mount", registry.reference("repo:latest"), tmp_path / "mnt", "--cache-dir", tmp_path / "cache"]
        command = [sys.executable, "-m", "ckptfs", *map(str, words)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_for("the request", lambda: registry.requests("/manifests/"))
        process.send_signal(number)
        assert (process.communicate(timeout=10)[1], process.returncode) == ("ckptfs: interrupted\n", 130)
        assert processes(tmp_path) == []
    assert not MountFiles.of(str(tmp_path / "mnt")).lock.exists()


def test_a_daemon_that_does_not_serve_yet_ends_at_once(tmp_path: Path) -> None:
    """Whatever the process that forked it does with the signal."""
    (tmp_path / "mnt").mkdir()
    before = interrupt_by(signal.SIGTERM, once=True)
    try:
        with FakeRegistry({("/manifests/", None): Silent()}) as registry:
            pending = begin(
                MountRequest(
                    reference=Reference.parse(registry.reference("repo:latest")),
                    mountpoint=str(tmp_path / "mnt"),
                    started=time.monotonic(),
                    cache_dir=tmp_path / "cache",
                )
            )
            pending.cancel()
            ended = os.waitpid(pending.pid, 0)[1]
            pending.end()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert os.WTERMSIG(ended) == signal.SIGTERM


@pytest.mark.parametrize(
    ("before", "number", "code"),
    [
        ("", signal.SIGTERM, 3),
        ("trap '' HUP;", signal.SIGHUP, 0),  # nohup: it goes on
        ("trap '' INT;", signal.SIGTERM, -signal.SIGTERM),  # in the background of a script: as ever
    ],
)
def test_signals_that_are_taken_for_ctrl_c(before: str, number: int, code: int) -> None:
    program = """
import signal, sys, time
from ckptfs.interrupts import taken_for_ctrl_c
with taken_for_ctrl_c(signal.SIGTERM, signal.SIGHUP):
    try:
        print("ready", flush=True)
        time.sleep(1)
    except KeyboardInterrupt:
        sys.exit(3)
"""
    command = [
        "env",
        "--default-signal=INT,HUP",
        "sh",
        "-c",
        f'{before} exec "$@"',
        "sh",
        sys.executable,
        "-c",
        program,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(10) == code


_DETACHED = """
import os, signal, sys, time
from ckptfs.restore import keeper
fork, close, opened = os.fork, os.close, os.pipe

def restoring(request, report):  # in the child
    report("running", pid=os.getpid())
    time.sleep(60)

def forked():
    child = fork()
    if child and "fork" in sys.argv:
        os.kill(os.getpid(), signal.SIGINT)
    if child:
        print(child, flush=True)
    return child

def piped():
    global reader
    reader, writer = opened()
    return reader, writer

def closing(descriptor):
    if (os.getpid(), descriptor) == (command, reader) and "close" in sys.argv:
        signal.raise_signal(signal.SIGINT)
    close(descriptor)

keeper.restore, os.fork, os.close, os.pipe = restoring, forked, closing, piped
command, reader = os.getpid(), -1
keeper.restore_detached("runs", lambda event, **facts: print(event, flush=True))
if "end" in sys.argv:
    signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.parametrize("at", ["", "fork", "close", "end"])
def test_a_detached_restore_runs_or_has_failed(at: str) -> None:
    """Whenever a signal comes: who is told that it runs is told so by the exit code as well."""
    done = subprocess.run([sys.executable, "-c", _DETACHED, at], cwd=ROOT, capture_output=True, text=True, timeout=60)
    child, *events = done.stdout.split()
    try:
        if at == "fork":
            assert done.returncode == -signal.SIGINT and not events, done.stderr
            assert not Path("/proc", child).exists()
        else:
            assert (done.returncode, events) == (0, ["running"]), done.stderr
            assert Path("/proc", child).exists()
    finally:
        if Path("/proc", child).exists():
            os.kill(int(child), signal.SIGKILL)
