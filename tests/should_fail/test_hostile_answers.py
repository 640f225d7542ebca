"""Rows M9 and M12: registries that lie about what they send, and bodies without end."""

import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptfs.errors import CkptfsError, IntegrityError, LimitExceeded, UnavailableError
from ckptfs.image import OpenImage
from ckptfs.model.oci import OCI_INDEX, OCI_MANIFEST, Descriptor, Digest, Manifest
from ckptfs.settings import KiB, Limits, MiB
from tests.support.chunked import read_file, with_image
from tests.support.fake_registry import CONFIG, Claims, Endless, FakeRegistry
from tests.support.faulty import BLOB, DATA, SIZE, TAR, USER, Record
from tests.support.sources import Client, client, layers
from tests.support.tars import END, member

MIB = 1 * MiB


# -- M9: what is said of the bytes -------------------------------------------------------------------------------------


def image_with(registry: FakeRegistry, layer: dict[str, object], **config: object) -> None:
    """An image whose descriptors are changed by `layer` and `config`; its digest is right."""
    base = {"mediaType": TAR, "digest": str(registry.add_blob(DATA)), "size": SIZE, **layer}
    entry = {"mediaType": CONFIG, "digest": str(registry.add_blob(b"{}")), "size": 2, **config}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": entry, "layers": [base]}
    registry.add_manifest("repo", json.dumps(document).encode(), OCI_MANIFEST, "latest")


def read_layer(c: Client, whole: bool = False) -> None:
    source = c.source()
    (layer,) = layers(source)
    blob = source.blob(layer)
    blob.read_at(0, blob.size) if whole else blob.read_at(blob.size - 1000, 1000)


def fetch_config(c: Client) -> None:
    source = c.source()
    image = source.resolve()
    assert isinstance(image, Manifest)
    source.fetch(image.config)


def wrong_manifest(registry: FakeRegistry) -> None:
    image_with(registry, {})
    raw, _ = registry.manifests["repo", "latest"]
    registry.manifests["repo", str(Digest.of(b"another"))] = (raw, OCI_MANIFEST)


LIES = {
    "the layer is shorter than its descriptor": lambda r: image_with(r, {"size": SIZE + 5000}),
    "the layer is longer than its descriptor": lambda r: image_with(r, {"size": SIZE - 5000}),
    "the whole layer is shorter than its descriptor": lambda r: image_with(r, {"size": SIZE + 5000}),
    "the config is longer than its descriptor": lambda r: image_with(r, {}, size=1),
    "the config is shorter than its descriptor": lambda r: image_with(r, {}, size=3),
    "the config has another digest": lambda r: image_with(r, {}, digest=str(r.add_blob(b"[]"))),
    "the manifest has another digest": wrong_manifest,
    "Docker-Content-Digest names another manifest": lambda r: image_with(r, {}),
    "Content-Length of a whole layer is wrong": lambda r: image_with(r, {}),
}


def ask(lie: str, registry: FakeRegistry, c: Client) -> None:
    """What a user does who meets the lie."""
    if lie.startswith("the config"):
        if "digest" in lie:
            registry.blobs[str(Digest.of(b"[]"))] = b"{}"
        fetch_config(c)
    elif lie == "the manifest has another digest":
        c.source(f"repo@{Digest.of(b'another')}").resolve()
    elif lie.startswith("Docker"):
        registry.script["manifests/", None] = Claims({"Docker-Content-Digest": str(Digest.of(b"x"))})
        c.source().resolve()
    elif lie.startswith("Content-Length"):
        registry.script[BLOB, None] = Claims({"Content-Length": str(SIZE - 7)})
        read_layer(c, whole=True)
    else:
        read_layer(c, whole="whole" in lie)


@pytest.mark.row("M9")
def test_descriptors_are_the_truth(record_property: Record) -> None:
    found = {}
    for lie, make in LIES.items():
        with FakeRegistry() as registry, client(registry) as c:
            make(registry)
            with pytest.raises(CkptfsError) as caught:
                ask(lie, registry, c)
            found[lie] = caught.value
    assert {lie: type(error) for lie, error in found.items()} == dict.fromkeys(LIES, IntegrityError)
    record_property("figure", f"{len(found)} of {len(LIES)} lies are IntegrityError")


