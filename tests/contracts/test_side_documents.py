"""Layers opened with a side document show what an eager extraction shows, whatever the document is."""

import gzip
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from ckptfs.errors import IntegrityError
from ckptfs.layers.estargz import ExternalTable
from ckptfs.layers.soci import Ztoc
from ckptfs.layers.zstd_seekable import read_seek_table
from ckptfs.settings import KiB
from tests.contracts.test_layers import CORPUS, PACKED, plain_tar
from tests.support import golden, soci
from tests.support.blobs import TAR, BytesBlob, ScannedLayer, blob_of, layout_layer
from tests.support.side import SETTINGS, Made, external_estargz, indexed, scanned, seekable
from tests.support.tars import END, member
from tests.support.tocs import STARGZ, sha256
from tests.support.tools import require, run
from tests.support.trees import make_tree, tar_listing

ITEMS = ("counter/k8s-zstd", "tree/k8s-gzip")


def members(tar: bytes) -> bytes:
    return b"".join(gzip.compress(tar[i : i + 100_001]) for i in range(0, len(tar), 100_001))


def _index(compress: Callable[[bytes], bytes], suffix: str, own: bool) -> Callable[[bytes], Made]:
    def make(tar: bytes) -> Made:
        blob = blob_of(compress(tar), TAR + suffix)
        return blob, indexed(blob, own=own)

    return make


def _soci(version: int) -> Callable[[bytes], Made]:
    def make(tar: bytes) -> Made:
        blob = blob_of(gzip.compress(tar), TAR + "+gzip")
        return blob, Ztoc.parse(soci.gzip_ztoc(blob, tar, version=version), blob.descriptor, SETTINGS)

    return make


def _soci_tar(tar: bytes) -> Made:
    blob = blob_of(tar)
    return blob, Ztoc.parse(soci.tar_ztoc(blob), blob.descriptor, SETTINGS)


def _seekable(checksum: bool) -> Callable[[bytes], Made]:
    def make(tar: bytes) -> Made:
        blob = blob_of(seekable(tar, checksum=checksum), TAR + "+zstd")
        table = read_seek_table(blob, SETTINGS)
        assert table is not None
        return blob, table

    return make


ZSTD = zstandard.ZstdCompressor().compress
MAKERS: dict[str, Callable[[bytes], Made]] = {
    "gzip index, own": _index(gzip.compress, "+gzip", True),
    "gzip index": _index(gzip.compress, "+gzip", False),
    "gzip members index": _index(members, "+gzip", False),
    "tar index": _index(bytes, "", False),
    "zstd index, own": _index(ZSTD, "+zstd", True),
    "zstd index": _index(ZSTD, "+zstd", False),
    "soci v1": _soci(1),
    "soci v2": _soci(2),
    "soci of a plain tar": _soci_tar,
    "seek table": _seekable(True),
    "seek table without checksums": _seekable(False),
}
FORMATS = {
    "gzip": "gzip+index",
    "tar": "tar+index",
    "zstd": "zstd+index",
    "soci": "gzip+soci",
    "seek": "zstd:seekable",
}


@pytest.mark.row("F1")
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("item", ITEMS)
def test_a_real_image_equals_its_eager_extraction(item: str, maker: str) -> None:
    blob, document = MAKERS[maker](plain_tar(item))
    found = scanned(blob, document)
    assert found.layer.format == ("tar+soci" if maker == "soci of a plain tar" else FORMATS[maker.split()[0]])
    assert found.layer.sequential is maker.startswith("zstd")
    assert golden.listing(found.entries, found.read) == golden.load(CORPUS / f"{item}.golden.json")


@pytest.mark.row("F1")
def test_estargz_with_its_table_in_another_image() -> None:
    blob, document = external_estargz()
    found = scanned(blob, document)
    expected = golden.load(CORPUS / "counter/k8s-estargz64k.golden.json")
    del expected["entries"]["stargz.index.json"]  # which such a layer does not have
    assert golden.listing(found.entries, found.read) == expected
    assert found.layer.verification == "chunk"


def test_an_external_table_is_only_fetched_where_the_footer_says_so() -> None:
    def fetch() -> bytes:
        raise AssertionError

    blob = layout_layer(CORPUS / "counter/k8s-estargz64k.oci")
    assert len(scanned(blob, ExternalTable(fetch, SETTINGS)).entries) == 34


def test_an_external_table_with_another_digest_is_refused() -> None:
    blob, document = external_estargz()
    other = {**blob.descriptor.annotations, STARGZ: sha256(b"another")}
    with pytest.raises(IntegrityError, match="table of contents"):
        scanned(blob_of(blob.data, TAR + "+gzip", other), document)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("tar", root=True)
    root = tmp_path_factory.mktemp("tree")
    make_tree(root, random.Random(21), False)
    return root


