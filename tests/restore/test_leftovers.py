"""What restores that were killed have left beside a new one, what only looks like that, and what one must not touch."""

import contextlib
import gzip
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ckptfs.bench.link import ShapedLink
from ckptfs.errors import RestoreError
from ckptfs.interrupts import as_before, interrupt_by
from ckptfs.restore.runtimes import PID_FILE
from ckptfs.restore.workplace import Workplace
from tests.support import runc
from tests.support.blobs import TAR
from tests.support.command import ckptfs, mounted
from tests.support.disks import disk_of
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import FakeRegistry, Trickle
from tests.support.podman import BASE, Podman
from tests.support.restored import assert_nothing_left, processes, start
from tests.support.tars import END, member
from tests.support.tools import require, run, wait_for

# alone: what is left of one that was killed would be told of any other that runs beside it
pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse, pytest.mark.alone]

STATE = "ckptfs-restore.json"


# -- the directory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o1777, 0o700], ids=["where everybody writes", "out of an image"])
def test_a_file_that_names_a_program_runs_nothing(mode: int, tmp_path: Path) -> None:
    """/tmp beside `--dir /restores`; and what `ckptfs pull` has written beside it."""
    require(root=True)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / STATE).write_text(json.dumps({"runtime": str(program), "name": "x"}))
    (shared / "mine").touch()
    if mode & 0o002:
        os.chown(shared / STATE, 65534, 65534)
    shared.chmod(mode)
    with Workplace(tmp_path / "place"):
        assert not (tmp_path / "ran").exists()
        assert (shared / "mine").exists()


