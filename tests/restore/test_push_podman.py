"""A real container, pushed by us, restored by podman; and its root file system as podman shows it."""

import stat
from pathlib import Path

import pytest

from tests.support.command import ckptfs
from tests.support.docker_registry import DockerRegistry
from tests.support.podman import BASE, Podman, PodmanCheckpoint
from tests.support.push import push_to_layout
from tests.support.tools import run, wait_for

pytestmark = [pytest.mark.restore, pytest.mark.registry]


@pytest.fixture(scope="module")
def layout(podman: Podman, podman_checkpoint: PodmanCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint and its root file system in an OCI layout, `ck` and `ck-rootfs`."""
    layout = tmp_path_factory.mktemp("push") / "layout"
    base = podman.isolation.path("/var/lib/containers") / "push-base"
    podman("push", "--quiet", BASE, "oci:/var/lib/containers/push-base:base")
    push_to_layout(podman_checkpoint.archives["zstd"], layout, "ck", base=f"oci:{base}:base")
    return layout


def pull(podman: Podman, registry: DockerRegistry, layout: Path, tag: str) -> str:
    reference = registry.reference(f"push/podman:{tag}")
    run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:{tag}", f"docker://{reference}")
    podman("pull", "--quiet", "--tls-verify=false", reference)
    return reference


def assert_continues(podman: Podman, name: str, before: int) -> None:
    """The container goes on behind tick `before`, and has what it had added to its image."""
    ticks = wait_for("another tick", lambda: [t for t in podman.ticks(name) if t.number > before])
    assert ticks[0].number == before + 1
    root = podman.isolation.path(podman("mount", name))
    assert (root / "data/added.txt").read_text() == "added\n"


def test_podman_pulls_and_restores_it(
    podman: Podman, podman_checkpoint: PodmanCheckpoint, registry: DockerRegistry, layout: Path
) -> None:
    reference = pull(podman, registry, layout, "ck")
    podman.restore("pushed", reference)
    try:
        assert_continues(podman, "pushed", podman_checkpoint.last_tick["zstd"])
    finally:
        podman("rm", "--force", "--time=0", "pushed")
        podman("rmi", "--force", reference)


def test_podman_restores_an_increment(
    podman: Podman, podman_checkpoint: PodmanCheckpoint, registry: DockerRegistry
) -> None:
    """`push --parent`: podman copies checkpoint/ with the parent in it out of the image, and criu reads both."""
    references = [registry.reference(f"push/podman-increment:{number}") for number in (1, 2)]
    assert ckptfs("push", podman_checkpoint.archives["none"], references[0]).code == 0
    pushed = ckptfs("push", podman_checkpoint.archives["zstd"], references[1], "--json", "--parent", references[0])
    assert pushed.code == 0, pushed.err
    assert pushed.json["parent"]["shared"] > pushed.json["parent"]["changed"] > 0
    podman("pull", "--quiet", "--tls-verify=false", references[1])
    podman.restore("increment", references[1])
    try:
        assert_continues(podman, "increment", podman_checkpoint.last_tick["zstd"])
    finally:
        podman("rm", "--force", "--time=0", "increment")
        podman("rmi", "--force", references[1])


def test_podman_mounts_the_root_file_system(podman: Podman, registry: DockerRegistry, layout: Path) -> None:
    reference = pull(podman, registry, layout, "ck-rootfs")
    try:
        root = podman.isolation.path(podman("image", "mount", reference))
        assert (root / "data/added.txt").read_text() == "added\n"
        assert (root / "etc/os-release").read_text() == "changed\n"
        assert (root / "data/kept.txt").read_text() == "data/kept.txt of the base image\n"
        assert (root / "ticker").stat().st_mode & stat.S_IXUSR
        assert not (root / "data/deleted.txt").exists()
        assert not (root / "data/deleted-folder").exists()
    finally:
        podman("image", "umount", "--all")
        podman("rmi", "--force", reference)
