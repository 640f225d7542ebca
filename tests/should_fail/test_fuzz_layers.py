"""Whatever the bytes are: a scan ends with entries that are sound, or with one of three errors."""

import gzip
from typing import Any

import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptfs.errors import FormatError, IntegrityError
from ckptfs.layers import select_format
from ckptfs.layers.grid import Grid
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.model.toc import Entry
from ckptfs.model.toc_document import decode_toc, encode_toc
from ckptfs.settings import KiB, Limits, Settings
from tests.support.blobs import TAR, BytesBlob, ScannedLayer, blob_of
from tests.support.tars import END, gnu_long, gnu_sparse, header, member, padded, pax
from tests.support.tocs import PAYLOAD, entry, estargz, sha256, table, zstd_chunked

LIMITS = Limits()
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

GOOD = (
    header(b"dir/", flag=b"5")
    + member(b"dir/file", b"x" * 700)
    + pax([(b"path", b"long/" * 30 + b"name"), (b"mtime", b"-1.5"), (b"SCHILY.xattr.user.x", b"\0\n=")])
    + member(b"short", b"y" * 20)
    + gnu_long(b"n" * 150)
    + member(b"short", b"z", magic=b"ustar  \0")
    + gnu_sparse(b"sparse", 10_000, [(i * 100, 10) for i in range(30)], b"s" * 300)
    + pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"50")])
    + member(b"sparse-1", padded(b"2\n0\n5\n40\n5\n") + b"0123456789")
    + header(b"link", flag=b"2", link=b"target")
    + header(b"hard", flag=b"1", link=b"dir/file")
    + header(b"null", flag=b"3", device=(1, 3))
    + END
)


def sound(entries: list[Entry]) -> None:
    """What every later floor relies on."""
    for found in entries:
        for path in (found.path, found.link or b""):
            parts = path.split(b"/")
            assert path == b"" or not {b"", b".", b".."} & set(parts)
            assert b"\0" not in path and len(path) <= LIMITS.path_bytes and len(parts) <= LIMITS.path_depth
        assert (found.inode is None) == (found.link is not None)
        if found.inode is None:
            continue
        assert 0 <= found.inode.size <= LIMITS.file_bytes
        end = 0
        for extent in found.inode.extents[:1000]:
            assert extent.length > 0 and extent.start >= end
            end = extent.start + extent.length
            assert end <= found.inode.size
            assert extent.skip >= 0 and extent.skip + extent.length <= extent.chunk.length
            assert extent.chunk.offset >= 0 and extent.chunk.size > 0


def scan(blob: BytesBlob) -> None:
    entries: list[Entry] = []
    try:
        layer = select_format(blob.descriptor).open(blob, 0, Settings())
        entries.extend(layer.scan(lambda chunk, data: None))
    except (FormatError, IntegrityError):
        pass
    sound(entries)


def mutated(good: bytes) -> st.SearchStrategy[bytes]:
    """`good` with a few bytes changed, cut out or put in."""
    position = st.integers(0, len(good))
    change = st.tuples(position, st.integers(0, 40), st.binary(max_size=40))

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        data = good
        for at, length, new in changes:
            data = data[:at] + new + data[at + length :]
        return data

    return st.lists(change, max_size=4).map(apply)


@FEW
@given(st.data())
def test_mutated_tars(data: st.DataObject) -> None:
    tar = bytearray(data.draw(mutated(GOOD)))
    if data.draw(st.booleans()):  # mend the checksums, so that what lies behind them is reached
        for at in range(0, len(tar) - 512, 512):
            if tar[at + 257 : at + 262] == b"ustar":
                tar[at + 148 : at + 156] = b" " * 8
                tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])
    scan(blob_of(bytes(tar)))
    scan(blob_of(gzip.compress(bytes(tar), 1), TAR + "+gzip"))


@FEW
@given(st.lists(st.tuples(st.sampled_from([b"path", b"size", b"mtime", b"uid", b"linkpath", b"GNU.sparse.map",
       b"GNU.sparse.offset", b"GNU.sparse.numbytes", b"GNU.sparse.major", b"GNU.sparse.realsize", b"GNU.sparse.size",
       b"SCHILY.xattr.user.x", b"LIBARCHIVE.xattr.user.y"]), st.binary(max_size=12) | st.integers(-5, 2000).map(
       lambda n: str(n).encode())), max_size=5), st.sampled_from(b"01234567xgLKSVD"))  # fmt: skip
