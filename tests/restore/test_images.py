"""The images that tests mount: every format holds the same files, and what a registry gives back restores."""

import filecmp
from pathlib import Path
from typing import Any

import pytest

from tests.support.criu import Checkpoint, restore
from tests.support.docker_registry import DockerRegistry
from tests.support.images import CRIO_NAME, FORMATS, extract

pytestmark = [pytest.mark.restore, pytest.mark.registry]


@pytest.mark.parametrize("compression", FORMATS)
def test_an_eager_extraction_gives_the_files_back(
    compression: str, image_refs: dict[str, str], single_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    root = extract(image_refs[compression], tmp_path / "root")
    assert {"checkpoint", "config.dump", "spec.dump", "stats-dump"} <= {path.name for path in root.iterdir()}
    names = [path.name for path in (root / "checkpoint").iterdir()]
    assert filecmp.cmpfiles(single_checkpoint.images, root / "checkpoint", names, shallow=False) == (names, [], [])


def test_each_format_is_what_it_is_called(image_refs: dict[str, str], registry: DockerRegistry) -> None:
    kinds = {}
    for compression, reference in image_refs.items():
        manifest: Any = registry.manifest(reference.partition("/")[2])
        assert manifest["annotations"][CRIO_NAME] == "single"
        (layer,) = manifest["layers"]
        chunked = "io.containers.zstd-chunked.manifest-position" in layer.get("annotations", {})
        kinds[compression] = layer["mediaType"].rpartition(".")[2] + (" with TOC" if chunked else "")
    assert kinds == {
        "gzip": "tar+gzip",
        "zstd": "tar+zstd",
        "zstd:chunked": "tar+zstd with TOC",
        "uncompressed": "tar",
    }


def test_a_tree_restores_from_an_extracted_image(
    tree_image_refs: dict[str, str], tree_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    root = extract(tree_image_refs["zstd:chunked"], tmp_path / "root")
    with restore(tree_checkpoint, tmp_path / "work", images=root / "checkpoint", lazy=True) as restored:
        restored.assert_continues()
        restored.wait_resident()
