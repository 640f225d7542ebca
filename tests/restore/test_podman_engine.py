"""`ckptfs restore --engine podman`, interrupted, or one of two: podman has what was restored, and nothing else."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs.bench.link import ShapedLink
from tests.support.command import ckptfs
from tests.support.docker_registry import DockerRegistry
from tests.support.podman import Podman
from tests.support.restored import assert_nothing_left, start

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]

ENGINE = ("--engine", "podman")


@pytest.fixture(scope="module")
def reference(podman: Podman, registry: DockerRegistry, scratch_folder: Path) -> str:
    """A container of 32 MB."""
    podman.run_ticker("engine", 32)
    podman("container", "checkpoint", f"--export={scratch_folder}/engine.tar", "--compress=none", "engine")
    podman("rm", "engine")
    reference = registry.reference("engine/podman:1")
    assert ckptfs("push", scratch_folder / "engine.tar", reference).code == 0
    return reference


@pytest.fixture(autouse=True)
def settings(podman: Podman, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """podman as this machine needs it; it has no container afterwards."""
    file = tmp_path / "containers.conf"
    file.write_text('[engine]\nruntime="runc"\ncgroup_manager="cgroupfs"\nevents_logger="file"\n')
    monkeypatch.setenv("CONTAINERS_CONF", str(file))
    try:
        yield
        assert podman("ps", "--all", "--quiet") == ""
        assert podman.isolation.run("runc", "list", "-q").stdout == ""
    finally:
        podman("rm", "--all", "--force", "--time=0")


def test_interrupted_before_all_memory_is_here(
    reference: str, podman: Podman, registry: DockerRegistry, tmp_path: Path
) -> None:
    """A container without the rest of its memory is of no use, and this is no success."""
    with ShapedLink(registry.host, rate=20e6) as link:
        here = reference.replace(registry.host, link.address)
        process = start(tmp_path, here, *ENGINE, prefix=podman.isolation.enter)
        assert process.stdout is not None and "running" in process.stdout.readline()
        time.sleep(0.3)  # until it waits for the pages
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "ckptfs: interrupted\n")
    assert_nothing_left(tmp_path)


def test_two_at_once(reference: str, podman: Podman, tmp_path: Path) -> None:
    """Under the name that the container had: one gets it, and the other does not touch it."""
    for _ in range(4):
        folders = [tmp_path / name for name in ("one", "two")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        begun = [start(folder, reference, *ENGINE, prefix=podman.isolation.enter) for folder in folders]
        said = [process.communicate(timeout=60)[1] for process in begun]
        assert sorted(process.returncode for process in begun) == [0, 8], said
        assert podman("ps", "--format={{.Names}}") == "engine", said
        podman("rm", "--force", "--time=0", "engine")
        for folder in folders:
            assert_nothing_left(folder)


def test_a_name_is_given_before_what_podman_gets(reference: str, podman: Podman, tmp_path: Path) -> None:
    """podman took the last one: nobody waited for the pages of a container of another name, and it lost them."""
    for words in (("--name", "other"), ("--name=other",), ("-nother",)):
        process = start(tmp_path, reference, *ENGINE, extra=words, prefix=podman.isolation.enter)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (2, "") and "give --name before --" in err
        assert_nothing_left(tmp_path)


def test_connections(reference: str, podman: Podman, tmp_path: Path) -> None:
    """podman takes no name for a container that has some: it is restored as the one that it was."""
    process = start(tmp_path, reference, *ENGINE, extra=("--tcp-established",), prefix=podman.isolation.enter)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), out
    assert podman("ps", "--format={{.Names}}") == "engine"
    podman("rm", "--force", "--time=0", "engine")
    assert_nothing_left(tmp_path)