def test_any_pax_header(records: list[tuple[bytes, bytes]], flag: int) -> None:
    scan(blob_of(pax(records) + header(b"name", 100, bytes((flag,)), link=b"link") + padded(b"5\n" * 50) + END))


@FEW
@given(st.lists(st.integers(1, 3000), max_size=8))
def test_a_scanner_does_not_care_how_it_is_fed(cuts: list[int]) -> None:
    def described(entries: list[Entry]) -> list[tuple[object, ...]]:
        return [
            (e.path, e.link, e.inode and (e.inode.mode, e.inode.size, [(x.start, x.length) for x in e.inode.extents]))
            for e in entries
        ]

    whole = TarScanner(Grid("x", 0, 256 * KiB), LIMITS).feed(GOOD)
    scanner = TarScanner(Grid("x", 0, 256 * KiB), LIMITS)
    pieces, at = [], 0
    for length in [*cuts, len(GOOD)]:
        pieces += scanner.feed(GOOD[at : at + length])
        at += length
    scanner.close()
    assert scanner.finished and described(pieces) == described(whole) and len(whole) == 9


@FEW
@given(mutated(gzip.compress(GOOD)))
def test_mutated_gzip(data: bytes) -> None:
    scan(blob_of(data, TAR + "+gzip"))


@FEW
@given(mutated(zstandard.compress(GOOD)))
def test_mutated_zstd(data: bytes) -> None:
    scan(blob_of(data, TAR + "+zstd"))


NUMBERS = st.integers(-1, 100) | st.integers(-(1 << 70), 1 << 70) | st.sampled_from([800, 1 << 62, 1 << 63])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)  # fmt: skip
TYPES = st.sampled_from(["reg", "dir", "symlink", "hardlink", "char", "block", "fifo", "chunk"])
SIZES = ("size", "mode", "uid", "offset", "endOffset", "innerOffset", "chunkSize", "chunkOffset", "devMajor")
ROWS = st.fixed_dictionaries(
    {"type": TYPES, "name": st.sampled_from(["a", "b/c", "../d", "./", "/e"])},
    optional=dict.fromkeys(SIZES, NUMBERS)
    | {
        "digest": st.just(sha256(PAYLOAD)) | st.text(max_size=10),
        "chunkDigest": st.just(sha256(PAYLOAD)),
        "chunkType": st.sampled_from(["", "zeros", "x"]),
        "linkName": st.text(max_size=5),
        "modtime": st.sampled_from(["2026-01-01T00:00:00Z", "x"]),
        "xattrs": JSON,
    },
)


@FEW
@given(st.lists(ROWS, max_size=5) | JSON)
def test_any_table(rows: Any) -> None:
    toc = table(rows)
    scan(zstd_chunked(toc))
    scan(estargz(toc))


@FEW
@given(mutated(table([entry(), entry(name="b"), {"type": "dir", "name": "c", "xattrs": {"user.x": "eA=="}}])))
def test_a_mutated_table(toc: bytes) -> None:
    scan(zstd_chunked(toc))
    scan(estargz(toc))


@FEW
@given(st.data())
def test_a_mutated_estargz_tail(data: st.DataObject) -> None:
    blob = estargz(table([entry(endOffset=None)]))
    changed = blob.data[:-200] + data.draw(mutated(blob.data[-200:]))
    scan(BytesBlob(changed, blob.descriptor._replace(size=len(changed))))


@FEW
@given(st.data())
def test_a_mutated_document_of_the_cache(data: st.DataObject) -> None:
    scanned = ScannedLayer.of(blob_of(GOOD))
    digest = str(scanned.blob.descriptor.digest)
    document = encode_toc(scanned.entries, layer_digest=digest, format="tar", verification="transport")
    inside = data.draw(mutated(zstandard.decompress(document)))
    for changed in (data.draw(mutated(document)), zstandard.compress(inside)):
        try:
            toc = decode_toc(changed, layer=0, layer_digest=digest)
        except FormatError:
            continue
        sound([found for found in toc.entries if found.path and b".." not in found.path])


def test_the_archive_that_is_mutated_is_good() -> None:
    entries = ScannedLayer.of(blob_of(GOOD)).entries
    assert len(entries) == 9
    sound(entries)
