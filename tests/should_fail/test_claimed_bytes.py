"""Sizes that a manifest claims: each chunk of a plain tar is gone through one by one, of 2**60 bytes 2**42 chunks."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ckptfs.engine.cache import ChunkCache
from ckptfs.errors import LimitExceeded
from ckptfs.image.resolve import find_image, resolve
from ckptfs.image.views import CRIU_TAR
from ckptfs.model.oci import OCI_INDEX, Manifest, Reference, parse_document
from ckptfs.settings import Limits
from ckptfs.sources.layout import LayoutSource
from tests.support.blobs import blob_of
from tests.support.command import ckptfs
from tests.support.tars import header
from tests.support.trees import layout_with

pytestmark = pytest.mark.row("M3")

LIMITS = Limits()
MOST = LIMITS.image_bytes


def claiming(folder: Path, sizes: Sequence[int]) -> Path:
    """An image whose layers begin as plain tars of such sizes do."""
    blobs = [blob_of(header(b"huge-%d" % number, size // 2)) for number, size in enumerate(sizes)]
    claims = zip(blobs, sizes, strict=True)
    return layout_with(folder, [replace(blob, descriptor=blob.descriptor._replace(size=size)) for blob, size in claims])


def test_as_many_bytes_as_the_limit_says(tmp_path: Path) -> None:
    def resolved(*sizes: int) -> Manifest:
        layout = claiming(tmp_path / str(len(list(tmp_path.iterdir()))), sizes)
        with ChunkCache.ephemeral() as cache:
            return resolve(LayoutSource(Reference("oci", path=str(layout)), LIMITS), cache, LIMITS).manifest

    assert len(resolved(MOST - 1, 1).layers) == 2
    with pytest.raises(LimitExceeded, match=f"{MOST + 1} bytes, more than {MOST}"):
        resolved(MOST, 1)


def test_raw_blobs_of_containerd_have_the_same_limit() -> None:
    def found(size: int) -> object:
        blob = {"mediaType": CRIU_TAR, "digest": "sha256:" + "1" * 64, "size": size}
        raw = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [blob]}).encode()
        return find_image(parse_document(raw), lambda descriptor: b"", LIMITS)

    assert found(MOST)
    with pytest.raises(LimitExceeded, match="more than"):
        found(MOST + 1)


@pytest.mark.parametrize("command", ["ls IMAGE", "pull IMAGE OUT", "push IMAGE oci:OUT:tag", "cache warm IMAGE"])
def test_an_image_that_claims_exabytes_is_refused_at_once(command: str, tmp_path: Path) -> None:
    layout = claiming(tmp_path / "layout", [1 << 60])
    words = command.replace("IMAGE", f"oci:{layout}:latest").replace("OUT", str(tmp_path / "out")).split()
    done = ckptfs(*words, env={"CKPTFS_CACHE_DIR": str(tmp_path / "cache")}, timeout=20)
    assert done.code == 7 and f"{1 << 60} bytes, more than {MOST}" in done.line, done
    assert not (tmp_path / "out/index.json").exists()
