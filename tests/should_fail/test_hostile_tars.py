"""Tar layers that nobody should make, one test for each sin: refused, or harmless."""

import gzip
import os
import stat
import time
from dataclasses import replace

import pytest
import zstandard

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.layers.grid import Grid
from ckptfs.layers.gzip import GzipFormat
from ckptfs.layers.tar import TarFormat
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.layers.zstd import ZstdFormat
from ckptfs.model.toc import Entry
from ckptfs.settings import GiB, KiB, Limits, MiB, Settings
from tests.support.blobs import TAR, ScannedLayer, blob_of
from tests.support.memory import peak_memory
from tests.support.tars import END, gnu_long, gnu_sparse, header, member, padded, pax, record, with_checksum
from tests.support.tocs import gzip_bomb

LIMITS = Limits()


def entries(data: bytes) -> list[Entry]:
    return ScannedLayer.of(blob_of(data)).entries


def with_limits(**limits: int) -> Settings:
    return replace(Settings(), limits=replace(LIMITS, **limits))


def refused(data: bytes, match: str = ".") -> None:
    """Refused as plain tar and in the stream, whose end the scanner does not know."""
    with pytest.raises(FormatError, match=match):
        entries(data)
    with pytest.raises(FormatError, match=match):
        ScannedLayer.of(blob_of(gzip.compress(data), TAR + "+gzip"))


# M1: paths


@pytest.mark.row("M1")
@pytest.mark.parametrize(
    "name", [b"../x", b"..", b"a/../../b", b"a/..", b"/../etc/passwd", b"./../x", b"a/./../b", b"../" * 30 + b"x"]
)
def test_a_name_that_leaves_the_image(name: bytes) -> None:
    refused(member(name) + END, "leaves the image")
    refused(pax([(b"path", name)]) + member(b"x") + END, "leaves the image")
    refused(gnu_long(name) + member(b"x", magic=b"ustar  \0") + END, "leaves the image")
    refused(header(b"x", flag=b"1", link=name) + END, "leaves the image")


@pytest.mark.row("M1")
@pytest.mark.parametrize(
    ("name", "path"),
    [(b"/etc/passwd", b"etc/passwd"), (b"./a", b"a"), (b"a//b/./c", b"a/b/c"), (b"//a", b"a"), (b"a/.", b"a")],
)
def test_a_name_that_is_normalised(name: bytes, path: bytes) -> None:
    assert [entry.path for entry in entries(member(name) + END)] == [path]
    assert [entry.path for entry in entries(pax([(b"path", name)]) + member(b"x") + END)] == [path]


@pytest.mark.row("M1")
def test_a_root_that_is_not_a_directory() -> None:
    refused(member(b"./", b"", flag=b"2", link=b"x") + END, "root")
    refused(member(b"", b"data") + END, "root")
    assert [entry.path for entry in entries(header(b"./", flag=b"5") + END)] == [b""]


@pytest.mark.row("M1")
def test_a_name_with_a_nul() -> None:
    refused(pax([(b"path", b"a\0b")]) + member(b"x") + END, "NUL")
    refused(pax([(b"linkpath", b"a\0b")]) + header(b"x", flag=b"2", link=b"y") + END, "NUL")


@pytest.mark.row("M1")
def test_a_name_at_each_limit_and_one_past_it() -> None:
    def named(path: bytes) -> bytes:
        return pax([(b"path", path)]) + member(b"x") + END

    for good, bad in (
        (b"n" * LIMITS.name_bytes, b"n" * (LIMITS.name_bytes + 1)),
        (b"d/" * (LIMITS.path_depth - 1) + b"x", b"d/" * LIMITS.path_depth + b"x"),
        ((b"n" * 127 + b"/") * 32, (b"n" * 127 + b"/") * 32 + b"x"),
    ):
        assert entries(named(good))[0].path == good.strip(b"/")
        with pytest.raises(LimitExceeded):
            entries(named(bad))
    link = header(b"x", flag=b"2", link=b"y")
    assert entries(pax([(b"linkpath", b"t" * 4095)]) + link + END)[0].inode.size == 4095  # type: ignore[union-attr]
    with pytest.raises(LimitExceeded):
        entries(pax([(b"linkpath", b"t" * 4096)]) + link + END)


