"""`ckptfs restore --engine containerd`: checkpoints by `ctr` with runc and criu, restored by an unmodified containerd
out of a mount; and what is said where it cannot be."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptfs.bench.link import ShapedLink
from tests.support import runc
from tests.support.command import ckptfs
from tests.support.containerd import Containerd, require_containerd
from tests.support.docker_registry import DockerRegistry
from tests.support.pages import blocks
from tests.support.podman import BASE, Podman
from tests.support.push import push_to_layout
from tests.support.restored import assert_nothing_left, restored, start
from tests.support.tools import ROOT, wait_for

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]

ENGINE = ("--engine", "containerd")


@dataclass(frozen=True)
class Pushed:
    reference: str
    last_tick: int
    base: str


@pytest.fixture(scope="module")
def containerd(podman: Podman, scratch_folder: Path) -> Iterator[Containerd]:
    require_containerd()
    folder = scratch_folder / "containerd"
    folder.mkdir()
    with Containerd(podman, folder) as containerd:
        yield containerd


@pytest.fixture(scope="module")
def pushed(podman: Podman, containerd: Containerd, registry: DockerRegistry, scratch_folder: Path) -> Pushed:
    """A container of 64 MB, checkpointed with its task and its changes, exported and pushed."""
    containerd.run_ticker("ticking", 64)
    last = containerd.ticks("ticking")[-1].number + 100  # it goes on for as long as the checkpoint takes
    containerd.checkpoint("ticking", scratch_folder / "containerd.tar")
    reference = registry.reference("containerd/ticking:1")
    assert ckptfs("push", scratch_folder / "containerd.tar", reference).code == 0
    return Pushed(reference, last, podman.push(BASE, registry.reference("containerd/base:1")))


@pytest.fixture(autouse=True)
def address(containerd: Containerd, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands find our containerd, which has nothing afterwards."""
    monkeypatch.setenv("CONTAINERD_ADDRESS", str(containerd.address))
    yield
    assert containerd("tasks", "list", "-q") == containerd("containers", "list", "-q") == ""


@pytest.mark.parametrize("options", [[], ["--no-lazy-pages"]], ids=["lazy", "plain"])
def test_a_container_runs_again(options: list[str], pushed: Pushed, containerd: Containerd, tmp_path: Path) -> None:
    words = (pushed.reference, *ENGINE, "--base", pushed.base, "--name", "again", *options)
    with restored(tmp_path, *words, prefix=containerd.isolation.enter) as container:
        container.assert_continues(pushed.last_tick)
        container.assert_delta()
        assert container.first["engine"] == "containerd" and container.first["lazy"] == (not options)
        assert containerd.pid("again") == container.pid
        if not options:
            assert container.process.stdout is not None
            assert json.loads(container.process.stdout.readline())["event"] == "resident"
        containerd("tasks", "kill", "--signal", "KILL", "again")
    assert (container.code, container.err) == (0, "")
    assert container.events[-1]["exit_code"] == 128 + signal.SIGKILL


def test_it_is_checkpointed_again(pushed: Pushed, containerd: Containerd, tmp_path: Path) -> None:
    """By containerd, once all its memory is here: what criu was told for the restore is not for its next dump."""
    images = containerd.isolation.path("/var/lib/containers/again")
    with restored(
        tmp_path, pushed.reference, *ENGINE, "--base", pushed.base, "--name", "again", prefix=containerd.isolation.enter
    ) as container:
        assert container.process.stdout is not None
        assert json.loads(container.process.stdout.readline())["event"] == "resident"
        images.mkdir()
        containerd("tasks", "checkpoint", "--image-path=/var/lib/containers/again", "again")
        assert sum(path.stat().st_size for path in images.glob("pages-*.img")) > 60 << 20


def test_by_our_own_runc(pushed: Pushed, tmp_path: Path) -> None:
    """containerd's checkpoints need no containerd: the spec is in them."""
    with restored(tmp_path, pushed.reference, "--base", pushed.base) as container:
        container.assert_continues(pushed.last_tick)
        container.assert_delta()


