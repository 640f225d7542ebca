"""An index of indexes is legal, a chain of them an attack: followed to Limits.index_depth, refused one past it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptfs.engine.cache import ChunkCache
from ckptfs.errors import FormatError
from ckptfs.image.resolve import resolve
from ckptfs.model.oci import OCI_INDEX, Manifest, Reference
from ckptfs.push.image_files import select_manifest
from ckptfs.settings import Settings
from ckptfs.sources import Source
from ckptfs.sources.layout import LayoutSource
from tests.support.blobs import blob_of
from tests.support.tars import END
from tests.support.trees import layout_with

SETTINGS = Settings()


def mounted(source: Source) -> Manifest:
    with ChunkCache.ephemeral() as cache:
        return resolve(source, cache, SETTINGS.limits).manifest


def pushed(source: Source) -> Manifest:
    return select_manifest(source, SETTINGS)


def nested(folder: Path, indexes: int) -> Source:
    """The manifest of an image below so many indexes."""
    layout = layout_with(folder, [blob_of(END)])
    for _ in range(indexes):
        index = blob_of((layout / "index.json").read_bytes(), OCI_INDEX)
        (layout / "blobs" / "sha256" / index.descriptor.digest.hex).write_bytes(index.data)
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [index.descriptor.to_json()]}
        (layout / "index.json").write_text(json.dumps(document))
    return LayoutSource(Reference("oci", path=str(layout)), SETTINGS.limits)


@pytest.mark.parametrize("follow", [mounted, pushed])
def test_as_many_documents_as_the_limit_says_are_followed(follow: Callable[[Source], Manifest], tmp_path: Path) -> None:
    deepest = SETTINGS.limits.index_depth - 1  # the manifest is a document as well
    assert len(follow(nested(tmp_path, deepest)).layers) == 1


@pytest.mark.parametrize("follow", [mounted, pushed])
def test_one_more_is_refused(follow: Callable[[Source], Manifest], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nests deeper than 3 levels"):
        follow(nested(tmp_path, SETTINGS.limits.index_depth))