@pytest.mark.row("M9")
def test_a_manifest_that_is_announced_longer_than_it_is() -> None:
    """Not to be told from a connection that breaks: asked for again, and an outage in the end."""
    with FakeRegistry() as registry, client(registry) as c:
        image_with(registry, {})
        registry.script["manifests/", None] = Claims({"Content-Length": "100000"})
        with pytest.raises(UnavailableError):
            c.source().resolve()


@pytest.mark.row("M9")
@pytest.mark.parametrize("kind", [OCI_INDEX, "text/html", ""])
def test_the_content_type_of_a_manifest_is_only_a_claim(kind: str) -> None:
    """The document says what it is; the header cannot make something else of it."""
    with FakeRegistry() as registry, client(registry) as c:
        image_with(registry, {})
        registry.script["manifests/", None] = Claims({"Content-Type": kind})
        assert isinstance(c.source().resolve(), Manifest)


@pytest.mark.row("M9")
@pytest.mark.parametrize("suffix", ["+gzip", "+zstd"])
def test_a_media_type_that_lies_about_the_compression(suffix: str, tmp_path: Path) -> None:
    """The bytes say what they are; a name does not make others of them."""
    tar = member(b"file", b"x" * 5000) + END
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR + suffix, tar)])

        async def work(image: OpenImage) -> bytes:
            return await read_file(image, b"file")

        assert with_image(c, tmp_path, work) == b"x" * 5000


# -- M12: bodies without end -------------------------------------------------------------------------------------------


@contextmanager
def measured() -> Iterator[list[int]]:
    """The bytes of Python objects at the highest, above those at the beginning; the registry's own included."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


@pytest.mark.row("M12")
def test_bodies_without_end(record_property: Record) -> None:
    limits = Limits()
    cases = {
        "manifest": (limits.manifest_bytes, {("manifests/", None): Endless()}),
        "token": (limits.token_bytes, {("/token", None): Endless()}),
        "error": (limits.error_body_bytes, {("manifests/", None): Endless(404)}),
        "refusal": (limits.error_body_bytes, {("manifests/", None): Endless(403)}),
        "config": (2, {(BLOB, None): Endless()}),
        "referrers": (limits.manifest_bytes, {("referrers/", None): Endless()}),
    }
    figures = []
    for name, (cap, script) in cases.items():
        with FakeRegistry(auth="bearer" if name == "token" else "") as registry, client(registry) as c:
            image_with(registry, {})
            digest = registry.add_blob(b"{}")
            registry.script = dict(script)
            source = c.source(credentials=USER)
            began = time.monotonic()
            with measured() as peak, pytest.raises(CkptfsError) as caught:
                if name == "config":
                    source.fetch(Descriptor(CONFIG, digest, 2))
                elif name == "referrers":
                    source.referrers(digest)
                else:
                    source.resolve()
            took = time.monotonic() - began
        assert not isinstance(caught.value, UnavailableError) or name == "config", caught.value
        assert peak[0] <= cap + MIB, name
        assert took < 5.0, name
        figures.append(f"{name} {peak[0] / KiB:.0f} of {cap / KiB:.0f} KiB")
    record_property("figure", f"memory: {', '.join(figures)}")


@pytest.mark.row("M12")
@pytest.mark.parametrize("asked", ["manifests/", BLOB])
def test_a_chunk_of_a_negative_size(asked: str) -> None:
    """Where it is taken for a number of bytes, everything is read that comes."""
    with FakeRegistry() as registry, client(registry) as c:
        image_with(registry, {})
        registry.script[asked, None] = Endless(size=-1)
        with measured() as peak, pytest.raises(UnavailableError):
            fetch_config(c)
    assert peak[0] <= MIB


@pytest.mark.row("M12")
@pytest.mark.parametrize("past", [0, 1])
def test_the_config_at_its_limit(past: int) -> None:
    limits = Limits()._replace(config_bytes=1000)
    config = b" " * (1000 - 2 + past) + b"{}"
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)], config=config)
        c.settings = c.settings._replace(limits=limits)
        c.transport.settings = c.settings
        if past:
            with pytest.raises(LimitExceeded):
                fetch_config(c)
        else:
            fetch_config(c)