@pytest.mark.parametrize(
    "state",
    ["[]", "7", '{"runtime": "runc"}', '{"pid": "\\u0000"}', '{"name": 5}', '{"containerd": 5, "name": "x"}'],
)
def test_a_file_that_says_something_else_is_in_nobodys_way(state: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    (tmp_path / "other" / STATE).write_text(state)
    with Workplace(tmp_path / "place") as place:
        assert (place / "work").is_dir()


def test_nothing_is_left_of_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", "size=1m,nr_inodes=5") as disk:
        with pytest.raises(RestoreError, match="cannot be made: No space left on device; name a place: --dir"):
            Workplace(disk / "place").__enter__()
        assert list(disk.iterdir()) == []


def test_interrupted_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory was left, of which nobody knew what it is: the name could not be used again."""
    mkdir = Path.mkdir

    def made(path: Path, *arguments: Any, **options: Any) -> None:
        mkdir(path, *arguments, **options)
        if path.name == "place":
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Path, "mkdir", made)
    before = interrupt_by(signal.SIGUSR1, once=True)
    try:
        with pytest.raises(KeyboardInterrupt), Workplace(tmp_path / "place"):
            time.sleep(10)
    finally:
        as_before(before)
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("rebooted", [False, True])
def test_a_number_of_before_the_last_boot_is_another_process(rebooted: bool, tmp_path: Path) -> None:
    """After a power cut the service that restores by that name could not begin while anybody had the number."""
    place = tmp_path / "place"
    with Workplace(place) as killed:
        killed.record(runtime="criu", name="killed")
        state = json.loads((place / STATE).read_text())
    (place / "work").mkdir(parents=True)
    (place / "work" / PID_FILE).write_text(str(os.getpid()))
    (place / STATE).write_text(json.dumps(state | ({"boot": "an earlier one"} if rebooted else {})))
    refused = pytest.raises(RestoreError, match="place exists")
    with contextlib.nullcontext() if rebooted else refused, Workplace(place):
        pass


def test_a_mount_beside_it_is_not_waited_for(tmp_path: Path) -> None:
    """A name that a stream has not shown yet is looked for until the stream ends."""
    tar = member(b"first", b"x") + member(b"large", random.Random(1).randbytes(8 << 20)) + END
    with FakeRegistry({("/blobs/", None): Trickle(0.2, 128 * 1024)}) as registry:
        registry.add_image("repo", "latest", [(f"{TAR}+gzip", gzip.compress(tar, 1))])
        with mounted(registry.reference("repo:latest"), tmp_path, "--view", "raw") as mount:
            began = time.monotonic()
            with Workplace(tmp_path / "place"):
                assert time.monotonic() - began < 2
            assert mount.path.exists()


# -- killed on the way -------------------------------------------------------------------------------------------------


def killed_when(there: str, folder: Path, *arguments: object) -> None:
    """The command of a restore, killed once a process with `there` in its command line works for it."""
    process = start(folder, *arguments)
    try:
        wait_for(there, lambda: [words for words in processes(folder / "place") if there in words], patience=30)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):  # the runtime has them, too, and goes on
            assert pipe is not None
            pipe.close()


def sweep(folder: Path, reference: str) -> None:
    """By the next restore beside it; it has no base image and fails."""
    done = ckptfs("restore", reference, "--dir", folder / "other", "--cache-dir", folder / "cache")
    assert done.code == 3, done.err


def test_killed_before_the_runtime_begins(reference: str, base: str, tmp_path: Path) -> None:
    """criu's daemon would wait for ever."""
    killed_when("lazy-pages", tmp_path, reference, "--base", base)
    sweep(tmp_path, reference)
    assert_nothing_left(tmp_path)


def test_killed_while_the_runtime_restores(reference: str, base: str, registry: DockerRegistry, tmp_path: Path) -> None:
    """The runtime goes on. The container is left alone while it lives, and is forgotten by all when it has ended."""
    with ShapedLink(registry.host, rate=20e6) as link:
        here = reference.replace(registry.host, link.address)
        killed_when("runc", tmp_path, here, "--base", base, "--no-lazy-pages")
        noted = tmp_path / "place" / "work" / "container.pid"
        pid = wait_for("the container", lambda: noted.exists() and noted.read_text(), patience=60)
        sweep(tmp_path, reference)
        assert (Path(f"/proc/{pid}/root") / "data/added.txt").read_text() == "added\n"
        os.kill(int(pid), signal.SIGKILL)
        wait_for("its end", lambda: not Path(f"/proc/{pid}/root/data").exists())
        sweep(tmp_path, reference)
    assert_nothing_left(tmp_path)
    assert str(tmp_path) not in run("runc", "list").stdout


def test_a_container_of_the_same_name_is_somebody_elses(tmp_path: Path) -> None:
    """The one that was restored has ended and was deleted; its name has been used again."""
    folder = tmp_path / "bundle"
    with runc.running(folder, "used-again") as pid:
        place = tmp_path / "place"
        place.mkdir(mode=0o700)
        (place / STATE).write_text('{"runtime": "runc", "name": "used-again"}')
        with Workplace(tmp_path / "next"):
            pass
        assert not place.exists()
        assert Path(f"/proc/{pid}/root/data").exists()


def test_interrupted_while_podman_mounts_the_base(podman: Podman, reference: str, tmp_path: Path) -> None:
    process = start(tmp_path, reference, "--base", f"containers-storage:{BASE}", prefix=podman.isolation.enter)
    mounting = ("podman", "image", "mount")

    def begun() -> bool:
        lines = [path.read_bytes().split(b"\0") for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return any([os.fsdecode(word) for word in line[:3]] == [*mounting] for line in lines)

    wait_for("podman", begun, step=0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "ckptfs: interrupted\n")
    assert podman("image", "mount") == ""
    assert_nothing_left(tmp_path)


def test_of_two_restores_with_one_name_exactly_one_wins(reference: str, base: str, tmp_path: Path) -> None:
    """At the same moment, in two directories; who comes second leaves the first one's container and cgroups alone."""
    common = (reference, "--base", base, "--name", "twice")
    begun = [start(tmp_path / folder, *common) for folder in ("one", "two")]
    lines = [process.stdout.readline() if process.stdout is not None else "" for process in begun]
    assert sorted(map(bool, lines)) == [False, True], [process.communicate(timeout=60) for process in begun]
    winner, loser = begun if lines[0] else reversed(begun)
    pid = json.loads(max(lines))["pid"]
    try:
        said = "another restore has the name twice; give another --name"
        _, err = loser.communicate(timeout=60)
        assert loser.returncode == 8 and said in err
        cgroup = next(path for path in Path("/sys/fs/cgroup").glob("*/ckptfs-twice"))
        (cgroup / "inner").mkdir()
        late = ckptfs("restore", *common, "--dir", tmp_path / "late", "--cache-dir", tmp_path / "late-cache")
        assert late.code == 8 and said in late.line
        assert (cgroup / "inner").is_dir()
        assert (Path(f"/proc/{pid}/root") / "data/added.txt").read_text() == "added\n"
        assert str(tmp_path) in run("runc", "list").stdout
    finally:
        os.kill(pid, signal.SIGKILL)
        winner.communicate(timeout=60)
    for folder in ("one", "two"):
        assert_nothing_left(tmp_path / folder)
    assert not (tmp_path / "late").exists()
