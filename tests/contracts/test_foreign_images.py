"""Images that others pushed: what is attached to them is found, used, and costs nothing where there is nothing."""

import gzip
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import zstandard

from ckptfs.engine.cache import ChunkCache
from ckptfs.errors import FormatError, IntegrityError
from ckptfs.image import ImageOptions, OpenImage, open_image
from ckptfs.image.publishing import index_layers, publish_index
from ckptfs.layers import gzip_index
from ckptfs.model.annotations import ESTARGZ_LAYER, INDEX_ARTIFACT, INDEX_BLOB, INDEX_LAYER
from ckptfs.model.layer_index import encode_layer_index
from ckptfs.model.oci import OCI_MANIFEST, Descriptor, Digest, Manifest, Reference
from ckptfs.settings import MiB, Settings
from ckptfs.sources import Repository, open_source
from ckptfs.telemetry import NetworkCounters
from tests.support import soci
from tests.support.blobs import TAR, BytesBlob, blob_of
from tests.support.command import ckptfs, mounted
from tests.support.docker_registry import DockerRegistry
from tests.support.pushed import push_artifact, push_image, target
from tests.support.side import external_estargz, index_of, seekable
from tests.support.tars import END, member
from tests.support.tools import wait_for

pytestmark = pytest.mark.registry

T = TypeVar("T")
SETTINGS = Settings()
BIG = random.Random(3).randbytes(12 * MiB)
LARGE = member(b"first", b"one") + member(b"big", BIG) + member(b"last", b"two") + END
LAYERS: dict[str, Callable[[], BytesBlob]] = {
    "gzip": lambda: blob_of(gzip.compress(LARGE, 1), TAR + "+gzip"),
    "zstd": lambda: blob_of(zstandard.ZstdCompressor().compress(LARGE), TAR + "+zstd"),
    "tar": lambda: blob_of(LARGE),
}


class Opened:
    """What one look at an image cost and showed."""

    def __init__(self, image: OpenImage, last: bytes) -> None:
        ((_, layer),) = image.layers.values()
        self.last = last
        self.format = layer.format
        self.verification = image.verification
        self.requests = image.counters.requests
        self.bytes = image.counters.bytes


def look(reference: str, cache: Path, *, strict: bool = False, offline: bool = False) -> Opened:
    """Open the image with nothing fetched ahead, and read its last file."""

    async def read(image: OpenImage) -> Opened:
        node = await image.find(b"last")
        assert node is not None and node.inode is not None
        found = Opened(image, await image.read(node.inode, 0, 10))
        keys = [extent.chunk.key for extent in node.inode.extents]
        await trio.to_thread.run_sync(wait_for, "the chunk", lambda: all(map(image.cache.contains, keys)))
        return found

    return opened(reference, cache, read, strict=strict, offline=offline)


def opened(
    reference: str,
    cache: Path,
    work: Callable[[OpenImage], Awaitable[T]],
    *,
    strict: bool = False,
    offline: bool = False,
) -> T:
    counters = NetworkCounters()
    source = open_source(Reference.parse(reference), settings=SETTINGS, counters=counters)
    options = ImageOptions(view="raw", prefetch=False, background=False, strict=strict, offline=offline)

    async def run(store: ChunkCache) -> T:
        async with open_image(source, store, options, counters) as image:
            await image.ready()
            return await work(image)

    store = ChunkCache.open(cache, size=1 << 30)
    try:
        return trio.run(run, store)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        store.close()


def pushed(registry: DockerRegistry, repository: str, layer: BytesBlob, **annotations: str) -> tuple[str, Descriptor]:
    named = {key.replace("_", "-").replace("__", "."): value for key, value in annotations.items()}
    image = push_image(target(registry, repository), "1", [layer], named)
    return registry.reference(f"{repository}:1"), image