# M2: symbolic links


@pytest.mark.row("M2")
@pytest.mark.parametrize("target", [b"/etc/shadow", b"../../../etc/shadow", b"x", b"/proc/self/root"])
def test_a_symbolic_link_is_data(target: bytes) -> None:
    (entry,) = entries(header(b"x", flag=b"2", link=target) + END)
    assert entry.inode is not None
    assert (entry.inode.target, entry.inode.size, len(entry.inode.extents)) == (target, len(target), 0)


def test_a_symbolic_link_without_a_target() -> None:
    refused(header(b"x", flag=b"2") + END, "target")


# M3: sizes


@pytest.mark.row("M3")
@pytest.mark.parametrize("size", [-1, -(1 << 62), (1 << 63) - 1, 1 << 40, 1 << 86, b"-0000000001\0"])
def test_a_size_that_the_archive_does_not_have(size: int | bytes) -> None:
    started = time.monotonic()
    with peak_memory() as peak:
        refused(header(b"x", size) + END)
        refused(header(b"x", size, flag=b"L") + END)
    assert peak.grown < 64 * MiB
    assert time.monotonic() - started < 1


@pytest.mark.row("M3")
@pytest.mark.parametrize("size", [b"-1", b"1e9", b"", b"9" * 20, b"0x10", b"1_000"])
def test_a_size_in_a_pax_header_that_is_no_number(size: bytes) -> None:
    data = pax([(b"size", size), (b"comment", b"x")]) + member(b"x") + END
    if size:
        refused(data)
    else:
        assert entries(data)[0].path == b"x"  # an empty value takes the keyword back


@pytest.mark.row("M3")
def test_a_size_at_the_limit_and_one_past_it() -> None:
    settings = with_limits(file_bytes=1000)
    blob = blob_of(member(b"x", bytes(1000)) + END)
    assert len(ScannedLayer.of(blob, TarFormat(settings)).entries) == 1
    with pytest.raises(FormatError, match="size"):
        ScannedLayer.of(blob_of(member(b"x", bytes(1001)) + END), TarFormat(settings))


@pytest.mark.row("M3")
def test_a_stream_that_claims_exabytes_costs_nothing() -> None:
    data = gzip.compress(header(b"huge", 1 << 61) + bytes(1000))
    blob = blob_of(data, TAR + "+gzip")
    found: list[Entry] = []
    with peak_memory() as peak, pytest.raises(FormatError, match="cut off"):
        found.extend(GzipFormat().open(blob, 0).scan(lambda chunk, piece: None))
    assert peak.grown < 16 * MiB


@pytest.mark.row("M3")
def test_a_sparse_map_of_a_million_pieces() -> None:
    pieces = [(2 * i, 1) for i in range(1_000_000)]
    old = gnu_sparse(b"x", 2_000_000, pieces, b"")
    lines = b"\n".join(b"%d\n1" % (2 * i) for i in range(1_000_000))
    one = pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"2000000")])
    one += member(b"x", b"1000000\n" + lines)
    in_header = pax([(b"GNU.sparse.map", b"0,1," * 500_000)])[: 4 * MiB]
    for data in (old, one, in_header):
        scanner = TarScanner(Grid("x", 0, 256 * KiB), LIMITS)
        started = time.monotonic()
        with peak_memory() as peak, pytest.raises(LimitExceeded):
            for low in range(0, len(data), 256 * KiB):
                scanner.feed(memoryview(data)[low : low + 256 * KiB])
        assert time.monotonic() - started < 0.3
        assert peak.grown < 64 * MiB


@pytest.mark.row("M3")
@pytest.mark.parametrize(
    ("size", "pieces"),
    [
        (100, [(0, 10), (5, 10)]),
        (100, [(50, 10), (0, 10)]),
        (100, [(90, 20)]),
        (100, [(-5, 20)]),
        (100, [(0, 15)]),
        (100, [(0, 30)]),
        (100, [(0, -5), (5, 25)]),
        (-1, [(0, 20)]),
        (1 << 63, [(0, 20)]),
        (100, [((1 << 63) - 1, 20)]),
    ],
)
def test_a_sparse_map_that_lies(size: int, pieces: list[tuple[int, int]]) -> None:
    payload = b"x" * 20
    refused(gnu_sparse(b"x", size, pieces, payload) + END)
    numbers = b",".join(b"%d" % number for piece in pieces for number in piece)
    head = [(b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.map", numbers)]
    refused(pax(head) + member(b"x", payload) + END)
    lines = b"%d\n%s\n" % (len(pieces), numbers.replace(b",", b"\n"))
    head = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"%d" % size)]
    refused(pax(head) + member(b"x", padded(lines) + payload) + END)


