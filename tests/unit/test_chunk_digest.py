"""Chunks named by BLAKE3 in what we push, by SHA-256 in what was pushed before: each alone, both together."""

import base64
import hashlib
import os
import shutil
from pathlib import Path

import pytest
import trio
from blake3 import blake3

from ckptfs.engine.cache import ChunkCache
from ckptfs.errors import FormatError, IntegrityError
from ckptfs.image import ImageOptions, OpenImage, open_image
from ckptfs.inspection.image_diff import diff_images
from ckptfs.layers import open_indexed
from ckptfs.model import index as index_document
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.index import ANNOTATION_INDEX, IndexedFile, IndexedLayer, decode_index, encode_index
from ckptfs.model.oci import Manifest, Reference
from ckptfs.model.toc import Entry, Inode
from ckptfs.pull import pull
from ckptfs.settings import Settings
from ckptfs.sources.layout import LayoutSource
from ckptfs.telemetry import NetworkCounters
from tests.support.blobs import blob_of
from tests.support.counted import CountedSource, with_layouts
from tests.support.older_image import OLDER, PAGE, PAGES, older_checkpoint
from tests.support.push import layer_blob, manifest_of, push_to_layout
from tests.support.trees import layout_with

FILE = "checkpoint/pages-1.img"
OF = {ChunkDigest.SHA256: lambda data: hashlib.sha256(data).digest(), ChunkDigest.BLAKE3: lambda d: blake3(d).digest()}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A layout with the image of before, which is to get others."""
    return Path(shutil.copytree(OLDER, tmp_path / "layout"))


async def memory_of(image: OpenImage) -> bytes:
    node = await image.find(FILE.encode())
    assert node is not None and node.inode is not None
    return await image.read(node.inode, 0, node.inode.size)


def read_memory(layout: Path, tag: str, cache: Path) -> tuple[bytes, int]:
    """The pages of an image as a mount reads them, and the bytes that it fetched."""
    counters = NetworkCounters()
    source = CountedSource(LayoutSource(Reference.parse(f"oci:{layout}:{tag}")), counters, 0)

    async def run(node: ChunkCache) -> bytes:
        options = ImageOptions(background=False, prefetch=False)
        async with open_image(source, node, options, counters) as image:
            data = await memory_of(image)
            await image.fetcher.settled()
            return data

    with ChunkCache.open(cache) as node:
        return trio.run(run, node), counters.bytes


def test_the_digests() -> None:
    for kind, of in OF.items():
        for data in (b"", b"x" * 16384, os.urandom(300_000)):
            assert kind.of(data) == kind.of(memoryview(data)) == kind.of(bytearray(data)) == of(data)
        assert ChunkDigest.named(kind.value) is kind
    for name in ("md5", "", None, 3, []):
        with pytest.raises(FormatError, match="of the kind"):
            ChunkDigest.named(name)


def test_an_image_of_before_is_read_with_its_index(tmp_path: Path) -> None:
    """A page of it is all that is fetched, besides the manifest: no table of contents."""
    expected = (older_checkpoint(tmp_path / "source") / FILE).read_bytes()

    async def look(images: list[OpenImage]) -> set[ChunkDigest]:
        (image,) = images
        node = await image.find(FILE.encode())
        assert node is not None and node.inode is not None
        assert await image.read(node.inode, 300 * PAGE, PAGE) == expected[300 * PAGE : 301 * PAGE]
        for start, length, chunk, _ in node.inode.extents:
            assert chunk.key == chunk.digest == hashlib.sha256(expected[start : start + length]).digest()
        return set(image.chunk_digests.values())

    kinds, counters = with_layouts([OLDER], tmp_path / "cache", look)
    assert kinds == {ChunkDigest.SHA256} and counters.requests == 2
    assert read_memory(OLDER, "latest", tmp_path / "cache")[0] == expected


def test_a_chunk_of_ours_has_the_name_blake3(older: Path, tmp_path: Path) -> None:
    source = older_checkpoint(tmp_path / "source")
    push_to_layout(source, older, "now")
    expected = (source / FILE).read_bytes()
    index = decode_index(base64.b64decode(manifest_of(older, "now").annotations[ANNOTATION_INDEX]))
    files = {file.entry.path: file for layer in index.layers for file in layer.files}
    for layer in index.layers:
        assert layer.chunk_digest is ChunkDigest.BLAKE3
    inode = files[FILE.encode()].entry.inode
    assert inode is not None and len(inode.extents) == 10
    for start, length, chunk, _ in inode.extents:
        assert chunk.key == chunk.digest == blake3(expected[start : start + length]).digest()
    for key, data in index.contents.items():
        assert key == blake3(data).digest()


@pytest.mark.parametrize("indexed", [True, False], ids=["by the index", "by the table of contents"])
def test_a_damaged_chunk_is_refused(indexed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that do not compress: the frame still decompresses, to something else."""
    source = older_checkpoint(tmp_path / "source")
    (source / FILE).write_bytes(os.urandom(PAGES * PAGE))
    push_to_layout(source, tmp_path / "layout")
    pages = manifest_of(tmp_path / "layout").layers[-1]
    blob = tmp_path / "layout/blobs" / str(pages.digest).replace(":", "/")
    data = bytearray(blob.read_bytes())
    data[1_000_000] ^= 1
    blob.write_bytes(data)
    if not indexed:
        monkeypatch.setattr(index_document, "_MAGICS", ())
    with pytest.raises(ExceptionGroup) as caught:
        read_memory(tmp_path / "layout", "latest", tmp_path / "cache")
    (error,) = caught.value.exceptions
    assert isinstance(error, IntegrityError) and "wrong bytes twice" in str(error)


