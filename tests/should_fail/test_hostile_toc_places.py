"""Annotations, footers and digests that lead to the wrong table of contents, or to none."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptfs.errors import FormatError, IntegrityError
from ckptfs.layers.estargz import EStargzFormat
from ckptfs.settings import KiB, Settings
from tests.support.blobs import BytesBlob, ScannedLayer
from tests.support.tars import END, header, member
from tests.support.tocs import (
    OLD,
    PAYLOAD,
    STARGZ,
    STORAGE,
    entry,
    estargz,
    estargz_footer,
    frame,
    sha256,
    table,
    zstd_chunked,
)
from tests.support.trees import layout_with
from tests.support.views import show

# M8: whose table it is


@pytest.mark.row("M8")
def test_a_layer_that_is_both_estargz_and_zstd_chunked() -> None:
    toc = table([entry()])
    blob = zstd_chunked(toc)
    blob.descriptor = blob.descriptor._replace(annotations={**blob.descriptor.annotations, STARGZ: sha256(toc)})
    with pytest.raises(FormatError, match="at once"):
        ScannedLayer.of(blob)
    allowed = zstd_chunked(toc, prefix=OLD)  # the stargz snapshotter's own dialect has both
    allowed.descriptor = allowed.descriptor._replace(
        annotations={**allowed.descriptor.annotations, STARGZ: sha256(toc)}
    )
    assert ScannedLayer.of(allowed).entries


@pytest.mark.row("M8")
def test_a_table_that_one_image_names_is_not_another_images(tmp_path: Path) -> None:
    """Two images of the same layer, each with a table in it: a node that has seen one shows the other as it is."""
    first, second = table([entry(name="first")]), table([entry(name="second")])
    inner = zstd_chunked(first)
    outer = zstd_chunked(second, payload=inner.data)
    inner = BytesBlob(outer.data, outer.descriptor._replace(annotations=inner.descriptor.annotations))
    for name, layer in (("first", inner), ("second", outer), ("first", inner)):
        layout = tmp_path / name
        if not layout.exists():
            layout_with(layout, [layer])
        assert set(show(f"oci:{layout}", tmp_path / "cache", "raw").entries) == {name}


@pytest.mark.row("M8")
@pytest.mark.parametrize("prefix", [STORAGE, OLD])
@pytest.mark.parametrize(
    "annotations",
    [
        {"manifest_checksum": ""},
        {"manifest_position": ""},
        {"manifest_checksum": "sha256:xyz"},
        {"manifest_position": "1:2:3"},
        {"manifest_position": "1:2:3:4:5"},
        {"manifest_position": "a:b:c:d"},
        {"manifest_position": "-1:2:3:1"},
        {"manifest_position": "0:10:10:2"},
        {"manifest_position": "0:0:10:1"},
        {"manifest_position": "100000:10:10:1"},
        {"manifest_position": f"0:{1 << 62}:10:1"},
        {"manifest_position": f"0:10:{1 << 62}:1"},
        {"manifest_position": "\u0661:10:10:1"},
        {"manifest_position": "9" * 30 + ":10:10:1"},
    ],
    ids=str,
)
def test_annotations_that_name_no_table(annotations: dict[str, str], prefix: str) -> None:
    with pytest.raises(FormatError):
        ScannedLayer.of(zstd_chunked(table([entry()]), prefix=prefix, **annotations))


@pytest.mark.row("M8")
def test_a_table_with_another_digest() -> None:
    toc, other = table([entry()]), sha256(b"other")
    with pytest.raises(IntegrityError, match="table of contents"):
        ScannedLayer.of(zstd_chunked(toc, manifest_checksum=other))
    for blob in (estargz(toc), zstd_chunked(toc, prefix=OLD)):
        blob.descriptor = blob.descriptor._replace(annotations={**blob.descriptor.annotations, STARGZ: other})
        with pytest.raises(IntegrityError, match="table of contents"):
            ScannedLayer.of(blob)


@pytest.mark.row("M8")
def test_an_estargz_digest_that_is_no_digest() -> None:
    blob = estargz(table([]))
    blob.descriptor = blob.descriptor._replace(annotations={STARGZ: "sha256:x"})
    with pytest.raises(FormatError, match="digest"):
        ScannedLayer.of(blob)


# eStargz footers


@pytest.mark.row("M7")
@pytest.mark.parametrize(
    "footer",
    [
        b"",
        b"x" * 51,
        estargz_footer(0),
        estargz_footer(1 << 40),
        estargz_footer(3),
        estargz_footer(0, b"SG\x16\x00" + b"-" + b"0" * 15 + b"STARGZ"),
        estargz_footer(0, b"SG\x16\x00" + b" " * 16 + b"STARGZ"),
        estargz_footer(0, b"SG\x16\x00%016xSTARGX"),
    ],
    ids=range(8),
)
def test_a_footer_that_names_no_table(footer: bytes) -> None:
    with pytest.raises((FormatError, IntegrityError)):
        ScannedLayer.of(estargz(table([]), footer=footer))


def test_a_blob_shorter_than_a_footer() -> None:
    for size in (0, 1, 46, 50):
        blob = estargz(table([]))
        short = BytesBlob(blob.data[:size], blob.descriptor._replace(size=size))
        with pytest.raises(FormatError, match="footer"):
            ScannedLayer.of(short)


def test_a_footer_of_the_old_kind_and_one_for_a_table_elsewhere() -> None:
    toc = table([entry(endOffset=None)])
    payload = gzip.compress(PAYLOAD)
    old = estargz(toc, footer=estargz_footer(len(payload), b"%016xSTARGZ"))
    assert [found.path for found in ScannedLayer.of(old).entries] == [b"file", b"stargz.index.json"]
    external = estargz(toc, footer=estargz_footer(0, b"SG\x11\x00STARGZEXTERNALTOC"))
    with pytest.raises(FormatError, match="image of its own"):
        ScannedLayer.of(external)


@pytest.mark.parametrize(
    "index",
    [
        END,
        member(b"other.json", b"{}"),
        member(b"stargz.index.json", b"{}") * 2,
        header(b"stargz.index.json", flag=b"5") + END,
        header(b"stargz.index.json", flag=b"1", link=b"x") + END,
        header(b"stargz.index.json", 1 << 40),
        b"x" * 1024,
    ],
    ids=range(7),
)
def test_an_index_member_that_holds_something_else(index: bytes) -> None:
    blob = estargz(b"{}", index=index)
    with pytest.raises(FormatError):
        ScannedLayer.of(blob)


def test_a_table_larger_than_the_first_read() -> None:
    settings = Settings()._replace(sizes=Settings().sizes._replace(toc_guess=64 * KiB, sequential_extent=100 * KiB))
    noise = random.Random(1).randbytes(300_000).hex()
    toc = table([entry(endOffset=None), {"type": "dir", "name": "d", "noise": noise}])
    blob = estargz(toc)
    scanned = ScannedLayer.of(blob, EStargzFormat(), settings)
    assert len(blob.ranges) == 2 and blob.ranges[0][1] == 64 * KiB
    assert blob.ranges[1][0] + blob.ranges[1][1] == blob.ranges[0][0], "no byte is read twice"
    index = scanned.entries[-1].inode
    assert index is not None and len(index.extents) == -(-len(toc) // (100 * KiB))
    assert scanned.read(index) == toc


def test_files_that_share_a_gzip_member() -> None:
    """`--estargz-min-chunk-size`: one offset, several inner offsets."""
    files = {f"f{i}": bytes((i,)) * (100 * i) for i in range(1, 6)}
    payload, inner, rows = b"", 0, []
    for name, data in files.items():
        rows.append(entry(name=name, size=len(data), digest=sha256(data), innerOffset=inner or None, endOffset=None))
        payload += data + bytes(512)
        inner = len(payload)
    more = gzip.compress(b"next")
    shared = gzip.compress(payload)
    rows.append(entry(name="next", size=4, digest=sha256(b"next"), offset=len(shared), endOffset=None))
    scanned = ScannedLayer.of(estargz(table(rows), shared + more))
    for found in scanned.entries[:-2]:
        assert found.inode is not None and scanned.read(found.inode) == files[found.path.decode()]
        assert found.inode.extents[0].chunk.size <= len(shared)


def test_zeros_are_holes_and_frames_may_be_several() -> None:
    first, last = b"a" * 1000, b"b" * 500
    packed = frame(first[:400]) + frame(first[400:]), frame(last)
    payload = b"".join(packed)
    rows = [
        {"type": "reg", "name": "f", "size": 101_500, "offset": 0, "endOffset": len(payload), "chunkSize": 1000}
        | {"chunkDigest": sha256(first)},
        {"type": "chunk", "name": "f", "chunkOffset": 1000, "chunkSize": 100_000, "offset": len(packed[0])}
        | {"chunkType": "zeros", "chunkDigest": sha256(bytes(100_000))},
        {"type": "chunk", "name": "f", "chunkOffset": 101_000, "offset": len(packed[0]), "chunkDigest": sha256(last)},
    ]
    scanned = ScannedLayer.of(zstd_chunked(table(rows), payload))
    inode = scanned.entries[0].inode
    assert inode is not None and [extent.start for extent in inode.extents] == [0, 101_000]
    assert scanned.read(inode) == first + bytes(100_000) + last


@pytest.mark.parametrize("end", [True, False])
def test_zeros_before_the_only_chunk_stay_before_it(end: bool) -> None:
    last = b"b" * 500
    payload = frame(last)
    rows: list[dict[str, object]] = [
        {"type": "reg", "name": "f", "size": 1500, "chunkSize": 1000, "chunkType": "zeros"}
        | {"chunkDigest": sha256(bytes(1000))},
        {"type": "chunk", "name": "f", "chunkOffset": 1000, "offset": 0, "chunkDigest": sha256(last)},
    ]
    if end:
        rows[0]["endOffset"] = len(payload)
    scanned = ScannedLayer.of(zstd_chunked(table(rows), payload))
    inode = scanned.entries[0].inode
    assert inode is not None and [extent.start for extent in inode.extents] == [1000]
    assert scanned.read(inode) == bytes(1000) + last


def test_a_file_of_zeros_need_not_say_where_they_are() -> None:
    row = {
        "type": "reg",
        "name": "f",
        "size": 1000,
        "chunkType": "zeros",
        "chunkDigest": sha256(bytes(1000)),
        "endOffset": 9,
    }
    scanned = ScannedLayer.of(zstd_chunked(table([row])))
    inode = scanned.entries[0].inode
    assert inode is not None and not inode.extents and scanned.read(inode) == bytes(1000)


@pytest.mark.parametrize("make", [zstd_chunked, estargz])
def test_a_layer_without_entries_has_null_for_them(make: Callable[[bytes], BytesBlob]) -> None:
    """As skopeo 1.9 and podman 4.3 write it for the empty layer of an instruction that changes nothing."""
    names = [entry.path for entry in ScannedLayer.of(make(b'{"version":1,"entries":null}')).entries]
    assert names == ([] if make is zstd_chunked else [b"stargz.index.json"])


def test_json_is_read_as_written_by_go() -> None:
    """`encoding/json` with indent, absent and null fields, and times with fractions and zones."""
    rows = [
        {"type": "dir", "name": "d/", "modtime": "2026-01-01T00:00:00.5+01:00", "uid": None, "xattrs": None},
        {"type": "dir", "name": "e/", "modtime": "1969-12-31T23:59:59.123456789Z", "linkName": ""},
        {"type": "dir", "name": "f/", "modtime": None},
        {"type": "dir", "name": "g/", "modtime": "0001-01-01T00:00:00Z"},
    ]
    toc = json.dumps({"version": 1, "entries": rows}, indent="\t").encode()
    times = [found.inode.mtime_ns for found in ScannedLayer.of(zstd_chunked(toc)).entries if found.inode]
    assert times == [1_767_222_000_500_000_000, -876_543_211, 0, -62_135_596_800_000_000_000]
