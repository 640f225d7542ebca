"""Docker's checkpoints: pushed as they are, and a container that dockerd starts again out of a mount."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import ckptfs
from tests.support.criu import require_criu
from tests.support.docker import Docker, require_docker
from tests.support.docker_registry import DockerRegistry
from tests.support.isolation import Isolation
from tests.support.tools import ROOT, wait_for
from tests.support.workload import scratch

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    require_docker()
    require_criu()
    with scratch() as name:
        folder = Path(name)
        (folder / "storage").mkdir()
        with Isolation(folder / "storage") as isolation, Docker(isolation, folder) as daemon:
            yield daemon


def test_a_container_starts_out_of_a_mount(docker: Docker, registry: DockerRegistry, tmp_path: Path) -> None:
    docker.run_ticker("ticking", 16)
    docker("checkpoint", "create", "--checkpoint-dir", tmp_path, "ticking", "one")
    reference = registry.reference("docker/ticker:1")
    pushed = ckptfs("push", tmp_path / "one", reference)
    assert pushed.code == 0, pushed.err
    assert "ticker" in ckptfs("inspect", reference, "--ps-tree", "--cache-dir", tmp_path / "cache").out

    before, place = docker.ticks("ticking"), docker.checkpoints("ticking")
    assert not list(place.iterdir()), "dockerd has nothing of its own"
    command = (sys.executable, "-m", "ckptfs")  # dockerd's data is a mount of its own, in its namespace
    docker.isolation.run(*command, "mount", reference, place, "--cache-dir", tmp_path / "cache", cwd=ROOT)
    try:
        assert docker("checkpoint", "ls", "ticking").split()[-1] == "checkpoint"
        docker("start", "--checkpoint", "checkpoint", "ticking")
        wait_for("it goes on", lambda: len(docker.ticks("ticking")) > len(before) + 3)
    finally:
        docker.isolation.run(*command, "umount", place, cwd=ROOT)
    ticks = docker.ticks("ticking")
    assert ticks == list(range(ticks[0], ticks[0] + len(ticks))), "it goes on where it was"
    assert docker("inspect", "--format", "{{.State.Status}}", "ticking") == "running"