def test_what_it_says_is_heard(
    pushed: Pushed, containerd: Containerd, registry: DockerRegistry, scratch_folder: Path, tmp_path: Path
) -> None:
    """Standard output goes through containerd and the command; the signals of the command end the container."""
    containerd.run_talker("talking", scratch_folder / "talking.log")
    containerd.checkpoint("talking", scratch_folder / "talking.tar")
    reference = registry.reference("containerd/talking:1")
    assert ckptfs("push", scratch_folder / "talking.tar", reference).code == 0
    words = ["restore", reference, *ENGINE, "--base", pushed.base, "--dir", tmp_path / "place"]
    command = [*containerd.isolation.enter, sys.executable, "-m", "ckptfs", *words, "--cache-dir", tmp_path / "cache"]
    heard = tmp_path / "heard"
    with heard.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.PIPE, text=True)
    wait_for("a tick", lambda: "tick" in heard.read_text(), patience=60)
    process.send_signal(signal.SIGTERM)  # the ticker does not listen
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "runs as process" in err
    numbers = [int(line.split()[2]) for line in heard.read_text().splitlines() if line.startswith("ticker tick")]
    assert numbers[0] > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert_nothing_left(tmp_path)


def test_the_name_is_taken(pushed: Pushed, containerd: Containerd, tmp_path: Path) -> None:
    words = (pushed.reference, *ENGINE, "--base", pushed.base, "--name", "taken")
    with restored(tmp_path, *words, prefix=containerd.isolation.enter):
        (tmp_path / "second").mkdir()
        process = start(tmp_path / "second", *words, prefix=containerd.isolation.enter)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (8, "") and "give another --name" in err
        assert containerd.pid("taken")  # it was not touched


@pytest.mark.parametrize("seconds", [0.7, 1.0, 2.0])
def test_interrupted_on_the_way(
    seconds: float, pushed: Pushed, containerd: Containerd, registry: DockerRegistry, tmp_path: Path
) -> None:
    with ShapedLink(registry.host, rate=10e6) as link:
        here = pushed.reference.replace(registry.host, link.address)
        words = (here, *ENGINE, "--base", pushed.base, "--no-lazy-pages")
        process = start(tmp_path, *words, prefix=containerd.isolation.enter)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "ckptfs: interrupted\n")
    assert_nothing_left(tmp_path)


def test_detached(pushed: Pushed, containerd: Containerd, tmp_path: Path) -> None:
    place = tmp_path / "place"
    words = ["restore", pushed.reference, *ENGINE, "--base", pushed.base, "--detach", "--json", "--name", "alone"]
    options = ["--dir", place, "--cache-dir", tmp_path / "cache"]
    done = containerd.isolation.run(sys.executable, "-m", "ckptfs", *words, *options, env=dict(os.environ))
    assert json.loads(done.stdout)["pid"] == containerd.pid("alone")
    containerd("tasks", "kill", "--signal", "KILL", "alone")
    wait_for("the directory to go", lambda: not place.exists())
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("detach", [(), ("--detach",)], ids=["heard", "not heard"])
def test_a_terminal(detach: tuple[str, ...], containerd: Containerd, scratch_folder: Path, tmp_path: Path) -> None:
    """The container has one, whether anybody listens or not."""
    folder = scratch_folder / f"terminal{len(detach)}"
    folder.mkdir()
    push_to_layout(runc.checkpoint(folder, "terminal", terminal=True), folder / "layout")
    words = (f"oci:{folder}/layout:latest", *ENGINE, "--rootfs", folder / "rootfs", "--name", "tty", *detach)
    process = start(tmp_path, *words, prefix=containerd.isolation.enter)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate(timeout=60)
    pid = json.loads(line)["pid"]
    assert os.readlink(f"/proc/{pid}/fd/1").startswith("/dev/pts/")
    containerd("tasks", "kill", "--signal", "KILL", "tty")
    process.communicate(timeout=60)
    wait_for("the directory to go", lambda: not (tmp_path / "place").exists())
    assert_nothing_left(tmp_path)


