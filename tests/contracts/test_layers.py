"""Every layer format shows what an eager extraction shows: entries, metadata and bytes."""

import gzip
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from ckptfs.errors import FormatError, IntegrityError
from ckptfs.layers import formats, select_format
from ckptfs.layers.protocols import OtherFormat
from ckptfs.model.oci import Descriptor, Digest
from ckptfs.model.toc import Chunk, Entry
from ckptfs.model.toc_document import decode_toc, encode_toc
from ckptfs.settings import KiB, MiB, Settings
from tests.support import golden
from tests.support.blobs import TAR, BytesBlob, ScannedLayer, blob_of, layout_layer
from tests.support.tars import END, member
from tests.support.tools import require, run
from tests.support.trees import layout_of, make_tree, tar_listing, without_what_go_drops

CORPUS = Path(__file__).parents[1] / "data" / "corpus"
ZSTD = zstandard.ZstdCompressor()
FOUND = {
    "counter/k8s-zstd": "zstd",
    "counter/k8s-zstdchunked": "zstd:chunked",
    "counter/skopeo19-zstdchunked": "zstd:chunked",
    "counter/k8s-stargz-zstdchunked": "zstd:chunked",
    "counter/k8s-estargz64k": "estargz",
    "tree/k8s-gzip": "gzip",
    "tree/k8s-zstdchunked": "zstd:chunked",
}


def plain_tar(item: str) -> bytes:
    data = layout_layer(CORPUS / f"{item}.oci").data
    if data.startswith(b"\x1f\x8b"):
        return gzip.decompress(data)
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


@pytest.mark.row("F1")
@pytest.mark.parametrize("item", FOUND)
def test_a_real_image_equals_its_eager_extraction(item: str) -> None:
    scanned = ScannedLayer.of(layout_layer(CORPUS / f"{item}.oci"))
    assert scanned.layer.format == FOUND[item]
    assert golden.listing(scanned.entries, scanned.read) == golden.load(CORPUS / f"{item}.golden.json")


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda tar: tar,
    "+gzip": gzip.compress,
    "+zstd": ZSTD.compress,
}
ODD_COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip members": lambda tar: b"".join(gzip.compress(tar[i : i + 100_001]) for i in range(0, len(tar), 100_001)),
    "gzip with padding": lambda tar: gzip.compress(tar) + bytes(1000),
    "gzip with rubbish behind": lambda tar: gzip.compress(tar) + b"\x1frubbish",
    "zstd frames": lambda tar: b"".join(ZSTD.compress(tar[i : i + 100_001]) for i in range(0, len(tar), 100_001)),
    "zstd skippable": lambda tar: b"\x5a\x2a\x4d\x18\x03\0\0\0abc" + ZSTD.compress(tar) + b"\x50\x2a\x4d\x18\0\0\0\0",
    "zstd without size": lambda tar: zstandard.ZstdCompressor(write_content_size=False).compress(tar),
    "not compressed": lambda tar: tar,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("item", ["counter/k8s-zstd", "tree/k8s-gzip"])
def test_the_same_tar_in_every_compression(item: str, suffix: str) -> None:
    scanned = ScannedLayer.of(blob_of(COMPRESSIONS[suffix](plain_tar(item)), TAR + suffix))
    assert scanned.layer.format == {"": "tar", "+gzip": "gzip", "+zstd": "zstd"}[suffix]
    assert scanned.layer.sequential is bool(suffix)
    assert golden.listing(scanned.entries, scanned.read) == golden.load(CORPUS / f"{item}.golden.json")


@pytest.mark.parametrize("media_type", [TAR + "+gzip", TAR + "+zstd"])
@pytest.mark.parametrize("kind", ODD_COMPRESSIONS)
def test_odd_streams_whatever_their_media_type_says(kind: str, media_type: str) -> None:
    scanned = ScannedLayer.of(blob_of(ODD_COMPRESSIONS[kind](plain_tar("tree/k8s-gzip")), media_type))
    assert golden.listing(scanned.entries, scanned.read) == golden.load(CORPUS / "tree/k8s-gzip.golden.json")


