"""Rows L4 and L5 where the kernel has been told something: a thread that waits there must not outlive the mount.

Such a thread keeps the connection open, and so everybody for whom it waits, for ever: not even SIGKILL helps.
"""

import gzip
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from ckptfs import namespace
from ckptfs.fuse.mountpoint import mount_at
from ckptfs.model.oci import Digest
from tests.support.command import Mounted, ckptfs, mounted
from tests.support.fake_registry import FakeRegistry, Paused
from tests.support.hanging import BLOB, SILENT, TAR, ended
from tests.support.tars import member
from tests.support.tools import require, wait_for

pytestmark = pytest.mark.fuse

CONNECTIONS = "/sys/fs/fuse/connections"
EARLY = member(b"early", b"early") + bytes(1024)  # a layer on top that is all here: the mount is ready with it


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fusermount3", root=True)


@contextmanager
def raw(registry: FakeRegistry, folder: Path) -> Iterator[Mounted]:
    """A raw mount that can be got rid of whatever has happened."""
    with mounted(registry.reference("repo:latest"), folder, "--view", "raw", "--no-background-fetch") as mount:
        found = mount_at(str(mount.path))
        assert found is not None
        try:
            yield mount
        finally:
            namespace.in_own_namespace(lambda: _abort(found.device[1]))


def _abort(connection: int) -> None:
    namespace.mount("fusectl", CONNECTIONS)
    Path(f"{CONNECTIONS}/{connection}/abort").write_text("1")


def end(mount: Mounted, how: str) -> None:
    if how == "kill":
        os.kill(mount.pid, signal.SIGKILL)
    else:
        assert ckptfs("umount", mount.path).code == 0


def waits_there(process: "subprocess.Popen[bytes]") -> bool:
    """For an answer, or for a page that one has been asked for."""
    stack = Path(f"/proc/{process.pid}/stack").read_text()
    return "fuse" in stack or "folio_wait" in stack


def assert_ends(process: "subprocess.Popen[bytes]", pid: int) -> None:
    """With an error, and so does the daemon."""
    assert process.wait(10) == 1
    wait_for("the daemon ends", lambda: ended(pid) and not list(Path("/proc").glob(f"{pid}/task/*/stat"))[1:])


def repeated(rest: int) -> bytes:
    """A layer in which d/a comes twice, `rest` bytes before its end."""
    early, late = (member(name, Random(1).randbytes(size)) for name, size in ((b"p1", 2_500_000), (b"p2", rest)))
    directory = member(b"d/", flag=b"5", mode=0o755)
    return gzip.compress(directory + member(b"d/a", b"old") + early + member(b"d/a", b"newer") + late + bytes(1024), 1)


def add_paused(registry: FakeRegistry, layer: bytes, *stops: int) -> Paused:
    """A layer that comes up to `stops`. Far behind what is to be known: a stream takes pieces of up to 2 MiB."""
    registry.add_image("repo", "latest", [(TAR + "+gzip", layer), (TAR, EARLY)])
    registry.script[BLOB + str(Digest.of(layer)), None] = paused = Paused(stops)
    return paused


@pytest.mark.row("L5")
@pytest.mark.parametrize("how", ["kill", "umount"])
def test_a_name_that_has_got_another_file_while_one_beside_it_is_awaited(how: str, tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        slow = add_paused(registry, repeated(8_000_000), 2_300_000, 6_500_000)
        with raw(registry, tmp_path) as mount:
            assert os.stat(mount.path / "d" / "a").st_size == 3
            with subprocess.Popen(["stat", mount.path / "d" / "z"], stderr=subprocess.DEVNULL) as looking:
                wait_for("a thread in the kernel", lambda: waits_there(looking))
                slow.go_on.release()
                wait_for("the new one", lambda: mount.status()["network"]["bytes"] > 4_000_000, patience=30, step=0.2)
                assert looking.poll() is None
                end(mount, how)
                assert_ends(looking, mount.pid)


def test_a_name_that_has_got_another_file_shows_it(tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        slow = add_paused(registry, repeated(100_000), 2_300_000)
        with mounted(registry.reference("repo:latest"), tmp_path, "--view", "raw") as mount:
            assert (mount.path / "d" / "a").read_bytes() == b"old"
            slow.go_on.release()
            wait_for("the end of the layer", lambda: mount.status()["complete"], patience=30, step=0.2)
            time.sleep(1)  # for which a name may be kept that was given before
            assert (mount.path / "d" / "a").read_bytes() == b"newer"


@pytest.mark.row("L5")
@pytest.mark.parametrize("how", ["kill", "umount"])
def test_a_layer_that_was_wrong_while_reads_of_another_hang(how: str, tmp_path: Path) -> None:
    """Its pages are forgotten by the kernel, and nobody waits for others."""
    said, sent = (gzip.compress(member(b"x", Random(n).randbytes(500_000)) + bytes(1024), 0) for n in (1, 2))
    other = member(b"pages", Random(3).randbytes(8_000_000)) + member(b"z", b"z") + bytes(1024)
    with FakeRegistry() as registry:
        registry.add_image("repo", "latest", [(TAR + "+gzip", said), (TAR, other)])
        assert len(said) == len(sent)
        registry.blobs[str(Digest.of(said))] = sent
        registry.script[BLOB + str(Digest.of(said)), None] = slow = Paused((300_000,))
        with raw(registry, tmp_path) as mount:
            assert os.stat(mount.path / "pages").st_size == 8_000_000
            registry.script[BLOB + str(Digest.of(other)), None] = SILENT
            command = ["dd", f"if={mount.path}/pages", "of=/dev/null", "bs=4k", "count=1", "skip=1000"]
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as reading:
                wait_for("a thread in the kernel", lambda: waits_there(reading))
                slow.go_on.release(100)  # it is asked for again
                wait_for("the end of the layer", lambda: bool(mount.status()["errors"]), patience=30, step=0.2)
                time.sleep(0.2)
                assert reading.poll() is None
                end(mount, how)
                assert_ends(reading, mount.pid)
