"""Uploads to a registry that breaks off, loses sessions and counts wrong."""

import pytest

from ckptfs.errors import IntegrityError, UnavailableError
from ckptfs.model.oci import OCI_MANIFEST
from ckptfs.settings import MiB
from tests.support.fake_registry import (
    FakeRegistry,
    Flip,
    Reset,
    Status,
)
from tests.support.faulty import BLOB, DATA, SIZE, TAR, Faulty
from tests.support.sources import USER, Client, client, layers


def upload(c: Client, registry: FakeRegistry) -> list[int]:
    """DATA is sent; what `sent` was told."""
    with FakeRegistry() as origin, client(origin) as other:
        origin.add_image("repo", "latest", [(TAR, DATA)])
        source = other.source()
        (layer,) = layers(source)
        told: list[int] = []
        c.target().put_blob(layer, source.blob(layer), told.append)
    assert registry.blobs[str(layer.digest)] == DATA
    assert sum(told) == SIZE
    return told


def test_an_interrupted_upload_goes_on_where_it_ended() -> None:
    with FakeRegistry({("PATCH", 1): Reset(5 * MiB)}) as registry, client(registry) as c:
        upload(c, registry)
        _, second = registry.requests("PATCH")
        assert second.headers["content-range"].partition("-")[0] == str(5 * MiB)
        assert len(registry.requests("POST")) == 1


def test_an_upload_that_was_lost_begins_anew() -> None:
    script = {("PATCH", 1): Reset(5 * MiB), ("GET /v2/repo/blobs/uploads", 1): Status(404)}
    with FakeRegistry(script) as registry, client(registry) as c:
        upload(c, registry)
        assert len(registry.requests("POST")) == 2


def test_an_upload_that_fails_for_ever_ends() -> None:
    with FakeRegistry({("PATCH", None): Status(500)}) as registry, client(registry) as c:
        with pytest.raises(UnavailableError, match="answered 500"):
            upload(c, registry)
        assert len(registry.requests("PATCH")) == 5


def test_a_blob_with_another_digest_is_refused(faulty: Faulty) -> None:
    with FakeRegistry() as registry, client(registry) as c:
        (layer,) = layers(faulty.client.source())
        faulty.registry.script[BLOB, None] = Flip()
        with pytest.raises(IntegrityError, match="another digest"):
            c.target().put_blob(layer, faulty.blob, lambda count: None)


def test_mounts_from_next_door() -> None:
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        (layer,) = layers(c.source(credentials=USER))
        target = c.target("other:x", credentials=USER)
        assert not target.has(layer)
        assert target.mount(layer, "repo") and target.has(layer)
        assert not target.mount(layer, "nowhere") and registry.sessions == {}


def test_a_manifest_stored_as_something_else_is_an_error(faulty: Faulty) -> None:
    wrong = {"Docker-Content-Digest": "sha256:" + "0" * 64}
    faulty.registry.script["PUT", None] = Status(201, headers=wrong)
    with pytest.raises(IntegrityError, match="stored the manifest as"):
        faulty.client.target().put_manifest(faulty.client.source().resolve().raw, OCI_MANIFEST, "x")