@pytest.mark.parametrize("item", FOUND)
def test_a_table_of_contents_survives_the_document(item: str) -> None:
    scanned = ScannedLayer.of(layout_layer(CORPUS / f"{item}.oci"))
    layer, digest = scanned.layer, str(scanned.blob.descriptor.digest)
    document = encode_toc(scanned.entries, layer_digest=digest, format=layer.format, verification=layer.verification)
    toc = decode_toc(document, layer=0, layer_digest=digest)
    assert (toc.format, toc.verification) == (layer.format, layer.verification)
    assert [entry.path for entry in toc.entries] == [entry.path for entry in scanned.entries]
    assert golden.listing(toc.entries, scanned.read) == golden.load(CORPUS / f"{item}.golden.json")


# A tree of everything that a tar can hold, packed and extracted by GNU tar itself.

PACKED = {
    "gnu": ("--format=gnu",),
    "gnu sparse": ("--format=gnu", "--sparse"),
    "oldgnu sparse": ("--format=oldgnu", "--sparse"),
    "pax": ("--format=pax", "--xattrs", "--xattrs-include=*"),
    "pax sparse 0.0": ("--format=pax", "--sparse", "--sparse-version=0.0"),
    "pax sparse 0.1": ("--format=pax", "--sparse", "--sparse-version=0.1"),
    "pax sparse 1.0": ("--format=pax", "--sparse", "--sparse-version=1.0", "--xattrs", "--xattrs-include=*"),
    "ustar": ("--format=ustar",),
    "v7": ("--format=v7",),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Two trees, the one with True for formats that are older than long names."""
    require("tar", root=True)
    trees = {modest: tmp_path_factory.mktemp("tree") for modest in (False, True)}
    for modest, root in trees.items():
        make_tree(root, random.Random(20), modest)
    return trees


@pytest.mark.row("F1")
@pytest.mark.parametrize("packing", PACKED)
def test_a_tree_packed_by_gnu_tar(packing: str, trees: dict[bool, Path], tmp_path: Path) -> None:
    old = packing in ("ustar", "v7")
    archive = tmp_path / "tree.tar"
    # Old formats cannot hold every name and type: tar says so, exits with 2 and leaves them out.
    tar = subprocess.run(
        ["tar", *PACKED[packing], "--numeric-owner", "-cf", archive, "-C", trees[old], "."],
        capture_output=True,
        check=False,
    )
    assert tar.returncode == 0 or old, tar.stderr
    expected = tar_listing(archive, tmp_path / "extracted")
    assert len(expected["entries"]) > 75
    data = archive.read_bytes()
    for suffix, compress in COMPRESSIONS.items():
        scanned = ScannedLayer.of(blob_of(compress(data), TAR + suffix))
        assert golden.listing(scanned.entries, scanned.read, exact=True) == expected


def test_a_tree_pushed_by_skopeo_as_zstd_chunked(trees: dict[bool, Path], tmp_path: Path) -> None:
    require("skopeo")
    blob, listing = pushed_by_skopeo(trees[False], tmp_path, "--exclude=latin-*")
    scanned = ScannedLayer.of(blob)
    assert scanned.layer.format == "zstd:chunked"
    assert golden.listing(scanned.entries, scanned.read, exact=True) == without_what_go_drops(listing)


def test_names_that_a_table_has_lost_are_read_from_the_stream(trees: dict[bool, Path], tmp_path: Path) -> None:
    """Go's JSON has U+FFFD for what is not UTF-8: two names may have become one."""
    require("skopeo")
    blob, listing = pushed_by_skopeo(trees[False], tmp_path)
    with pytest.raises(OtherFormat, match="has lost names that are not UTF-8") as found:
        ScannedLayer.of(blob)
    scanned = ScannedLayer.of(blob, found.value.format)
    assert scanned.layer.format == "zstd"
    assert golden.listing(scanned.entries, scanned.read, exact=True) == listing


def pushed_by_skopeo(tree: Path, folder: Path, *options: str) -> tuple[BytesBlob, golden.Listing]:
    """The tree as a zstd:chunked layer, and what GNU tar makes of it."""
    archive = folder / "tree.tar"
    run("tar", *PACKED["pax"], "--numeric-owner", *options, "-cf", archive, "-C", tree, ".")
    source, target = layout_of(archive.read_bytes(), folder / "source"), folder / "target"
    run("skopeo", "copy", "--dest-compress-format", "zstd:chunked", f"oci:{source}:latest", f"oci:{target}:latest")
    return layout_layer(target), tar_listing(archive, folder / "extracted")


# How the bytes come.


def test_plain_tar_jumps_over_large_files() -> None:
    big = os.urandom(8 * MiB)
    blob = blob_of(member(b"first", b"1") + member(b"big", big) + member(b"second", big) + member(b"last", b"2") + END)
    scanned = ScannedLayer.of(blob)
    assert [entry.path for entry in scanned.entries] == [b"first", b"big", b"second", b"last"]
    assert sum(length for _, length in blob.ranges) <= 4 * 256 * KiB
    assert len(blob.ranges) == 3
    emitted = sum(map(len, scanned.emitted.values()))
    assert emitted == sum(length for _, length in blob.ranges), "what was read for a header is kept for a reader"


def test_plain_tar_reads_through_small_files_in_growing_windows() -> None:
    data = b"".join(member(b"f%04d" % i, bytes(3000)) for i in range(2000)) + END
    blob = blob_of(data)
    assert len(ScannedLayer.of(blob).entries) == 2000
    assert [length for _, length in blob.ranges[:4]] == [256 * KiB, 512 * KiB, 1 * MiB, 1 * MiB]
    assert sum(length for _, length in blob.ranges) == len(data)


@pytest.mark.parametrize("suffix", ["+gzip", "+zstd"])
def test_a_stream_gives_entries_and_chunks_as_they_arrive(suffix: str) -> None:
    tar = member(b"first", b"1") + member(b"big", os.urandom(8 * MiB)) + member(b"last", b"2") + END
    blob = blob_of(COMPRESSIONS[suffix](tar), TAR + suffix)
    pieces: list[int] = []

    class Counting(BytesBlob):
        def stream(
            self, offset: int, length: int, *, attempt: int = 0, patient: bool = False
        ) -> Iterator[bytes | memoryview]:
            for piece in super().stream(offset, length):
                pieces.append(len(piece))
                yield piece

    position = 0

    def emit(chunk: Chunk, data: bytes) -> None:
        nonlocal position
        assert chunk.offset == position and tar[position : position + len(data)] == data
        position += len(data)

    seen: list[Entry] = []
    for entry in select_format(blob.descriptor).open(Counting(blob.data, blob.descriptor), 0, Settings()).scan(emit):
        if not seen:
            assert sum(pieces) <= (1024 if suffix == "+gzip" else 512) * KiB  # a chunk of the grid
        seen.append(entry)
        if entry.path == b"last":
            assert sum(pieces) > 8 * MiB
    assert [entry.path for entry in seen] == [b"first", b"big", b"last"]
    assert position == len(tar)


def test_a_stream_with_another_digest_is_refused_at_its_end() -> None:
    data = gzip.compress(member(b"file", b"data") + END, mtime=0)
    other = bytes([data[30] ^ 1])
    for broken in (data[:4] + b"\x01" + data[5:], data[:30] + other + data[31:], data[: len(data) // 2]):
        blob = BytesBlob(broken, Descriptor(TAR + "+gzip", Digest.of(data), len(data)))
        with pytest.raises(IntegrityError, match="digest"):
            ScannedLayer.of(blob)


def test_a_damaged_stream_with_the_right_digest_is_the_images_fault() -> None:
    data = gzip.compress(member(b"file", os.urandom(5000)) + END)
    for broken in (data[: len(data) // 2], data[:2000] + bytes(10) + data[2010:]):
        with pytest.raises(FormatError, match="gzip"):
            ScannedLayer.of(blob_of(broken, TAR + "+gzip"))


def test_streamed_chunks_are_not_decoded_one_by_one() -> None:
    blob = blob_of(b"", TAR + "+gzip")
    layer = select_format(blob.descriptor).open(blob, 0, Settings())
    with pytest.raises(FormatError):
        layer.decode(Chunk(b"", 0, 0, 1, 1), memoryview(b"x"))


@pytest.mark.parametrize("item", [name for name, found in FOUND.items() if found in ("zstd:chunked", "estargz")])
@pytest.mark.row("N1")
def test_no_flipped_bit_gets_through_a_chunk(item: str) -> None:
    scanned = ScannedLayer.of(layout_layer(CORPUS / f"{item}.oci"))
    rng = random.Random(1)
    chunks = [extent.chunk for entry in scanned.entries if entry.inode for extent in entry.inode.extents]
    for chunk in rng.sample(chunks, min(40, len(chunks))):
        good = scanned.blob.read_at(chunk.offset, chunk.size)
        decoded = bytes(scanned.layer.decode(chunk, memoryview(good)))
        broken = bytearray(good)
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        try:
            assert bytes(scanned.layer.decode(chunk, memoryview(broken))) == decoded  # a bit that nobody reads
        except IntegrityError:
            continue


def test_a_table_of_contents_is_asked_for_elsewhere_when_it_is_damaged() -> None:
    blob = layout_layer(CORPUS / "counter/k8s-estargz64k.oci")

    class Damaged(BytesBlob):
        def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
            data = super().read_at(offset, length)
            return data if attempt >= self.good else bytes(len(data))

    damaged = Damaged(blob.data, blob.descriptor)
    damaged.good = 1
    assert len(ScannedLayer.of(damaged).entries) == 34
    damaged.good = 2
    with pytest.raises(FormatError):
        ScannedLayer.of(damaged)


def test_chunks_carry_the_number_of_their_layer() -> None:
    for item in FOUND:
        blob = layout_layer(CORPUS / f"{item}.oci")
        layer = select_format(blob.descriptor).open(blob, 7, Settings())
        for entry in layer.scan(lambda chunk, data: None):
            assert all(extent.chunk.layer == 7 for extent in (entry.inode.extents if entry.inode else ()))


def test_formats_are_told_apart_by_media_type_and_annotations() -> None:
    digest = Digest.of(b"")
    toc = {"containerd.io/snapshot/stargz/toc.digest": str(digest)}
    chunked = {"io.github.containers.zstd-chunked.manifest-checksum": str(digest)}
    docker, foreign = (
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    )
    old = "application/vnd.oci.image.layer.nondistributable.v1.tar"
    for media_type, annotations, expected in (
        (TAR, {}, "tar"),
        (docker, {}, "tar"),
        (old, {}, "tar"),
        (TAR + "+gzip", {}, "gzip"),
        (docker + ".gzip", {}, "gzip"),
        (foreign + ".gzip", {}, "gzip"),
        (TAR + "+gzip", toc, "estargz"),
        (docker + ".gzip", toc, "estargz"),
        (TAR + "+gzip", chunked, "gzip"),
        (TAR + "+zstd", {}, "zstd"),
        (docker + ".zstd", {}, "zstd"),
        (old + "+zstd", chunked, "zstd:chunked"),
        (TAR + "+zstd", toc, "zstd"),
    ):
        assert select_format(Descriptor(media_type, digest, 0, annotations)).name == expected
    assert len({layer_format.name for layer_format in formats()}) == len(formats())


@pytest.mark.parametrize(
    ("media_type", "message"),
    [
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "encrypted"),
        ("application/vnd.cncf.helm.chart.content.v1.tar+gzip", "helm"),
        ("application/octet-stream", "octet-stream"),
        ("", "not a tar"),
    ],
)
def test_other_layers_are_refused_by_name(media_type: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        select_format(Descriptor(media_type, Digest.of(b""), 0))
    assert caught.value.hint
