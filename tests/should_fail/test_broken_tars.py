"""Tar archives whose blocks and records are damaged, or odd and still legal."""

import gzip
import os
import stat

import pytest
import zstandard

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.layers.grid import Grid
from ckptfs.layers.tar import TarFormat
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.settings import GiB, KiB, Limits, Settings
from tests.support.blobs import TAR, ScannedLayer, blob_of
from tests.support.tars import END, entries, header, member, pax, record, refused, with_checksum

LIMITS = Limits()


def with_limits(**limits: int) -> Settings:
    return Settings()._replace(limits=LIMITS._replace(**limits))


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
    assert len(ScannedLayer.of(blob, TarFormat(), settings).entries) == 1
    with pytest.raises(LimitExceeded):
        ScannedLayer.of(blob_of(member(b"pax", fill + b"0", flag=b"x") + END), TarFormat(), settings)


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
    assert len(ScannedLayer.of(blob_of(member(b"x") * 3 + END), TarFormat(), settings).entries) == 3
    with pytest.raises(LimitExceeded):
        ScannedLayer.of(blob_of(member(b"x") * 4 + END), TarFormat(), settings)


@pytest.mark.parametrize("device", [(-1, 0), (0, -1), (1 << 12, 0), (0, 1 << 20), (1 << 31, 0), (b"x" * 8, 0)])
def test_a_device_with_impossible_numbers(device: tuple[int | bytes, int | bytes]) -> None:
    refused(header(b"x", flag=b"3", device=device) + END)
    assert len(entries(header(b"x", flag=b"0", device=device) + END)) == 1, "other types may carry anything there"


def test_the_largest_device() -> None:
    (entry,) = entries(header(b"x", flag=b"4", device=((1 << 12) - 1, (1 << 20) - 1)) + END)
    assert entry.inode is not None and entry.inode.rdev == 0xFFFFFFFF


@pytest.mark.parametrize("size", [-1, -512, -1024])
def test_a_volume_label_of_less_than_nothing(size: int) -> None:
    refused(header(b"label", size, flag=b"V") + END, "size")


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


@pytest.mark.parametrize(
    ("magic", "path"),
    [
        (b"ustar\x0000", b"prefix/n"),
        (b"ustar\0\0\0", b"prefix/n"),
        (b"ustar\0  ", b"prefix/n"),
        (b"ustar  \0", b"n"),
        (b"ustar 00", b"n"),
        (bytes(8), b"n"),
    ],
)
def test_a_prefix_counts_in_ustar_of_any_version(magic: bytes, path: bytes) -> None:
    """As in GNU tar 1.34 and Go's archive/tar, which podman and containerd unpack with."""
    assert [entry.path for entry in entries(header(b"n", magic=magic, prefix=b"prefix") + END)] == [path]


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
