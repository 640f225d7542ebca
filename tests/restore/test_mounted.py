"""criu restores out of a mount: what this project is for, with every format, plain and with lazy pages."""

from pathlib import Path

import pytest

from ckptfs.bench.link import ShapedLink
from tests.support.command import mounted
from tests.support.criu import Checkpoint, restore
from tests.support.docker_registry import DockerRegistry
from tests.support.golden import directory_listing
from tests.support.images import FORMATS, extract

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]


@pytest.mark.parametrize("compression", FORMATS)
@pytest.mark.parametrize("which", ["image_refs", "tree_image_refs", "podman_image_refs"])
def test_every_byte_equals_an_eager_extraction(
    which: str, compression: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    reference = request.getfixturevalue(which)[compression]
    eager = directory_listing(extract(reference, tmp_path / "eager"))
    with mounted(reference, tmp_path, "--view", "raw") as mount:
        assert directory_listing(mount.path) == eager


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
@pytest.mark.parametrize("compression", FORMATS)
def test_a_process_continues(
    compression: str, lazy: bool, image_refs: dict[str, str], single_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with mounted(image_refs[compression], tmp_path) as mount:
        images = mount.path / "checkpoint"
        with restore(single_checkpoint, tmp_path / "work", images=images, lazy=lazy) as restored:
            restored.assert_continues()
            restored.wait_resident()
        assert mount.status()["errors"] == []


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
@pytest.mark.parametrize("compression", ["gzip", "zstd:chunked"])
def test_a_process_tree_continues(
    compression: str, lazy: bool, tree_image_refs: dict[str, str], tree_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with mounted(tree_image_refs[compression], tmp_path) as mount:
        images = mount.path / "checkpoint"
        with restore(tree_checkpoint, tmp_path / "work", images=images, lazy=lazy) as restored:
            restored.assert_continues()
            restored.wait_resident()


def test_the_first_tick_comes_long_before_the_image(
    image_refs: dict[str, str], single_checkpoint: Checkpoint, registry: DockerRegistry, tmp_path: Path
) -> None:
    """Over 20 ms and 200 Mbit/s less than 20 % of the image has come when the process runs; the bench says how soon."""
    repository = image_refs["zstd:chunked"].partition("/")[2]
    with (
        ShapedLink(registry.host) as link,
        mounted(f"{link.address}/{repository}", tmp_path, "--no-background-fetch") as mount,
        restore(single_checkpoint, tmp_path / "work", images=mount.path / "checkpoint", lazy=True) as restored,
    ):
        restored.first_tick()
        assert link.stats().bytes_down < 0.20 * mount.status()["image_bytes"]
        restored.assert_continues()
