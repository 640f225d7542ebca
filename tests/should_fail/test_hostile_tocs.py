"""Tables of contents that nobody should write, one test for each sin: refused, or harmless."""

import gzip
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import zstandard

from ckptfs.errors import FormatError, IntegrityError, LimitExceeded
from ckptfs.layers.estargz import EStargzFormat
from ckptfs.layers.zstd_chunked import ZstdChunkedFormat
from ckptfs.settings import GiB, Limits, MiB, Settings
from tests.support.blobs import ScannedLayer
from tests.support.memory import peak_memory
from tests.support.tars import END, header, member
from tests.support.tocs import (
    OLD,
    PAYLOAD,
    STARGZ,
    entry,
    estargz,
    frame,
    gzip_bomb,
    sha256,
    table,
    xattr,
    zstd_chunked,
)

LIMITS = Limits()
END_OF_FRAME = len(frame())


def with_limits(**limits: int) -> Settings:
    return Settings()._replace(limits=LIMITS._replace(**limits))


def refused(toc: bytes, match: str = ".") -> None:
    """Refused in both dialects."""
    for blob in (zstd_chunked(toc), estargz(toc)):
        with pytest.raises(FormatError, match=match) as caught:
            ScannedLayer.of(blob)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_the_tables_of_these_tests_are_good_as_they_are() -> None:
    for blob in (zstd_chunked(table([entry()])), estargz(table([entry(endOffset=None)]))):
        scanned = ScannedLayer.of(blob)
        inode = scanned.entries[0].inode
        assert inode is not None and scanned.read(inode) == PAYLOAD
    scanned = ScannedLayer.of(zstd_chunked(table([entry()]), prefix=OLD))
    assert [found.path for found in scanned.entries] == [b"file"]


# M1: paths


@pytest.mark.row("M1")
@pytest.mark.parametrize("name", ["../x", "a/../../b", "..", "a\0b", "n" * 256, "d/" * 256 + "x", "\ud800", ""])
def test_a_name_that_is_no_path(name: str) -> None:
    refused(table([entry(name=name)]))
    refused(table([{"type": "hardlink", "name": "x", "linkName": name or 7}]))


@pytest.mark.row("M1")
def test_a_root_that_is_not_a_directory() -> None:
    refused(table([entry(name="./")]), "root")
    (root,) = ScannedLayer.of(zstd_chunked(table([{"type": "dir", "name": "./"}]))).entries
    assert root.path == b""


def test_a_name_that_is_not_utf8() -> None:
    (found,) = ScannedLayer.of(zstd_chunked(table([{"type": "dir", "name": "latin-\udce9"}]))).entries
    assert found.path == b"latin-\xe9"


# M4: bombs


@pytest.mark.row("M4")
@pytest.mark.parametrize("kind", ["zstd", "zstd without size", "gzip"])
def test_a_chunk_that_decompresses_to_far_more_than_it_says(
    kind: str, record_property: Callable[[str, object], None]
) -> None:
    if kind == "gzip":
        bomb = gzip_bomb(256 * MiB)
        blob = estargz(table([entry(endOffset=None)]), bomb)
    else:
        parameters = zstandard.ZstdCompressionParameters.from_level(3, write_content_size=kind == "zstd")
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=1 * GiB)
        bomb = b"".join(compressor.compress(bytes(MiB)) for _ in range(1024)) + compressor.flush()
        blob = zstd_chunked(table([entry(endOffset=len(bomb))]), bomb)
    scanned = ScannedLayer.of(blob)
    inode = scanned.entries[0].inode
    assert inode is not None
    (extent,) = inode.extents
    data = blob.data[extent.chunk.offset : extent.chunk.offset + extent.chunk.size]
    with peak_memory() as peak, pytest.raises(IntegrityError):
        scanned.layer.decode(extent.chunk, memoryview(data))
    record_property("figure", f"a chunk of {kind}: peak {peak.grown / MiB:.1f} MiB")
    assert peak.grown < 16 * MiB


