"""`ckptfs inspect` against a real registry: the same answer in every format, and for how little."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import ckptfs
from tests.support.criu import Checkpoint
from tests.support.docker_registry import DockerRegistry
from tests.support.images import FORMATS, flat_layout
from tests.support.push import push_to_layout
from tests.support.tools import run

pytestmark = [pytest.mark.registry, pytest.mark.restore]


@pytest.fixture(scope="module")
def pushed(tree_checkpoint: Checkpoint, registry: DockerRegistry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The process tree as we push it."""
    folder = tmp_path_factory.mktemp("pushed")
    push_to_layout(flat_layout(tree_checkpoint.images, folder / "flat", name="tree"), folder / "image")
    reference = registry.reference("inspect:pushed")
    run("skopeo", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false",
        f"oci:{folder}/image", f"docker://{reference}")  # fmt: skip
    return reference


def inspected(reference: str, cache: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the container, the traffic)."""
    result = ckptfs("inspect", reference, "--json", "--cache-dir", cache)
    assert result.code == 0, result.err
    (container,) = result.json["containers"]
    return container, result.json


def test_formats_agree_and_pushed_images_cost_least(
    tree_image_refs: dict[str, str], pushed: str, tree_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first, traffic = inspected(pushed, tmp_path / "pushed")
    assert [first["process_tree"]["command"]] == ["tree"] and len(first["process_tree"]["children"]) == 2
    assert first["checkpoint_size"]["memory_pages_size"] > 16 << 20
    assert traffic["fetched_bytes"] <= 256 * 1024 and traffic["round_trips"] <= 6
    for name in FORMATS:
        other, costs = inspected(tree_image_refs[name], tmp_path / name)
        assert other == first, name
        if name == "zstd:chunked":
            assert costs["fetched_bytes"] <= 0.02 * costs["image_bytes"] and costs["round_trips"] <= 6
        shutil.rmtree(tmp_path / name)
    again, warm = inspected(pushed, tmp_path / "pushed")
    assert again == first and warm["fetched_bytes"] < traffic["fetched_bytes"]
    offline = ckptfs("inspect", pushed, "--offline", "--json", "--cache-dir", tmp_path / "pushed")
    assert offline.code == 0 and offline.json["requests"] == 0 and offline.json["containers"] == [first]


def test_what_the_registry_has_not(pushed: str, tmp_path: Path) -> None:
    missing = ckptfs("inspect", pushed.replace(":pushed", ":other"), "--cache-dir", tmp_path)
    assert missing.code == 3 and "other" in missing.line
