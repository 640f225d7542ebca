"""One suite over all sources: an image behind a real registry, the fake one and a layout gives the same answers."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from ckptfs.errors import IntegrityError, LimitExceeded, NotFoundError, UnavailableError, UsageError
from ckptfs.image import OpenImage
from ckptfs.model.oci import (
    ANNOTATION_REF_NAME,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Digest,
    Index,
    Manifest,
    Reference,
)
from ckptfs.settings import Limits, Registries, Settings
from ckptfs.sources import Source, open_source
from ckptfs.sources.deferred import DeferredSource
from ckptfs.sources.layout import LayoutSource
from ckptfs.telemetry import NetworkCounters
from tests.support.blobs import TAR
from tests.support.chunked import with_image
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import FakeRegistry
from tests.support.layouts import CONFIG, Layout
from tests.support.sources import Client, client
from tests.support.tars import tar_of
from tests.support.tools import free_port

SIZE = 9_000_000  # more than the 8 MiB that a source takes whole in place of a range
DATA = Random(1).randbytes(SIZE)
SMALL = b"small layer"
EMPTY = b""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    made = Layout(tmp_path_factory.mktemp("layout"))
    arm, amd = made.manifest(SMALL, architecture="arm64"), made.manifest(DATA, SMALL, EMPTY)
    made.tag(amd, "image")
    platforms = [
        {**entry, "platform": {"os": "linux", "architecture": name}} for entry, name in ((arm, "arm64"), (amd, "amd64"))
    ]
    made.tag(made.index(*platforms), "multi")
    return made


def published(layout: Layout, to: Client, repository: str) -> Callable[[str], Source]:
    """Everything of the layout, sent by our own upload; the way to open it there."""
    target = to.target(f"{repository}:x")
    source = LayoutSource(Reference("oci", path=str(layout.top)))
    documents: list[tuple[bytes, str, str]] = []
    for path in (layout.top / "blobs" / "sha256").iterdir():
        descriptor = Descriptor(TAR, Digest("sha256", path.name), path.stat().st_size)
        if not target.has(descriptor):
            target.put_blob(descriptor, source.blob(descriptor), lambda count: None)
        assert target.has(descriptor)
    for entry in layout.entries:
        raw = (layout.top / "blobs" / "sha256" / str(entry["digest"]).removeprefix("sha256:")).read_bytes()
        notes = entry["annotations"]
        assert isinstance(notes, dict)
        documents.append((raw, str(entry["mediaType"]), notes[ANNOTATION_REF_NAME]))
        for inner in json.loads(raw).get("manifests", []):
            raw = (layout.top / "blobs" / "sha256" / inner["digest"].removeprefix("sha256:")).read_bytes()
            documents.append((raw, inner["mediaType"], ""))
    for raw, media_type, tag in sorted(documents, key=lambda document: document[1] == OCI_INDEX):
        assert target.put_manifest(raw, media_type, tag) == Digest.of(raw)
    return lambda tail: to.source(f"{repository}{tail}")


@dataclass
class Case:
    """A source by the tail of its reference: ":tag" or "@digest"."""

    kind: str
    open: Callable[[str], Source]
    layout: Layout

    def image(self) -> Manifest:
        found = self.open(":image").resolve()
        assert isinstance(found, Manifest)
        return found


@pytest.fixture(scope="module", params=["docker-registry", "redirecting", "fake", "deferred", "mirrored", "layout"])
def case(request: pytest.FixtureRequest, layout: Layout) -> Iterator[Case]:
    if request.param == "layout":
        yield Case("layout", lambda tail: LayoutSource(Reference.parse(f"oci:{layout.top}{tail}")), layout)
    elif request.param == "docker-registry":
        registry: DockerRegistry = request.getfixturevalue("registry")
        with client(registry.host) as c:
            yield Case("registry", published(layout, c, "sources"), layout)
    elif request.param == "redirecting":
        request.getfixturevalue("registry")  # skips where there is none
        with DockerRegistry(redirect=True) as redirecting, client(redirecting.host) as c:
            yield Case("registry", published(layout, c, "sources"), layout)
    elif request.param == "mirrored":
        with FakeRegistry() as home, FakeRegistry() as mirror:
            where = (f"127.0.0.1:{free_port()}", mirror.host)  # nobody is at the first
            registries = Registries(mirrors={home.host: where}, mirror_tags=True)
            with client(home, registries=registries) as c:
                open_ = published(layout, c, "sources")
                mirror.blobs, mirror.manifests, mirror.owned = dict(home.blobs), dict(home.manifests), set(home.owned)
                home.log.clear()
                yield Case("registry", open_, layout)
                assert len(home.log) < len(mirror.log), "it is asked for what the mirror does not have"
    else:
        with FakeRegistry() as fake, client(fake) as c:
            open_ = published(layout, c, "sources")
            if request.param == "deferred":
                yield Case("registry", lambda tail: DeferredSource(open_(tail).reference, lambda: open_(tail)), layout)
            else:
                yield Case("registry", open_, layout)


def test_the_image(case: Case) -> None:
    image = case.image()
    assert [layer.size for layer in image.layers] == [SIZE, len(SMALL), 0]
    assert image.digest == Digest.of(image.raw)
    assert str(image.digest) == case.layout.entries[0]["digest"]
    assert image.media_type == OCI_MANIFEST


def test_the_index_and_its_images(case: Case) -> None:
    source = case.open(":multi")
    index = source.resolve()
    assert isinstance(index, Index)
    for name in ("amd64", "arm64"):
        chosen = index.select(name)
        assert Digest.of(source.fetch(chosen)) == chosen.digest
    assert index.select("amd64").digest == case.image().digest


def test_a_digest_names_the_image_without_a_tag(case: Case) -> None:
    digest = case.image().digest
    assert case.open(f"@{digest}").resolve() == case.image()
    assert case.open(f":multi@{digest}").resolve() == case.image(), "the digest wins"


def test_several_ranges(case: Case) -> None:
    blob = case.open(":image").blob(case.image().layers[0])
    ranges = [(at, at + 3000) for at in range(0, SIZE - 3000, 500_000)]
    assert blob.read_at(17, 5) == DATA[17:22]
    # before the tests that call a host a liar
    assert (blob.ranges_at_once > 1) == (case.kind == "registry")
    found: dict[int, bytes] = {}
    for at, piece in blob.stream_ranges(ranges):
        found[at // 500_000] = found.get(at // 500_000, b"") + bytes(piece)
    assert [found[start // 500_000] for start, _ in ranges] == [DATA[start:end] for start, end in ranges]


def test_documents_are_checked(case: Case) -> None:
    source, image = case.open(":image"), case.image()
    assert json.loads(source.fetch(image.config)) == {"architecture": "amd64", "os": "linux"}
    with pytest.raises(IntegrityError):
        source.fetch(Descriptor(CONFIG, image.config.digest, image.config.size + 1))


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, SIZE), (0, 1), (SIZE - 1, 1), (1_234_567, 4 << 20), (4096, 131_072), (7, 131_073), (5, 0), (SIZE, 0)],
)
def test_ranges(case: Case, offset: int, length: int) -> None:
    blob = case.open(":image").blob(case.image().layers[0])
    wanted = DATA[offset : offset + length]
    assert blob.size == SIZE
    assert blob.read_at(offset, length) == wanted
    pieces = [bytes(piece) for piece in blob.stream(offset, length)]
    assert b"".join(pieces) == wanted
    assert all(0 < len(piece) <= 1 << 20 for piece in pieces)
    assert b"".join(bytes(piece) for piece in blob.stream(offset, length, patient=True)) == wanted
    assert blob.read_at(offset, length, attempt=1) == wanted


def test_an_empty_layer(case: Case) -> None:
    blob = case.open(":image").blob(case.image().layers[2])
    assert (blob.read_at(0, 0), list(blob.stream(0, 0))) == (b"", [])


def test_a_range_past_the_end(case: Case) -> None:
    blob = case.open(":image").blob(case.image().layers[0])
    with pytest.raises(IntegrityError):
        blob.read_at(SIZE - 1, 2)


def test_a_descriptor_that_lies_about_the_size(case: Case) -> None:
    layer = case.image().layers[0]
    for size in (SIZE - 1, SIZE + 1):
        blob = case.open(":image").blob(Descriptor(TAR, layer.digest, size))
        with pytest.raises(IntegrityError):
            blob.read_at(size - 10, 10)


def test_what_is_missing(case: Case) -> None:
    nowhere = Digest.of(b"nowhere")
    with pytest.raises(NotFoundError, match="nope"):
        case.open(":nope").resolve()
    with pytest.raises(NotFoundError, match=str(nowhere) if case.kind == "registry" else nowhere.hex):
        case.open(f"@{nowhere}").resolve()
    source = case.open(":image")
    with pytest.raises(NotFoundError):
        source.fetch(Descriptor(CONFIG, nowhere, 2))
    blob = source.blob(Descriptor(TAR, nowhere, 20))
    with pytest.raises(NotFoundError):
        blob.read_at(0, 20)


def test_documents_beyond_the_limits_are_not_read(case: Case) -> None:
    source, limits = case.open(":image"), Limits()
    for kind, limit in ((OCI_MANIFEST, limits.manifest_bytes), (CONFIG, limits.config_bytes)):
        with pytest.raises(NotFoundError):
            source.fetch(Descriptor(kind, Digest.of(b"nowhere"), limit))
        with pytest.raises(LimitExceeded):
            source.fetch(Descriptor(kind, Digest.of(b"nowhere"), limit + 1))


# -- what only one of them has -----------------------------------------------------------------------------------------


def test_open_source_knows_all_kinds(layout: Layout, tmp_path: Path) -> None:
    def opened(text: str) -> Source:
        return open_source(Reference.parse(text), settings=Settings(), counters=NetworkCounters())

    assert isinstance(opened(f"oci:{layout.top}:image").resolve(), Manifest)
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    assert isinstance(opened(f"archive:{tmp_path}/a.tar").resolve(), Manifest)
    assert opened("registry.example/repo").reference.host == "registry.example"


def test_a_missing_repository_is_told_from_a_missing_tag() -> None:
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, SMALL)])
        with pytest.raises(NotFoundError, match="has no tag 'other' in repo"):
            c.source("repo:other").resolve()
        with pytest.raises(NotFoundError, match="has no repository nothing"):
            c.source("nothing:latest").resolve()


def test_a_manifest_takes_one_request() -> None:
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, SMALL)])
        c.source().resolve()
        assert [(a.method, a.path) for a in registry.log] == [("GET", "/v2/repo/manifests/latest")]
        accepted = registry.log[0].headers["accept"]
        assert accepted.count("vnd.oci") == accepted.count("vnd.docker") == 2


def test_the_real_docker_hub_name() -> None:
    with client("docker.io") as c:
        source = c.source("busybox:latest")
        endpoint = source._home.endpoint
        assert endpoint.url("x") == "https://registry-1.docker.io/v2/library/busybox/x"


@pytest.mark.parametrize("api", [True, False])
def test_referrers(api: bool) -> None:
    with FakeRegistry(referrers=api) as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, SMALL)])
        source, target = c.source(), c.target()
        image = source.resolve()
        assert source.referrers(image.digest) == ()
        empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": str(Digest.of(b"{}")), "size": 2}
        subject = {"mediaType": OCI_MANIFEST, "digest": str(image.digest), "size": len(image.raw)}
        digests = set()
        for kind in ("application/x.one", "application/x.two"):
            document = {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "artifactType": kind,
                "config": empty,
                "layers": [empty],
                "subject": subject,
            }
            raw = json.dumps(document).encode()
            digests |= {target.put_manifest(raw, OCI_MANIFEST, ""), target.put_manifest(raw, OCI_MANIFEST, "")}
        assert {entry.digest for entry in source.referrers(image.digest)} == digests
        (one,) = source.referrers(image.digest, "application/x.one")
        assert one.artifact_type == "application/x.one"
        assert json.loads(source.fetch(one))["subject"] == subject
        assert ("repo", f"sha256-{image.digest.hex}") in registry.manifests or api


def test_a_manifest_is_called_as_its_registry_knows_it(tmp_path: Path) -> None:
    """By SHA-512, if that is what it was pushed by; and what has been seen once is found again without the registry."""

    async def work(image: OpenImage) -> str:
        assert image.resolved.reference.digest == image.resolved.manifest.digest
        await image.all_known()
        return str(image.resolved.manifest.digest)

    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, tar_of({"file": SMALL}))])
        manifest = registry.manifests["repo", "latest"]
        digest = str(Digest.of(manifest[0], "sha512"))
        registry.manifests = {("repo", name): manifest for name in (digest, "latest")}
        assert with_image(c, tmp_path, work, name=f"repo@{digest}") == digest
        asked = len(registry.requests("/manifests/"))
        assert with_image(c, tmp_path, work, name=f"repo@{digest}", offline=True) == digest
        assert len(registry.requests("/manifests/")) == asked
        assert with_image(c, tmp_path / "by-tag", work) == digest


# -- what keeps a source away ------------------------------------------------------------------------------------------


def test_unknown_hosts_and_closed_ports() -> None:
    with client("no-such-registry.invalid") as c, pytest.raises(UnavailableError, match="DNS does not resolve no-such"):
        c.source().resolve()
    with client("127.0.0.1:1") as c, pytest.raises(UnavailableError, match=r"connection refused.*is the registry"):
        c.source().resolve()
    with pytest.raises(UsageError):
        Reference.parse("no-registry")


def test_no_document_says_that_a_digest_need_not_be_checked(tmp_path: Path) -> None:
    """A layer that said so of another's digest would leave wrong bytes in the node's cache under that one's name."""
    archive_ = gzip.compress(tar_of({"f": bytes(100_000)}), 1)
    wrong = archive_[:-8] + bytes(8)
    with FakeRegistry() as registry, client(registry) as c:
        notes = [{"dev.ckptfs.synthetic-digest": "file"}]
        registry.add_image("repo", "latest", [(TAR + "+gzip", archive_)], layer_annotations=notes)
        digest = next(digest for digest, data in registry.blobs.items() if data == archive_)
        registry.blobs[digest] = wrong

        async def work(image: OpenImage) -> None:
            image.run_on()
            await image.all_known()

        with pytest.raises(IntegrityError):
            with_image(c, tmp_path / "cache", work)