@pytest.mark.row("M4")
def test_a_table_that_decompresses_to_a_gigabyte() -> None:
    bomb = zstandard.compress(bytes(1 * GiB))
    position = f"8:{len(bomb)}:{{}}:1"
    for claimed, error in ((1000, FormatError), (LIMITS.toc_bytes + 1, LimitExceeded)):
        blob = zstd_chunked(b"", bomb, manifest_checksum=sha256(bomb), manifest_position=position.format(claimed))
        blob.data = b"\x50\x2a\x4d\x18" + len(bomb).to_bytes(4, "little") + bomb
        with peak_memory() as peak, pytest.raises(error):
            ScannedLayer.of(blob)
        assert peak.grown < 16 * MiB
    settings = with_limits(toc_bytes=1 * MiB)
    toc = table([])
    blob = estargz(toc, index=header(b"stargz.index.json", 512 * MiB) + bytes(2 * MiB))
    blob.descriptor = blob.descriptor._replace(annotations={STARGZ: sha256(toc)})
    with peak_memory() as peak, pytest.raises(LimitExceeded):
        ScannedLayer.of(blob, EStargzFormat(), settings)
    assert peak.grown < 16 * MiB


# M7: the document


@pytest.mark.row("M7")
@pytest.mark.parametrize(
    "toc",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"version":1}',
        b'{"entries":[]}',
        b'{"version":2,"entries":[]}',
        b'{"version":"1","entries":[]}',
        b'{"version":NaN,"entries":[]}',
        b'{"version":1,"entries":{}}',
        b'{"version":1,"entries":nul}',
        b'{"version":1,"entries":null',
        b'{"version":1,"entries":null,"entries":null}',
        b'{"entries":null}',
        b'{"version":1,"entries":[]',
        b'{"version":1,"entries":[',
        b'{"version":1,"entries":[1]}',
        b'{"version":1,"entries":[{}]}',
        b'{"version":1,"entries":[[]]}',
        b'{"version":1,"entries":[],"entries":[]}',
        b'{"version":1,"version":1,"entries":[]}',
        b'{"version":1,"entries":[{"type":"dir","name":"x"},]}',
        b'{"version":1,"entries":[{"type":"dir","name":"x"} {"type":"dir","name":"y"}]}',
        b'{"version":1,"entries":[{"type":"dir","name":"x","mode":NaN}]}',
        b'{"version":1,"entries":[{"type":"dir","name":"x","mode":Infinity}]}',
        b'{"version":1,"entries":[{"type":"dir","name":"x","mode":' + b"9" * 5000 + b"}]}",
        b'{"version":1,"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"entries":[]}',
        b'{"version":1,"entries":[' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]}",
        b'{1:1,"version":1,"entries":[]}',
    ],
    ids=range(30),
)
def test_a_document_that_is_not_a_table(toc: bytes) -> None:
    refused(toc)


@pytest.mark.row("M7")
def test_what_no_reader_knows_is_passed_over() -> None:
    toc = (
        b' { "x" : [ { "type" : "reg" } ] ,\n "version" : 1 , "entries" : [ { "type":"dir","name":"d","y":[1] } ] }\n '
    )
    assert [found.path for found in ScannedLayer.of(zstd_chunked(toc)).entries] == [b"d"]