def test_a_killed_restore_is_swept_by_the_next(pushed: Pushed, containerd: Containerd, tmp_path: Path) -> None:
    process = start(tmp_path, pushed.reference, *ENGINE, "--base", pushed.base, prefix=containerd.isolation.enter)
    assert process.stdout is not None
    pid = json.loads(process.stdout.readline())["pid"]
    process.kill()
    process.communicate()
    os.kill(pid, signal.SIGKILL)
    wait_for("the end of the task", lambda: "STOPPED" in containerd("tasks", "list"))
    assert (tmp_path / "place").exists()
    words = (pushed.reference, *ENGINE, "--dir", tmp_path / "other", "--cache-dir", tmp_path / "cache")
    command = [*containerd.isolation.enter, sys.executable, "-m", "ckptfs", "restore", *words]
    failed = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert failed.returncode == 3, failed.stderr  # no base image
    assert containerd("containers", "list", "-q") == ""
    assert_nothing_left(tmp_path)


def test_as_the_page_says(pushed: Pushed, containerd: Containerd, tmp_path: Path) -> None:
    """docs/restore.md: its block on containerd."""
    (block,) = (text for text in blocks(ROOT / "docs" / "restore.md") if "--engine containerd" in text)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ckptfs").write_text(f'#!/bin/sh\nexec {sys.executable} -m ckptfs "$@"\n')
    (tmp_path / "bin" / "ckptfs").chmod(0o755)
    for theirs, ours in (("localhost:5000/counter:1", pushed.reference), ("localhost:5000/base:1", pushed.base)):
        block = block.replace(theirs, ours)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment["CKPTFS_CACHE_DIR"] = str(tmp_path / "cache")
    said = containerd.isolation.run("sh", "-ec", block, env=environment).stdout
    assert re.search(r"^again +\d+ +RUNNING", said, re.MULTILINE)
    containerd("tasks", "kill", "--signal", "KILL", "again")
    wait_for("the end", lambda: not containerd("containers", "list", "-q"))


def test_check_says_yes(pushed: Pushed, tmp_path: Path) -> None:
    common = ("--base", pushed.base, "--cache-dir", tmp_path / "cache")
    done = ckptfs("check", pushed.reference, *common, *ENGINE, "--json")
    assert done.code == 0, done.out
    assert {"grpcio", "containerd", "lazy pages", "base image"} <= {one["subject"] for one in done.json["findings"]}


def test_what_cannot_be(pushed: Pushed, tmp_path: Path) -> None:
    common = ["--base", pushed.base, "--cache-dir", tmp_path / "cache"]
    nowhere = {"CONTAINERD_ADDRESS": str(tmp_path / "nothing.sock")}
    deaf = {"CONTAINERD_ADDRESS": str(tmp_path / "deaf.sock")}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(deaf["CONTAINERD_ADDRESS"])
    cases: list[tuple[list[str], dict[str, str], int, str]] = [
        ([], nowhere, 8, "containerd does not listen at"),
        ([], deaf, 5, "containerd does not answer"),
        (["--runtime", "crun"], {}, 2, "containerd restores with runc"),
        (["--", "--shell-job", "word"], {}, 2, "options of criu"),
    ]
    for words, environment, code, said in cases:
        done = ckptfs("restore", pushed.reference, *common, *ENGINE, *words, env=environment)
        assert (done.code, done.out) == (code, "") and said in done.line, done
    done = ckptfs("check", pushed.reference, *common, *ENGINE, "--json", env=nowhere)
    assert done.code == 8 and done.json["ok"] is False
    program = "import sys; sys.modules['grpc'] = None; from ckptfs.cli import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "restore", pushed.reference, *common, *ENGINE]
    without = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert without.returncode == 8 and "pip install 'ckptfs[containerd]'" in without.stderr
