"""Plain tars are hashed as a whole when the background has fetched the rest, and that once."""

from pathlib import Path

import pytest

from ckptfs.engine.fetch import Fetcher
from ckptfs.errors import UnavailableError
from ckptfs.image import OpenImage, whole
from ckptfs.image.ahead import fetch_rest
from ckptfs.layers.tar import TarLayer
from ckptfs.model.oci import Descriptor, Digest
from tests.support.blobs import TAR
from tests.support.chunked import with_image
from tests.support.fake_registry import FakeRegistry
from tests.support.sources import client
from tests.support.tars import END, member


def test_what_has_been_hashed_is_not_hashed_again_after_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_layer, hashed = whole.hash_layer, list[Digest]()

    async def failing_once(fetcher: Fetcher, descriptor: Descriptor, layer: TarLayer) -> None:
        hashed.append(descriptor.digest)
        if len(hashed) == 2:
            raise UnavailableError("the registry is away")
        await hash_layer(fetcher, descriptor, layer)

    async def work(image: OpenImage) -> str:
        await fetch_rest(image)
        return image.verification

    monkeypatch.setattr(whole, "hash_layer", failing_once)
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, member(name, name * 1000) + END) for name in (b"a", b"b")])
        assert with_image(c, tmp_path, work) == "chunk"
    first, second, third = hashed
    assert first != second == third