@pytest.mark.row("M3")
@pytest.mark.parametrize(
    "records",
    [
        [(b"GNU.sparse.map", b"1,2,3"), (b"GNU.sparse.size", b"9")],
        [(b"GNU.sparse.map", b"1,x"), (b"GNU.sparse.size", b"9")],
        [(b"GNU.sparse.map", b"0,1")],
        [(b"GNU.sparse.numbytes", b"1"), (b"GNU.sparse.offset", b"1"), (b"GNU.sparse.size", b"9")],
        [(b"GNU.sparse.offset", b"1"), (b"GNU.sparse.size", b"9")],
        [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9")],
    ],
)
def test_a_sparse_map_that_is_no_map(records: list[tuple[bytes, bytes]]) -> None:
    refused(pax(records) + member(b"x", b"\n" * 512) + END)


def test_a_sparse_file_of_holes_only() -> None:
    (entry,) = entries(gnu_sparse(b"x", 1 << 61, [], b"") + END)
    assert entry.inode is not None and entry.inode.size == 1 << 61 and len(entry.inode.extents) == 0


# M4: bombs


@pytest.mark.row("M4")
@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_is_streamed_chunk_by_chunk(kind: str) -> None:
    size = 128 * MiB
    tar = member(b"x")[:512] + header(b"bomb", size - 1024)
    if kind == "gzip":
        blob = blob_of(gzip.compress(tar) + gzip_bomb(size - 1024), TAR + "+gzip")
    else:
        blob = blob_of(zstandard.ZstdCompressor().compress(tar + bytes(size - 1024)), TAR + "+zstd")
    assert blob.size < size / 500
    total = 0
    with peak_memory() as peak:
        layer = (GzipFormat() if kind == "gzip" else ZstdFormat()).open(blob, 0)

        def count(chunk: object, data: bytes) -> None:
            nonlocal total
            total += len(data)

        assert len(list(layer.scan(count))) == 2
    assert total == size
    assert peak.grown < 24 * MiB


@pytest.mark.row("M4")
def test_a_zstd_window_at_the_limit_and_one_past_it() -> None:
    data = member(b"x", os.urandom(300_000)) + END

    def packed(window_log: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return compressor.compress(data) + compressor.flush()

    settings = with_limits(zstd_window_bytes=1 << 20)
    assert len(ScannedLayer.of(blob_of(packed(20), TAR + "+zstd"), ZstdFormat(settings)).entries) == 1
    with pytest.raises(LimitExceeded, match="window"):
        ScannedLayer.of(blob_of(packed(21), TAR + "+zstd"), ZstdFormat(settings))


# M5: the same path twice


@pytest.mark.row("M5")
def test_duplicates_are_kept_in_order() -> None:
    scanned = ScannedLayer.of(
        blob_of(member(b"x", b"1") + header(b"x", flag=b"5") + member(b"./x", b"2") + member(b"x/", flag=b"0") + END)
    )
    kinds = [entry.inode.is_dir for entry in scanned.entries if entry.inode]
    assert [entry.path for entry in scanned.entries] == [b"x"] * 4
    assert kinds == [False, True, False, True]


# M6: hard links


@pytest.mark.row("M6")
def test_hard_links_are_kept_as_links_whatever_they_point_to() -> None:
    links = [(b"a", b"b"), (b"b", b"a"), (b"self", b"self"), (b"dangling", b"nowhere"), (b"abs", b"/etc/shadow")]
    found = entries(b"".join(header(name, flag=b"1", link=target) for name, target in links) + END)
    assert [(entry.path, entry.link) for entry in found[:4]] == links[:4]
    assert found[4].link == b"etc/shadow"
    assert all(entry.inode is None for entry in found)


# Blocks


def test_a_wrong_checksum() -> None:
    block = bytearray(member(b"x"))
    block[0] ^= 1
    refused(bytes(block) + END, "checksum")
    refused(member(b"a", b"data") + bytes(block) + END, "checksum")


def test_a_checksum_of_signed_bytes() -> None:
    block = bytearray(header(b"\xff\xfe\xfd", magic=b"\0" * 8))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(b - 256 if b > 127 else b for b in block)
    assert entries(bytes(block) + END)[0].path == b"\xff\xfe\xfd"


def test_a_layer_that_is_not_a_tar() -> None:
    refused(os.urandom(4096))
    refused(b"<html>404</html>" * 100)
    for kind, data in (("gzip", gzip.compress(END)), ("zstd", zstandard.compress(END))):
        with pytest.raises(FormatError, match=kind):
            entries(data)
    for data in (b"BZh91AY&SY" + bytes(600), b"\xfd7zXZ\0" + bytes(600)):
        for media_type in (TAR, TAR + "+gzip", TAR + "+zstd"):
            with pytest.raises(FormatError, match="compressed with"):
                ScannedLayer.of(blob_of(data, media_type))


@pytest.mark.parametrize("cut", [1, 511, 513, 1024 + 100, 2 * 1024 + 512 + 3])
def test_an_archive_that_is_cut_off(cut: int) -> None:
    data = pax([(b"path", b"x")]) + member(b"x", b"d" * 1000) + END
    refused(data[:cut], "cut off|beyond")


def test_an_archive_may_end_without_zero_blocks_but_not_inside_an_entry() -> None:
    assert len(entries(member(b"x", b"data"))) == 1
    assert entries(b"") == []
    refused(pax([(b"path", b"x")]), "cut off")


@pytest.mark.parametrize(
    "data",
    [
        b"12 path=x",
        b"path=x\n",
        b"999999 path=x\n",
        b"3 =\n",
        b"0 a=b\n",
        b"-5 a=b\n",
        b"7 a=bcd\n",
        b"99999999999999 a=b\n",
        b"5 a=b\n",
        b"\0\0\0",
    ],
)
def test_a_pax_record_that_is_no_record(data: bytes) -> None:
    refused(member(b"pax", data, flag=b"x") + member(b"x") + END, "PAX")


@pytest.mark.parametrize(
    "records",
    [
        [(b"mtime", b"nan")],
        [(b"mtime", b"1" * 19)],
        [(b"mtime", b"-" + b"9" * 15)],
        [(b"mtime", b"1e9")],
        [(b"uid", b"-1")],
        [(b"uid", b"4294967296")],
        [(b"gid", b"9" * 18)],
        [(b"LIBARCHIVE.xattr.user.x", b"!!!")],
        [(b"SCHILY.xattr.", b"x")],
        [(b"SCHILY.xattr.user.\0", b"x")],
    ],
)
def test_a_pax_value_that_no_file_can_have(records: list[tuple[bytes, bytes]]) -> None:
    refused(pax(records) + member(b"x") + END)


def test_a_global_header_may_not_name_or_size_what_follows() -> None:
    for records in ([(b"path", b"x")], [(b"linkpath", b"x")], [(b"size", b"1")], [(b"GNU.sparse.major", b"1")]):
        refused(pax(records, flag=b"g") + member(b"x") + END, "global")
    (entry,) = entries(pax([(b"uid", b"7"), (b"comment", b"c")], flag=b"g") + member(b"x") + END)
    assert entry.inode is not None and entry.inode.uid == 7


def test_extension_headers_at_the_limit_and_one_past_it() -> None:
    settings = with_limits(pax_header_bytes=2048)
    fill = record(b"comment", b"x" * (2048 - len(record(b"comment", b"")) - 2))
    assert len(fill) == 2048
    blob = blob_of(member(b"pax", fill, flag=b"x") + member(b"x") + END)
    assert len(ScannedLayer.of(blob, TarFormat(settings)).entries) == 1
    with pytest.raises(LimitExceeded):
        ScannedLayer.of(blob_of(member(b"pax", fill + b"0", flag=b"x") + END), TarFormat(settings))


def test_xattrs_at_the_limit_and_one_past_it() -> None:
    def with_xattr(size: int, name: bytes = b"user.x") -> bytes:
        return pax([(b"SCHILY.xattr." + name, b"v" * size)]) + member(b"x") + END

    (entry,) = entries(with_xattr(LIMITS.xattr_bytes))
    assert entry.inode is not None and len(entry.inode.xattrs[b"user.x"]) == LIMITS.xattr_bytes
    with pytest.raises(LimitExceeded):
        entries(with_xattr(LIMITS.xattr_bytes + 1))
    with pytest.raises(LimitExceeded):
        entries(with_xattr(1, b"user." + b"x" * 251))


def test_entries_at_the_limit_and_one_past_it() -> None:
    settings = with_limits(toc_entries=3)
    assert len(ScannedLayer.of(blob_of(member(b"x") * 3 + END), TarFormat(settings)).entries) == 3
    with pytest.raises(LimitExceeded):
        ScannedLayer.of(blob_of(member(b"x") * 4 + END), TarFormat(settings))


@pytest.mark.parametrize("device", [(-1, 0), (0, -1), (1 << 32, 0), (b"x" * 8, 0)])
def test_a_device_with_impossible_numbers(device: tuple[int | bytes, int | bytes]) -> None:
    refused(header(b"x", flag=b"3", device=device) + END)
    assert len(entries(header(b"x", flag=b"0", device=device) + END)) == 1, "other types may carry anything there"


@pytest.mark.parametrize("flag", [b"M", b"N"])
def test_a_volume_of_several(flag: bytes) -> None:
    refused(header(b"x", flag=flag) + END, "volume")


def test_odd_but_legal_archives() -> None:
    label = header(b"label", flag=b"V")
    old = with_checksum(header(b"dir/", flag=b"\0", magic=b"\0" * 8, mode=0o755))
    dump = member(b"dump", b"Yfile\0", flag=b"D")
    contiguous, unknown = member(b"contiguous", b"1", flag=b"7"), member(b"unknown", b"2", flag=b"Q")
    spaced = with_checksum(header(b"spaced", b"      0 \0   ", mtime=b"  17 \0      "))
    blank = with_checksum(header(b"blank", b" " * 12, uid=b"\0" * 8, mtime=b"\0" * 12))
    star = with_checksum(header(b"name", prefix=b"star")[:508] + b"tar\0")
    prefixed = header(b"name", prefix=b"p" * 155)
    scanned = ScannedLayer.of(
        blob_of(label + old + dump + contiguous + unknown + spaced + blank + star + prefixed + END + b"behind the end")
    )
    kinds = {entry.path: stat.S_IFMT(entry.inode.mode) for entry in scanned.entries if entry.inode}
    assert list(kinds) == [
        b"dir",
        b"dump",
        b"contiguous",
        b"unknown",
        b"spaced",
        b"blank",
        b"star/name",
        b"p" * 155 + b"/name",
    ]
    assert kinds[b"dir"] == kinds[b"dump"] == stat.S_IFDIR
    assert [scanned.read(e.inode) for e in scanned.entries[2:4] if e.inode] == [b"1", b"2"]
    assert scanned.entries[4].inode is not None and scanned.entries[4].inode.mtime_ns == 0o17 * 1_000_000_000


def test_more_than_4_gib_in_octal_base_256_and_pax() -> None:
    """Sizes only: the payload is skipped, not made."""
    for data in (
        header(b"x", 5 * GiB),
        header(b"x", b"\x80" + (5 * GiB).to_bytes(11, "big")),
        pax([(b"size", b"%d" % (5 * GiB))]) + header(b"x"),
    ):
        scanner = TarScanner(Grid("x", 0, 256 * KiB), LIMITS, end=6 * GiB)
        (entry,) = scanner.feed(data)
        assert entry.inode is not None and entry.inode.size == 5 * GiB
        assert sum(extent.length for extent in entry.inode.extents) == 5 * GiB
        assert scanner.wanted == len(data) + 5 * GiB
        scanner.skip_to(scanner.wanted)
        (last,) = scanner.feed(header(b"last"))
        assert last.path == b"last"
