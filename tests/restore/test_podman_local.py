"""podman's own checkpoints restore here: what a restore from a mounted image is compared with."""

import json
import tarfile
from pathlib import Path

import pytest

from tests.support.images import extract
from tests.support.podman import COMPRESSIONS, Podman, PodmanCheckpoint
from tests.support.tools import wait_for

pytestmark = pytest.mark.restore


@pytest.mark.parametrize("source", [*COMPRESSIONS, "image"])
def test_a_container_continues(source: str, podman: Podman, podman_checkpoint: PodmanCheckpoint) -> None:
    podman.restore("again", podman_checkpoint.archives.get(source, podman_checkpoint.image))
    try:
        before = podman_checkpoint.last_tick[source]
        ticks = wait_for("another tick", lambda: [t for t in podman.ticks("again") if t.number > before])
        assert ticks[0].number == before + 1
        root = podman.isolation.path(podman("mount", "again"))
        assert (root / "data/added.txt").read_text() == "added\n"
        assert (root / "etc/os-release").read_text() == "changed\n"
        assert not (root / "data/deleted.txt").exists()
        assert not (root / "data/deleted-folder").exists()
    finally:
        podman("rm", "--force", "--time=0", "again")


def test_the_archive_has_the_delta(podman_checkpoint: PodmanCheckpoint) -> None:
    with tarfile.open(podman_checkpoint.archives["gzip"]) as archive:
        names = set(archive.getnames())
        assert {"checkpoint/inventory.img", "checkpoint/pages-1.img", "config.dump", "rootfs-diff.tar"} <= names
        deleted = json.load(archive.extractfile("deleted.files"))  # type: ignore[arg-type]
    assert set(deleted) == {"/data/deleted.txt", "/data/deleted-folder"}


def test_the_images_hold_what_the_archive_holds(
    podman_image_refs: dict[str, str], podman_checkpoint: PodmanCheckpoint, tmp_path: Path
) -> None:
    with tarfile.open(podman_checkpoint.archives["none"]) as archive:
        names = {name for name in archive.getnames() if name != "."}
    for kind, reference in podman_image_refs.items():
        root = extract(reference, tmp_path / kind.replace(":", "-"))
        found = {str(path.relative_to(root)) for path in root.rglob("*")}
        assert names <= found if kind != "created" else {"config.dump", "checkpoint/inventory.img"} <= found