@pytest.mark.parametrize("compression", LAYERS)
def test_an_index_makes_a_foreign_layer_verified_and_lazy(
    compression: str, registry: DockerRegistry, tmp_path: Path
) -> None:
    layer = LAYERS[compression]()
    reference, image = pushed(registry, f"foreign/{compression}", layer)
    before = look(reference, tmp_path / "before")
    assert before.format == compression  # and verified only when all of it has passed

    done = ckptfs("index", reference, "--json", "--cache-dir", tmp_path / "indexer")
    assert done.code == 0, done.err
    assert done.json["image"] == str(image.digest)
    assert [entry["layer"] for entry in done.json["layers"]] == [str(layer.descriptor.digest)]

    after = look(reference, tmp_path / "after", strict=True)
    assert (after.last, after.format, after.verification) == (b"two", f"{compression}+index", "chunk")
    if compression != "zstd":  # one frame: nobody can read it from the middle
        assert after.bytes < 2.5 * MiB < before.bytes or compression == "tar"

    again = look(reference, tmp_path / "after", strict=True, offline=True)
    assert (again.last, again.requests) == (b"two", 0)


def test_an_index_is_the_same_every_time(registry: DockerRegistry, tmp_path: Path) -> None:
    reference, _ = pushed(registry, "foreign/same", LAYERS["gzip"]())
    first = ckptfs("index", reference, "--json", "--cache-dir", tmp_path / "a").json
    second = ckptfs("index", reference, "--json", "--cache-dir", tmp_path / "b").json
    assert first["digest"] == second["digest"] and first["sent"] > 0 and second["sent"] == 0
    assert ckptfs("index", reference, "--cache-dir", tmp_path / "b").out.strip().endswith(first["digest"])


def test_images_that_need_no_index_say_so(registry: DockerRegistry, tmp_path: Path) -> None:
    blob, _ = external_estargz()
    reference, _ = pushed(registry, "foreign/none", blob)
    done = ckptfs("index", reference, "--cache-dir", tmp_path)
    assert (done.code, done.out) == (0, "") and "needs no index" in done.err
    assert ckptfs("index", "oci:/nowhere", "--cache-dir", tmp_path).code == 2


