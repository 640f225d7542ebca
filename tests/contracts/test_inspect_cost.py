"""What `ckptfs inspect` fetches of large images, in bytes and round trips, by format.

The pages are emulated: a sparse file whose chunks all differ, or random bytes where a share of the compressed size
counts. A real process of 1 GB, 570 MB compressed, from docker-registry, measured once (24 November 2026): pushed by us
147 KB in 3 round trips (0.03 %), eStargz with chunks of 4 MiB 285 KB in 4 (0.05 %), zstd:chunked by buildah 779 KB in 4
(0.14 %).
"""

import os
from pathlib import Path
from typing import Any

import pytest

from ckptfs.model.oci import Manifest, Reference
from ckptfs.settings import GiB, KiB, MiB
from ckptfs.sources.layout import LayoutSource
from tests.support.chunked import add_chunked
from tests.support.command import ckptfs
from tests.support.fake_registry import FakeRegistry
from tests.support.images import flat_layout
from tests.support.push import push_to_layout, tree_images
from tests.support.stargz import estargz_of
from tests.support.tars import tar_of

COMPRESSIBLE = 1 * GiB
RANDOM = 96 * MiB


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three processes, as an engine exports them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return flat_layout(tree_images(folder / "images"), folder / "flat", name="tree")


def inspected(registry: FakeRegistry, cache: Path) -> dict[str, Any]:
    result = ckptfs("inspect", registry.reference("repo:latest"), "--json", "--cache-dir", cache)
    assert result.code == 0, result.err
    found: dict[str, Any] = result.json
    (container,) = found["containers"]
    assert container["process_tree"]["command"] == "tree" and len(container["process_tree"]["children"]) == 2
    return found


def test_a_pushed_image_of_1_gb(checkpoint: Path, tmp_path: Path) -> None:
    pages = checkpoint / "checkpoint" / "pages-99.img"
    try:
        with pages.open("wb") as file:
            for at in range(0, COMPRESSIBLE, 64 * KiB):  # no two chunks are the same, or their table would be small
                file.seek(at)
                file.write(os.urandom(8))
            file.truncate(COMPRESSIBLE)
        push_to_layout(checkpoint, tmp_path / "image")
    finally:
        pages.unlink()
    manifest = LayoutSource(Reference.parse(f"oci:{tmp_path}/image:latest")).resolve()
    assert isinstance(manifest, Manifest)
    with FakeRegistry() as registry:
        registry.add_layout(tmp_path / "image", "repo")
        found = inspected(registry, tmp_path / "cache")
    assert found["containers"][0]["checkpoint_size"]["memory_pages_size"] > COMPRESSIBLE
    assert found["fetched_bytes"] <= 256 * KiB and found["round_trips"] <= 6


@pytest.mark.parametrize("kind", ["zstd:chunked", "eStargz"])
def test_a_hundredth_of_what_others_made(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    files = {
        os.fsencode(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()
    }
    files[b"checkpoint/pages-99.img"] = os.urandom(RANDOM)
    with FakeRegistry() as registry:
        if kind == "eStargz":
            layer = estargz_of(tar_of({os.fsdecode(path): data for path, data in files.items()}), 4 * MiB)
            notes = layer.descriptor.annotations
            registry.add_image("repo", "latest", [(layer.descriptor.media_type, layer.data)], layer_annotations=[notes])
        else:
            add_chunked(registry, files, 256 * KiB)
        found = inspected(registry, tmp_path / "cache")
    assert found["image_bytes"] > RANDOM
    assert found["fetched_bytes"] <= found["image_bytes"] / 100
