"""Containers of crun: podman checkpoints them, crun restores them, lazily although it has no word for that."""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.command import ckptfs
from tests.support.criu import require_criu
from tests.support.docker_registry import DockerRegistry
from tests.support.isolation import Isolation
from tests.support.podman import BASE, Podman, require_podman
from tests.support.restored import restored
from tests.support.tools import run, unavailable

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]


@dataclass(frozen=True)
class Container:
    reference: str
    base: str
    last_tick: int


@pytest.fixture(scope="module")
def podman(scratch_folder: Path) -> Iterator[Podman]:
    """A podman whose runtime is crun, with BASE."""
    require_criu()
    require_podman()
    crun = shutil.which("crun")
    if crun is None or "+CRIU" not in run(crun, "--version").stdout:
        unavailable("needs a crun built with criu")
    folder = scratch_folder / "crun"
    folder.mkdir()
    with Isolation(folder / "storage", hybrid=False) as isolation, Podman(isolation, folder, crun or "") as podman:
        podman.build_base()
        yield podman


@pytest.fixture(scope="module")
def container(podman: Podman, registry: DockerRegistry, scratch_folder: Path) -> Container:
    """Of 16 MB, run and checkpointed by crun."""
    podman.run_ticker("crunning", 16)
    archive = scratch_folder / "crunning.tar"
    podman("container", "checkpoint", f"--export={archive}", "--compress=none", "--leave-running", "crunning")
    last = podman.ticks("crunning")[-1].number
    podman("rm", "--force", "--time=0", "crunning")
    reference = registry.reference("crun/ticker:1")
    assert ckptfs("push", archive, reference).code == 0
    return Container(reference, podman.push(BASE, registry.reference("crun/base:1")), last)


@pytest.mark.parametrize("options", [[], ["--no-lazy-pages"], ["--runtime", "crun"]], ids=["lazy", "plain", "named"])
def test_a_container_runs_again(options: list[str], podman: Podman, container: Container, tmp_path: Path) -> None:
    words = (container.reference, "--base", container.base, *options)
    with restored(tmp_path, *words, prefix=podman.isolation.enter) as found:
        found.assert_continues(container.last_tick)
        found.assert_delta()
        assert found.first["runtime"] == "crun" and found.first["lazy"] == ("--no-lazy-pages" not in options)
        if found.first["lazy"]:
            assert found.process.stdout is not None
            assert json.loads(found.process.stdout.readline())["event"] == "resident"
    assert (found.code, found.err) == (0, "")
    assert found.events[-1]["exit_code"] == 128 + signal.SIGKILL


def test_others_are_refused(container: Container, tmp_path: Path) -> None:
    """runc hands other mounts to criu; engines cannot say to crun where the images are."""
    common = ("--base", container.base, "--cache-dir", tmp_path / "cache", "--dir", tmp_path / "place")
    done = ckptfs("restore", container.reference, *common, "--runtime", "runc")
    assert done.code == 8 and "made with crun, and runc cannot restore it" in done.line
    done = ckptfs("restore", container.reference, *common[2:], "--engine", "podman")
    assert done.code == 8 and "made with crun" in done.line and "leave --engine out" in done.line