def test_a_chunk_is_not_taken_by_its_other_digest(older: Path, tmp_path: Path) -> None:
    push_to_layout(older_checkpoint(tmp_path / "source"), older, "now")
    for tag, right in (("latest", ChunkDigest.SHA256), ("now", ChunkDigest.BLAKE3)):
        manifest = manifest_of(older, tag)
        index = decode_index(base64.b64decode(manifest.annotations[ANNOTATION_INDEX]))
        blob = layer_blob(older, manifest.layers[-1])
        (file,) = (file for file in index.layers[-1].files if file.entry.path == FILE.encode())
        assert file.entry.inode is not None
        chunk = file.entry.inode.extents[0].chunk
        encoded = memoryview(blob.read_at(chunk.offset, chunk.size))
        for kind in ChunkDigest:
            layer = open_indexed(blob, chunk.layer, Settings(), kind)
            if kind is right:
                assert len(layer.decode(chunk, encoded)) == chunk.length
            else:
                with pytest.raises(IntegrityError):
                    layer.decode(chunk, encoded)


def test_an_older_reader_takes_the_tables_of_contents(
    older: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It knows two versions, and says that it does not know this one."""
    source = older_checkpoint(tmp_path / "source")
    push_to_layout(source, older, "now")
    monkeypatch.setattr(index_document, "_MAGICS", (b"CKPTIDX1", b"CKPTIDX2"))
    assert read_memory(older, "now", tmp_path / "cache")[0] == (source / FILE).read_bytes()
    assert "the index in the manifest is not used: the index is of no known version" in caplog.text
    assert read_memory(older, "latest", tmp_path / "cache2")[0] == (source / FILE).read_bytes()


@pytest.mark.parametrize("older_first", [True, False])
@pytest.mark.parametrize("changed", [range(0), range(100, 130)])
def test_diff_of_both_reads_what_the_digests_do_not_tell(changed: range, older_first: bool, tmp_path: Path) -> None:
    push_to_layout(older_checkpoint(tmp_path / "source", changed), tmp_path / "now")
    layouts = [OLDER, tmp_path / "now"] if older_first else [tmp_path / "now", OLDER]
    found, _ = with_layouts(layouts, tmp_path / "cache", lambda images: diff_images(images[0], images[1]))
    (memory,) = found.containers[0].memory
    assert (memory.changed_pages, memory.same_pages) == (len(changed), PAGES - len(changed))
    assert [change.path for change in found.files] == ([FILE] if changed else [])


def test_an_increment_of_an_image_of_before(older: Path, tmp_path: Path) -> None:
    """Its layer is used again with the digests that it has; one more on top finds what is the same in both."""
    changed = [range(100, 130), range(120, 140)]
    now, later = (older_checkpoint(tmp_path / f"source{n}", which) for n, which in enumerate(changed))
    first = push_to_layout(now, older, "now", parent=f"oci:{older}:latest")
    assert first.increment is not None and first.increment.changed == 30 * PAGE
    second = push_to_layout(later, older, "later", parent=f"oci:{older}:now")
    assert second.increment is not None and second.increment.changed == 30 * PAGE
    manifest = manifest_of(older, "later")
    index = decode_index(base64.b64decode(manifest.annotations[ANNOTATION_INDEX]))
    reused = manifest_of(older, "latest").layers[-1].digest
    for layer in index.layers:
        assert layer.chunk_digest is (ChunkDigest.SHA256 if layer.digest == reused else ChunkDigest.BLAKE3)
    assert len({layer.chunk_digest for layer in index.layers}) == 2
    for tag, source in (("now", now), ("later", later)):
        target = tmp_path / f"pulled-{tag}"
        pull(LayoutSource(Reference.parse(f"oci:{older}:{tag}")), target, LayoutSource, NetworkCounters())
        assert (target / FILE).read_bytes() == (source / FILE).read_bytes()


@pytest.mark.parametrize("tags", [("latest", "now"), ("now", "latest")])
def test_memory_is_shared_by_address_across_digests(tags: tuple[str, str], older: Path, tmp_path: Path) -> None:
    """No chunk has the name that it has in the other; cells are found where the pagemaps say, and hashed."""
    sources = {"latest": older_checkpoint(tmp_path / "a"), "now": older_checkpoint(tmp_path / "b", range(100, 130))}
    push_to_layout(sources["now"], older, "now")
    fetched = []
    for tag in tags:
        data, count = read_memory(older, tag, tmp_path / "cache")
        assert data == (sources[tag] / FILE).read_bytes()
        fetched.append(count)
    alone = read_memory(older, tags[1], tmp_path / "alone")[1]
    assert fetched[1] < alone  # though the table of the cells came on top, and the pages compress to almost nothing


def test_an_index_can_tell_no_chunks_of_a_plain_tar(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whose bytes nobody would check: they would come into every cache under the name that the index gives them."""
    blob = blob_of(bytes(10240))
    victim = OF[ChunkDigest.BLAKE3](b"what another image has")
    file = IndexedFile(Entry(b"f", Inode(0o100644, size=512)), 0, [(0, 512, 0, 512, victim)])
    index = encode_index([IndexedLayer(blob.descriptor.digest, blob.size, [file], ChunkDigest.BLAKE3)])
    layout = layout_with(tmp_path / "layout", [blob], {ANNOTATION_INDEX: base64.b64encode(index).decode()})
    manifest = LayoutSource(Reference.parse(f"oci:{layout}")).resolve()
    assert isinstance(manifest, Manifest) and ANNOTATION_INDEX in manifest.annotations

    async def look(images: list[OpenImage]) -> bool:
        return await images[0].find(b"f") is None

    assert with_layouts([layout], tmp_path / "cache", look)[0]
    assert "tells chunks of layers that have none" in caplog.text
    with pytest.raises(FormatError, match="which has none"):
        open_indexed(blob, 0, Settings(), ChunkDigest.BLAKE3)