@pytest.mark.row("M7")
@pytest.mark.parametrize(
    "fields",
    [
        {"type": "socket"},
        {"type": None},
        {"type": 5},
        {"type": ["reg"]},
        {"name": None},
        {"name": 5},
        {"mode": -1},
        {"mode": 1.5},
        {"mode": "0644"},
        {"mode": True},
        {"mode": 1 << 63},
        {"uid": 1 << 32},
        {"gid": -1},
        {"size": -1},
        {"size": (1 << 62) + 1},
        {"size": len(PAYLOAD) + 1, "chunkSize": len(PAYLOAD)},
        {"size": len(PAYLOAD) - 1, "chunkSize": len(PAYLOAD)},
        {"chunkSize": -1},
        {"chunkOffset": 1},
        {"chunkOffset": -1},
        {"innerOffset": -1},
        {"innerOffset": LIMITS.chunk_bytes + 1},
        {"offset": -1},
        {"offset": 1 << 40},
        {"offset": END_OF_FRAME + 1000},
        {"modtime": "yesterday"},
        {"modtime": 5},
        {"modtime": "2026-13-01T00:00:00Z"},
        {"modtime": "2026-01-01T00:00:00"},
        {"modtime": "0000-01-01T00:00:00Z"},
        {"modtime": "2026-01-01T00:00:00+99:99"},
        {"digest": None},
        {"digest": "sha256:zz"},
        {"digest": "sha256:" + "zz" * 32},
        {"digest": "sha256:" + " " * 64},
        {"digest": "md5:" + "00" * 16},
        {"digest": 5},
        {"xattrs": []},
        {"xattrs": {"user.x": 5}},
        {"xattrs": {"user.x": "*"}},
        {"xattrs": {"user.x": "\u00e9"}},
        {"xattrs": {"": xattr(b"x")}},
        {"xattrs": {"user.\0": xattr(b"x")}},
        {"xattrs": {"user.x": xattr(bytes(LIMITS.xattr_bytes + 1))}},
        {"xattrs": {"u" * 256: xattr(b"x")}},
        {"type": "symlink"},
        {"type": "symlink", "linkName": ""},
        {"type": "symlink", "linkName": "a\0"},
        {"type": "symlink", "linkName": "a" * 4096},
        {"type": "hardlink"},
        {"type": "char", "devMajor": -1},
        {"type": "char", "devMajor": 1 << 12},
        {"type": "block", "devMinor": 1 << 20},
    ],
    ids=str,
)
def test_an_entry_with_an_impossible_field(fields: dict[str, Any]) -> None:
    refused(table([entry(**fields)]))


@pytest.mark.row("M7")
@pytest.mark.parametrize(
    "fields",
    [
        {"endOffset": 0, "offset": END_OF_FRAME + 8},
        {"endOffset": END_OF_FRAME + 1000},
        {"endOffset": -1},
        {"endOffset": 5, "offset": 5},
        {"endOffset": 5, "offset": 6},
    ],
    ids=str,
)
def test_a_file_that_lies_where_no_payload_is(fields: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        ScannedLayer.of(zstd_chunked(table([entry(**fields)])))


def chunks(*pieces: tuple[int, int, int], size: int = 300, end: int = END_OF_FRAME, **more: Any) -> bytes:
    """A table with one file of chunks (offset in the blob, offset in the file, size)."""
    digest = sha256(PAYLOAD)
    rows = [
        {"type": "chunk", "name": "file", "offset": o, "chunkOffset": c, "chunkSize": s, "chunkDigest": digest, **more}
        for o, c, s in pieces
    ]
    rows[0] |= {"type": "reg", "size": size, "endOffset": end, "digest": digest}
    return table(rows)


@pytest.mark.row("M7")
@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 0, 100), (10, 200, 100)],
        [(0, 0, 100), (10, 50, 250)],
        [(0, 0, 100), (10, 100, 100)],
        [(0, 0, 100), (10, 100, 300)],
        [(0, 0, 300), (10, 300, 0)],
        [(0, 0, 300), (10, 300, 1)],
        [(0, 100, 200), (10, 0, 100)],
        [(0, 0, 100), (10, 100, -200)],
    ],
    ids=str,
)
def test_chunks_with_holes_overlaps_or_another_sum(pieces: list[tuple[int, int, int]]) -> None:
    refused(chunks(*pieces), "chunk")


@pytest.mark.row("M7")
@pytest.mark.parametrize(
    "pieces", [[(10, 0, 100), (5, 100, 200)], [(10, 0, 100), (10, 100, 200)], [(0, 0, 1), (10_000, 1, 299)]], ids=str
)
def test_chunks_that_lie_out_of_order_or_outside(pieces: list[tuple[int, int, int]]) -> None:
    with pytest.raises(FormatError):
        ScannedLayer.of(zstd_chunked(chunks(*pieces)))