@pytest.mark.row("F1")
@pytest.mark.parametrize("packing", ["gnu", "pax", "pax sparse 1.0", "gnu sparse"])
def test_a_tree_packed_by_gnu_tar(packing: str, tree: Path, tmp_path: Path) -> None:
    archive = tmp_path / "tree.tar"
    run("tar", *PACKED[packing], "--numeric-owner", "-cf", archive, "-C", tree, ".")
    expected = tar_listing(archive, tmp_path / "extracted")
    for maker, make in MAKERS.items():
        if maker.startswith("soci") and "sparse" in packing:
            continue  # the soci tool has no place for the map
        blob, document = make(archive.read_bytes())
        found = scanned(blob, document)
        assert golden.listing(found.entries, found.read, exact=True) == expected, maker


# What reaches a reader was checked.


@pytest.mark.parametrize("maker", MAKERS)
def test_the_label_is_exact(maker: str) -> None:
    blob, document = MAKERS[maker](plain_tar("tree/k8s-gzip"))
    expected = "transport" if maker.startswith("seek") else "chunk"
    assert document.open(blob, 0).verification == expected


@pytest.mark.row("N1")
@pytest.mark.parametrize("maker", [name for name in MAKERS if not name.startswith("zstd") and "without" not in name])
def test_no_flipped_bit_gets_through_a_chunk(maker: str) -> None:
    blob, document = MAKERS[maker](plain_tar("tree/k8s-gzip"))
    found = scanned(blob, document)
    rng = random.Random(2)
    chunks = {extent.chunk for entry in found.entries if entry.inode for extent in entry.inode.extents}
    for chunk in sorted(chunks)[:30]:
        good = blob.read_at(chunk.offset, chunk.size)
        decoded = bytes(found.layer.decode(chunk, memoryview(good)))
        for _ in range(4):
            broken = bytearray(good)
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            try:
                assert bytes(found.layer.decode(chunk, memoryview(broken))) == decoded  # a bit that nobody reads
            except IntegrityError:
                continue


def test_a_stream_with_an_index_is_checked_before_anybody_sees_it() -> None:
    blob, document = MAKERS["zstd index"](plain_tar("tree/k8s-gzip"))
    other = blob_of(ZSTD(plain_tar("counter/k8s-zstd")), TAR + "+zstd")
    seen: list[bytes] = []
    layer = document.open(BytesBlob(other.data, blob.descriptor), 0)
    with pytest.raises(IntegrityError):
        list(layer.scan(lambda chunk, data: seen.append(data)))
    assert not seen


def test_a_streamed_chunk_and_a_fetched_one_are_the_same_in_the_cache() -> None:
    tar = plain_tar("tree/k8s-gzip")
    blob = blob_of(gzip.compress(tar), TAR + "+gzip")
    streamed = ScannedLayer.of(blob)
    own, foreign = scanned(blob, indexed(blob, own=True)), scanned(blob, indexed(blob, own=False))
    keys = [
        {extent.chunk.key for entry in layer.entries if entry.inode for extent in entry.inode.extents}
        for layer in (streamed, own, foreign)
    ]
    assert keys[0] == keys[1]
    assert not keys[0] & keys[2]
    assert all(own.chunk(chunk) == streamed.emitted[chunk.key] for chunk in _chunks(own))


def test_only_the_spans_that_are_read_are_fetched() -> None:
    big = random.Random(1).randbytes(8 << 20)
    tar = member(b"first", b"1") + member(b"big", big) + member(b"last", b"2") + END
    for maker in ("gzip index", "soci v2", "seek table", "tar index"):
        blob, document = MAKERS[maker](tar)
        blob.ranges.clear()
        found = scanned(blob, document)
        assert [entry.path for entry in found.entries] == [b"first", b"big", b"last"]
        inode = found.entries[2].inode
        assert inode is not None and found.read(inode) == b"2"
        assert sum(length for _, length in blob.ranges) <= 3 * 1024 * KiB, maker


def _chunks(layer: ScannedLayer) -> set:  # type: ignore[type-arg]
    return {extent.chunk for entry in layer.entries if entry.inode for extent in entry.inode.extents}


def test_our_reader_agrees_with_the_flatbuffers_package() -> None:
    tar = plain_tar("counter/k8s-zstd")
    blob = blob_of(gzip.compress(tar), TAR + "+gzip")
    document = Ztoc.parse(soci.gzip_ztoc(blob, tar), blob.descriptor, SETTINGS)
    files = soci.files_of(tar)
    assert len(document.files) == len(files)
    for (entry, position), file in zip(document.files, files, strict=True):
        assert entry.path.decode("utf-8", "surrogateescape") == file["name"].strip("/").removeprefix("./")
        if file["type"] == "reg":
            assert entry.inode is not None and (position, entry.inode.size) == (file["offset"], file["size"])
    assert json.loads(soci.soci_index([(blob, b"")], version=1))["config"]["digest"].endswith(
        hashlib.sha256(b"{}").hexdigest()
    )