def test_that_no_layer_can_have_an_index_is_an_error(registry: DockerRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """gzip, where the system has no libz."""
    reference, _ = pushed(registry, "foreign/unindexed", LAYERS["gzip"]())
    source = open_source(Reference.parse(reference), settings=SETTINGS, counters=NetworkCounters())
    manifest = source.resolve()
    assert isinstance(manifest, Manifest)
    monkeypatch.setattr(gzip_index, "_zlib", lambda: None)
    with pytest.raises(FormatError, match="ckptfs push"):
        index_layers(source, manifest, SETTINGS)


def test_what_was_streamed_once_is_read_at_random_later(registry: DockerRegistry, tmp_path: Path) -> None:
    """The node's own index, with an empty chunk cache: one span is fetched, and nobody is asked for an index."""
    layer = LAYERS["gzip"]()
    reference, _ = pushed(registry, "foreign/own", layer)
    cache = ChunkCache.open(tmp_path, size=1 << 30)
    cache.put_document(f"index/{layer.descriptor.digest}", encode_layer_index(index_of(layer)))
    cache.close()
    found = look(reference, tmp_path, strict=True)
    assert (found.last, found.format, found.requests) == (b"two", "gzip+index", 2)
    assert found.bytes < 1.5 * MiB


def test_a_stream_leaves_its_index_behind(registry: DockerRegistry, tmp_path: Path) -> None:
    layer = LAYERS["gzip"]()
    reference, _ = pushed(registry, "foreign/streamed", layer)

    async def stream(image: OpenImage) -> None:
        image.run_on()
        await image.all_known()
        await trio.to_thread.run_sync(wait_for, "the index", lambda: image.memory.document(layer.descriptor))

    opened(reference, tmp_path, stream)
    found = look(reference, tmp_path, offline=True, strict=True)
    assert (found.last, found.format, found.verification) == (b"two", "gzip+index", "chunk")


@pytest.mark.parametrize("version", [1, 2])
def test_soci_indexes_are_found(version: int, registry: DockerRegistry, tmp_path: Path) -> None:
    layer = LAYERS["gzip"]()
    document = soci.gzip_ztoc(layer, LARGE, MiB)
    sink = target(registry, f"foreign/soci{version}")
    if version == 2:
        index = soci.soci_index([(layer, document)], version=2)
        digest = push_artifact(sink, index, [document])
        push_image(sink, "1", [layer], {soci.INDEX_DIGEST: str(digest)})
    else:
        image = push_image(sink, "1", [layer])
        push_artifact(sink, soci.soci_index([(layer, document)], version=1, subject=image.to_json()), [document])
    reference = registry.reference(f"foreign/soci{version}:1")
    found = look(reference, tmp_path, strict=True)
    assert (found.last, found.format, found.verification) == (b"two", "gzip+soci", "chunk")
    assert found.bytes < 4 * MiB
    assert look(reference, tmp_path, offline=True).requests == 0


def test_a_seek_table_is_found(registry: DockerRegistry, tmp_path: Path) -> None:
    layer = blob_of(seekable(LARGE, MiB), TAR + "+zstd")
    reference, _ = pushed(registry, "foreign/seekable", layer)
    found = look(reference, tmp_path)
    assert (found.last, found.format, found.verification) == (b"two", "zstd:seekable", "transport")
    assert found.bytes < 4 * MiB

    async def keep(image: OpenImage) -> None:
        ((descriptor, opened_layer),) = image.layers.values()
        await trio.to_thread.run_sync(
            wait_for, "the entries", lambda: image.memory.entries(opened_layer, 0, descriptor)
        )

    opened(reference, tmp_path, keep)
    again = look(reference, tmp_path, offline=True)
    assert (again.last, again.format, again.requests) == (b"two", "zstd:seekable", 0)
    with pytest.raises(IntegrityError, match="cannot be verified"):
        look(reference, tmp_path / "strict", strict=True)


def test_an_external_estargz_table_is_found(registry: DockerRegistry, tmp_path: Path) -> None:
    blob, document = external_estargz()
    reference, _ = pushed(registry, "foreign/external", blob)

    async def names(image: OpenImage) -> int:
        assert image.verification == "chunk"
        return len(await image.listing(image.tree.root))

    with pytest.raises(Exception, match="esgztoc"):
        opened(reference, tmp_path / "without", names)
    table = document.fetch()  # type: ignore[attr-defined]
    described = Descriptor(TAR + "+gzip", Digest.of(table), len(table), {ESTARGZ_LAYER: str(blob.descriptor.digest)})
    push_image(target(registry, "foreign/external"), "1-esgztoc", [BytesBlob(table, described)])
    assert opened(reference, tmp_path, names, strict=True) > 5


def test_a_mount_publishes_what_it_streamed(registry: DockerRegistry, tmp_path: Path) -> None:
    reference, _ = pushed(registry, "foreign/mounted", LAYERS["gzip"]())
    source = open_source(Reference.parse(reference), settings=SETTINGS, counters=NetworkCounters())
    with mounted(reference, tmp_path, "--publish-index", "--view", "raw") as mount:
        assert (mount.path / "big").read_bytes() == BIG
        manifest = source.resolve()
        assert isinstance(source, Repository)
        wait_for("the index", lambda: source.referrers(manifest.digest, INDEX_ARTIFACT), patience=60)
        assert mount.status()["errors"] == []
    found = look(reference, tmp_path / "other", strict=True)
    assert (found.last, found.format) == (b"two", "gzip+index")


def test_a_stream_with_an_index_is_fetched_in_the_background_too(registry: DockerRegistry, tmp_path: Path) -> None:
    reference, _ = pushed(registry, "foreign/background", LAYERS["zstd"]())
    assert ckptfs("index", reference, "--cache-dir", tmp_path / "indexer").code == 0
    with mounted(reference, tmp_path, "--view", "raw") as mount:
        assert (mount.path / "last").read_bytes() == b"two"
        wait_for("everything", lambda: mount.status()["complete"], step=0.2, patience=60)
        assert mount.status()["verify"] == "chunk"


# What is attached may be anything: it never costs the mount.


def hostile(kind: str, layer: BytesBlob) -> bytes:
    good = encode_layer_index(index_of(layer))
    other = blob_of(gzip.compress(member(b"x", b"y") + END), TAR + "+gzip")
    return {
        "empty": b"\0",
        "rubbish": random.Random(1).randbytes(5000),
        "cut": good[: len(good) // 2],
        "of another layer": encode_layer_index(index_of(other)),
    }[kind]


def artifact(image: Descriptor, blob: Descriptor) -> bytes:
    """One that claims to be an index of ours of `image`."""
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": INDEX_ARTIFACT,
        "config": Descriptor("application/vnd.oci.empty.v1+json", Digest.of(b"{}"), 2).to_json(),
        "layers": [blob.to_json()],
        "subject": image.to_json(),
    }
    return json.dumps(document).encode()


def test_an_index_is_found_beside_others_that_are_of_no_use(registry: DockerRegistry, tmp_path: Path) -> None:
    """A copy of the image was made without the SOCI index that it names, and what somebody attached makes no sense."""
    layer, sink = LAYERS["gzip"](), target(registry, "foreign/copied")
    image = push_image(sink, "1", [layer], {soci.INDEX_DIGEST: str(Digest.of(b"left behind"))})
    document = b"nothing"
    blob = Descriptor(INDEX_BLOB, Digest.of(document), len(document), {INDEX_LAYER: "of no layer"})
    push_artifact(sink, artifact(image, blob), [document])
    reference = registry.reference("foreign/copied:1")
    assert ckptfs("index", reference, "--cache-dir", tmp_path / "indexer").code == 0
    found = look(reference, tmp_path, strict=True)
    assert (found.last, found.format) == (b"two", "gzip+index")


@pytest.mark.row("M7")
@pytest.mark.parametrize("kind", ["empty", "rubbish", "cut", "of another layer"])
def test_a_bad_index_is_not_used(kind: str, registry: DockerRegistry, tmp_path: Path) -> None:
    layer = LAYERS["gzip"]()
    repository = f"foreign/bad-{kind.replace(' ', '-')}"
    reference, image = pushed(registry, repository, layer)
    document = hostile(kind, layer)
    blob = Descriptor(INDEX_BLOB, Digest.of(document), len(document), {INDEX_LAYER: str(layer.descriptor.digest)})
    push_artifact(target(registry, repository), artifact(image, blob), [document])
    found = look(reference, tmp_path)
    assert (found.last, found.format) == (b"two", "gzip")


def test_a_false_index_spoils_no_other_image(registry: DockerRegistry, tmp_path: Path) -> None:
    """An index that shows other bytes for a layer: the same layer in an image without it shows its own."""
    layer = LAYERS["gzip"]()
    forged = member(b"first", b"one") + member(b"big", BIG) + member(b"last", b"bad") + END
    index = index_of(blob_of(gzip.compress(forged, 1), TAR + "+gzip"))
    reference, _ = pushed(registry, "foreign/false", layer)
    honest, _ = pushed(registry, "foreign/honest", layer)
    source = open_source(Reference.parse(reference), settings=SETTINGS, counters=NetworkCounters())
    manifest = source.resolve()
    assert isinstance(manifest, Manifest)
    false = index._replace(digest=str(layer.descriptor.digest), size=layer.size)
    publish_index(target(registry, "foreign/false"), manifest, {layer.descriptor.digest: encode_layer_index(false)})
    with pytest.raises(IntegrityError):
        look(reference, tmp_path)
    assert look(honest, tmp_path).last == b"two"