@pytest.mark.row("M7")
def test_chunks_that_are_nobodys() -> None:
    chunk = {"type": "chunk", "name": "file", "offset": 0, "chunkSize": 1, "chunkDigest": sha256(b"")}
    for before in ([], [entry(name="other", chunkSize=1)], [{"type": "dir", "name": "file"}], [entry(size=0)]):
        refused(table([*before, chunk]), "chunk")


@pytest.mark.row("M7")
def test_a_chunk_at_the_limit_and_one_past_it() -> None:
    toc = table([entry()])
    for limit, good in ((len(PAYLOAD), True), (len(PAYLOAD) - 1, False)):
        settings = with_limits(chunk_bytes=limit)
        for blob, layer_format in (
            (zstd_chunked(toc), ZstdChunkedFormat()),
            (estargz(toc), EStargzFormat()),
        ):
            if good:
                assert ScannedLayer.of(blob, layer_format, settings).entries
                continue
            with pytest.raises(LimitExceeded, match="chunk"):
                ScannedLayer.of(blob, layer_format, settings)


@pytest.mark.row("M7")
def test_entries_at_the_limit_and_one_past_it() -> None:
    settings = with_limits(toc_entries=3)
    rows = [{"type": "dir", "name": str(i)} for i in range(4)]
    assert len(ScannedLayer.of(zstd_chunked(table(rows[:3])), ZstdChunkedFormat(), settings).entries) == 3
    with pytest.raises(LimitExceeded):
        ScannedLayer.of(zstd_chunked(table(rows)), ZstdChunkedFormat(), settings)


@pytest.mark.row("M7")
@pytest.mark.parametrize("limit", ["toc_bytes", "toc_compressed_bytes"])
def test_a_table_at_the_limit_and_one_past_it(limit: str) -> None:
    toc = table([{"type": "dir", "name": "x" * 100, "noise": random.Random(1).randbytes(5000).hex()}])
    size = len(toc) if limit == "toc_bytes" else len(zstandard.ZstdCompressor().compress(toc))
    assert ScannedLayer.of(zstd_chunked(toc), ZstdChunkedFormat(), with_limits(**{limit: size})).entries
    with pytest.raises(LimitExceeded):
        ScannedLayer.of(zstd_chunked(toc), ZstdChunkedFormat(), with_limits(**{limit: size - 1}))
    member_size = len(gzip.compress(member(b"stargz.index.json", toc) + END))
    size = len(member(b"stargz.index.json", toc) + END) if limit == "toc_bytes" else member_size
    assert ScannedLayer.of(estargz(toc), EStargzFormat(), with_limits(**{limit: size})).entries
    with pytest.raises(LimitExceeded):
        ScannedLayer.of(estargz(toc), EStargzFormat(), with_limits(**{limit: size - 1}))


@pytest.mark.row("M7")
def test_a_hundred_megabytes_of_entries_are_read_without_holding_them() -> None:
    row = b'{"type":"dir","name":"d","comment":"' + b"x" * 900 + b'"},'
    toc = b'{"version":1,"entries":[' + row * 60_000 + b'{"type":"dir","name":"d"}]}'
    blob = zstd_chunked(toc)
    started = time.monotonic()
    with peak_memory() as peak:
        assert len(ScannedLayer.of(blob).entries) == 60_001
    assert time.monotonic() - started < 5
    assert peak.grown < 3 * len(toc)


@pytest.mark.row("M5")
def test_duplicates_are_kept_in_order() -> None:
    rows = [entry(), {"type": "dir", "name": "file/"}, {"type": "symlink", "name": "./file", "linkName": "x"}]
    assert [found.path for found in ScannedLayer.of(zstd_chunked(table(rows))).entries] == [b"file"] * 3
