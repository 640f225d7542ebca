"""The lock and the files of a mount point, where mounts begin and end while others look."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ckptfs.control import client
from ckptfs.control.client import MountFiles, write_state
from ckptfs.daemon import asking, mounting, standby
from ckptfs.daemon.asking import statuses, umount
from ckptfs.daemon.claim import Lock
from ckptfs.daemon.requests import MountRequest
from ckptfs.errors import MountError
from ckptfs.fuse.mountpoint import FSTYPE, Mount
from ckptfs.model.oci import Reference
from tests.support.disks import disk_of


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A mount point, with a runtime directory that nobody else uses."""
    monkeypatch.setattr(client, "runtime_dir", lambda: tmp_path / "run")
    client.ensure_runtime_dir()
    (tmp_path / "mnt").mkdir()
    yield str(tmp_path / "mnt")
    assert list((tmp_path / "run").iterdir()) == []


def leave_files(target: str) -> MountFiles:
    """What a daemon that was killed has left."""
    files = MountFiles.of(target)
    write_state(files, {"mountpoint": target, "reference": "localhost:5000/app:1", "pid": 1})
    files.socket.touch()
    return files


def test_a_mount_that_begins_keeps_its_files_whoever_looks_for_dead_ones(target: str) -> None:
    files = leave_files(target)
    with Lock(target) as beginning:
        files.socket.touch()  # by now its own
        assert statuses(None) == []
        with pytest.raises(MountError, match="is gone"):
            statuses(target)
        with pytest.raises(MountError, match="nothing is mounted"):
            umount(target)
        assert files.socket.exists() and files.state.exists()
        beginning.remove()


def test_of_two_who_unmount_the_second_has_what_it_wants(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has looked while there was a mount, and was told "Invalid argument"."""
    seen = Mount(target, (0, 99), FSTYPE, "app:1", frozenset())
    monkeypatch.setattr(asking, "mount_at", lambda _: seen)
    umount(target)


def test_what_a_dead_mount_has_left_goes_with_the_first_look(target: str) -> None:
    leave_files(target)
    assert statuses(None) == []
    assert not MountFiles.of(target).state.exists()
    with pytest.raises(MountError, match="nothing is mounted"):
        statuses(target)
    leave_files(target)
    with pytest.raises(MountError, match="nothing is mounted"):
        umount(target)


def test_umount_waits_for_the_daemon_that_it_ends_and_not_for_the_next(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_ENDS", 1.0)
    first, second = Lock(target), Lock(target)
    first.__enter__()
    leave_files(target)

    def stop(files: MountFiles, command: str, **arguments: Any) -> dict[str, int]:
        first.remove()
        first.__exit__()
        second.__enter__()  # somebody else mounts there, before whoever unmounts has had a look
        leave_files(target)
        return {"pid": 1}

    monkeypatch.setattr(asking, "ask", stop)
    umount(target)
    assert second.current() and MountFiles.of(target).state.exists()
    second.remove()
    second.__exit__()


def test_the_lock_of_a_daemon_that_was_never_ready_goes_with_the_first_look(target: str) -> None:
    files = MountFiles.of(target)
    files.lock.touch()
    files.socket.touch()
    with Lock(f"{target}-other") as other:
        assert statuses(None) == []
        assert not files.lock.exists() and not files.socket.exists()
        assert other.current()
        other.remove()


def test_who_only_removes_what_is_left_is_waited_for(target: str) -> None:
    sweeping = Lock(target)
    sweeping.__enter__()

    def remove() -> None:
        sweeping.remove()
        sweeping.__exit__()

    threading.Timer(0.03, remove).start()
    with Lock(target) as lock:
        assert lock.current()
        lock.remove()


def test_no_room_for_what_a_mount_says_of_itself(tmp_path: Path) -> None:
    with disk_of(tmp_path / "run", "size=64k,mode=700") as run:
        other = run / "other"
        with other.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        with pytest.raises(MountError, match="No space left") as caught:
            write_state(MountFiles(run, "name"), {"mountpoint": "/mnt"})
        assert str(run) in caught.value.message and list(run.iterdir()) == [other]


def test_a_limit_on_tasks_is_said_to_be_that(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    standby.fork(["mount"])
    assert standby.take() is None
    with pytest.raises(MountError, match="no daemon can be started") as caught:
        mounting.begin(MountRequest(Reference.parse("localhost:5000/app:1"), target, 0.0))
    assert "ulimit -u" in caught.value.hint and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_daemon_that_fails_later_tells_it_to_nobody(tmp_path: Path) -> None:
    """The pipe to who has waited is closed by then, and its number is another file's."""
    reader, writer = os.pipe()
    other = tmp_path / "other"

    def run(request: object, claim: object, announce: Callable[[dict[str, Any]], None], *, logs: bool) -> None:
        announce({"ready": True})
        os.dup2(os.open(other, os.O_RDWR | os.O_CREAT, 0o600), writer)
        raise MountError("the last status could not be written")

    daemon = os.fork()
    if daemon == 0:
        try:
            mounting._run = run  # type: ignore[assignment]
            mounting._serve(None, None, writer)  # type: ignore[arg-type]
        finally:
            os._exit(99)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b'{"ready": true}\n'
    assert os.waitstatus_to_exitcode(os.waitpid(daemon, 0)[1]) == MountError.exit_code
    assert other.read_bytes() == b""
