"""The root file system that podman's own restore makes is the one that the views show."""

from pathlib import Path

import pytest

from tests.support import golden
from tests.support.command import mounted
from tests.support.docker_registry import DockerRegistry
from tests.support.podman import BASE, OUTPUT, Podman, PodmanCheckpoint
from tests.support.tools import run
from tests.support.views import Entries, without

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]

# What podman puts into every container, and what the container goes on writing.
OWN = ("etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/mtab", "run", "proc", "sys", "dev", OUTPUT.lstrip("/"))


def listing(folder: Path) -> Entries:
    entries: Entries = without(golden.directory_listing(folder)["entries"], *OWN)
    for entry in entries.values():
        if entry["type"] == "dir":
            del entry["mtime"], entry["mtime_ns"]
        else:
            entry["mtime_ns"] = entry["mtime"]  # podman unpacks whole seconds
    return entries


@pytest.mark.parametrize("source", ["none", "gzip", "zstd"])
def test_views_show_what_podman_restores(
    source: str, podman: Podman, podman_checkpoint: PodmanCheckpoint, registry: DockerRegistry, tmp_path: Path
) -> None:
    archive = podman_checkpoint.archives[source]
    podman.restore("engine-root", archive)
    try:
        expected = listing(podman.isolation.path(podman("mount", "engine-root")))
    finally:
        podman("rm", "--force", "--time=0", "engine-root")
    base = podman.push(BASE, registry.reference("engine/base:1"))
    with mounted(f"archive:{archive}", tmp_path, "--view", "rootfs", "--base", base) as mount:
        assert listing(mount.path) == expected
    lower = tmp_path / "lower"
    (tmp_path / "merged").mkdir()
    with mounted(base, tmp_path / "base", "--view", "raw") as mount:
        run("cp", "-a", mount.path, lower)
    with mounted(f"archive:{archive}", tmp_path, "--base", base) as mount:
        layers = f"lowerdir={mount.path}/rootfs-diff:{lower}"
        run("mount", "-t", "overlay", "overlay", "-o", layers, tmp_path / "merged")
        try:
            assert listing(tmp_path / "merged") == expected
        finally:
            run("umount", tmp_path / "merged")
