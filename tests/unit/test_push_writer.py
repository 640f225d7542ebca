"""Layers as zstd:chunked: for who only decompresses, for who reads the table of contents, and for tar-split."""

import base64
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3

from ckptfs.errors import FormatError
from ckptfs.layers.zstd_chunked_writer import Member, WrittenLayer, write_layer
from ckptfs.model.toc import Inode
from ckptfs.push.directory import read_directory
from tests.support.blobs import BytesBlob, ScannedLayer
from tests.support.golden import directory_listing, listing, whole_seconds
from tests.support.push import odd_tree, unpacked
from tests.support.tars import entries
from tests.support.tools import require, run

PREFIX = "io.github.containers.zstd-chunked."


def written(folder: Path, threads: int = 2) -> tuple[WrittenLayer, bytes]:
    out = io.BytesIO()
    members = [Member(file.path, file.inode, file.link, file.open) for file in read_directory(folder).files]
    return write_layer(members, out.write, threads=threads), out.getvalue()


def one_file(
    data: bytes, cuts: list[tuple[int, ...]] | None = None, size: int | None = None
) -> tuple[WrittenLayer, bytes]:
    out = io.BytesIO()
    inode = Inode(0o100644, size=len(data) if size is None else size)
    member = Member(b"file", inode, payload=lambda: io.BytesIO(data), cuts=(lambda: cuts) if cuts else None)
    return write_layer([member], out.write), out.getvalue()


def document(layer: WrittenLayer, blob: bytes, name: str) -> bytes:
    """A part of the blob that an annotation names, decompressed."""
    offset, length, decoded = map(int, layer.descriptor.annotations[PREFIX + name].split(":")[:3])
    assert blob[offset - 8 : offset - 4] == b"\x50\x2a\x4d\x18"
    assert struct.unpack_from("<I", blob, offset - 4) == (length,)
    data = zstandard.ZstdDecompressor().decompressobj().decompress(blob[offset : offset + length])
    assert len(data) == decoded
    return data


def crc64_iso(data: bytes) -> int:
    """Go's hash/crc64 with the ISO polynomial, bit by bit."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xD800000000000000 if crc & 1 else 0)
    return crc ^ (1 << 64) - 1


def test_gnu_tar_extracts_the_same_tree(tmp_path: Path) -> None:
    require("tar", "zstd")
    folder = odd_tree(tmp_path)
    layer, blob = written(folder)
    (tmp_path / "layer.zst").write_bytes(blob)
    run("zstd", "-dq", tmp_path / "layer.zst", "-o", tmp_path / "layer.tar")
    (tmp_path / "out").mkdir()
    run("tar", "--xattrs", "--xattrs-include=*", "-xpf", tmp_path / "layer.tar", "-C", tmp_path / "out")
    assert directory_listing(tmp_path / "out") == directory_listing(folder)
    tar = (tmp_path / "layer.tar").read_bytes()
    assert hashlib.sha256(tar).hexdigest() == layer.diff_id.hex
    assert hashlib.sha256(blob).hexdigest() == layer.descriptor.digest.hex
    assert len(blob) == layer.descriptor.size


def test_our_reader_finds_the_same_tree(tmp_path: Path) -> None:
    folder = odd_tree(tmp_path)
    layer, blob = written(folder)
    scanned = ScannedLayer.of(BytesBlob(blob, layer.descriptor))
    assert scanned.layer.format == "zstd:chunked"
    assert whole_seconds(listing(scanned.entries, scanned.read)) == whole_seconds(directory_listing(folder))
    times = {os.fsdecode(e.path): e.inode.mtime_ns for e in scanned.entries if e.inode is not None}
    assert times == {name: os.lstat(folder / name).st_mtime_ns for name in times}
    for file in layer.files:
        if len(file.chunks) < 2:  # one chunk of zeros is not told as such
            continue
        (entry,) = (e for e in scanned.entries if e.path == file.path)
        assert entry.inode is not None
        ours = list(file.extents(0))
        told = [(e.start, e.length, e.chunk.offset, e.chunk.size) for e in entry.inode.extents]
        assert told == [(e.start, e.length, e.chunk.offset, e.chunk.size) for e in ours]
        data = (folder / os.fsdecode(file.path)).read_bytes()
        for listed, indexed in zip(entry.inode.extents, ours, strict=True):
            piece = data[listed.start : listed.start + listed.length]
            assert (listed.chunk.digest, indexed.chunk.digest) == (
                hashlib.sha256(piece).digest(),
                blake3(piece).digest(),
            )


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (253_402_300_800, "9999-12-31T23:59:59Z"),
        (1 << 40, "9999-12-31T23:59:59Z"),
        (-(1 << 40), "0001-01-01T00:00:00Z"),
    ],
)
def test_a_time_that_rfc_3339_has_no_year_for(seconds: int, told: str) -> None:
    """The table of contents has the nearest one, the tar the exact one."""
    out = io.BytesIO()
    layer = write_layer([Member(b"file", Inode(0o100644, mtime_ns=seconds * 10**9))], out.write)
    toc = json.loads(document(layer, out.getvalue(), "manifest-position"))
    assert toc["entries"][0]["modtime"] == told
    with tarfile.open(fileobj=io.BytesIO(unpacked(out.getvalue()))) as archive:
        assert archive.getmember("file").mtime == seconds
    (entry,) = entries(unpacked(out.getvalue()))
    assert entry.inode is not None and entry.inode.mtime_ns == seconds * 10**9


def test_tar_split_puts_the_tar_together_again(tmp_path: Path) -> None:
    """As tar/asm/assemble.go does; and each header has one segment, which begins with the padding before it."""
    folder = odd_tree(tmp_path)
    (folder / "big").write_bytes(os.urandom(5000))  # the checksum below takes its time
    (folder / "zeros").write_bytes(bytes(6000))
    layer, blob = written(folder)
    lines = [json.loads(line) for line in document(layer, blob, "tarsplit-position").splitlines()]
    assert [line["position"] for line in lines] == list(range(len(lines)))
    out = b""
    pending = 0
    for line in lines:
        if line["type"] == 2:
            segment = base64.b64decode(line["payload"])
            if line is not lines[-1]:
                with tarfile.open(fileobj=io.BytesIO(segment[pending:])) as archive:
                    assert archive.next() is not None
            out += segment
        elif line.get("size"):
            data = (folder / line["name"]).read_bytes()
            assert len(data) == line["size"]
            assert base64.b64decode(line["payload"]) == crc64_iso(data).to_bytes(8, "big")
            out += data
            pending = -len(data) % 512
            continue
        else:
            assert line["payload"] is None
        pending = 0
    assert hashlib.sha256(out).hexdigest() == layer.diff_id.hex
    table = json.loads(document(layer, blob, "manifest-position"))
    offset, length, _ = map(int, layer.descriptor.annotations[PREFIX + "tarsplit-position"].split(":"))
    assert table["tarSplitDigest"] == "sha256:" + hashlib.sha256(blob[offset : offset + length]).hexdigest()
    files = [line["name"] for line in lines if line["type"] == 1]
    assert [entry["name"] for entry in table["entries"] if entry["type"] != "chunk"] == files


def test_footer_says_what_the_annotations_say(tmp_path: Path) -> None:
    layer, blob = written(odd_tree(tmp_path))
    numbers = struct.unpack("<7Q", blob[-64:-8])
    assert blob[-8:] == b"GNUlInUx"
    notes = layer.descriptor.annotations
    assert ":".join(map(str, numbers[:4])) == notes[PREFIX + "manifest-position"]
    assert ":".join(map(str, numbers[4:])) == notes[PREFIX + "tarsplit-position"]
    packed = blob[numbers[0] : numbers[0] + numbers[1]]
    assert notes[PREFIX + "manifest-checksum"] == "sha256:" + hashlib.sha256(packed).hexdigest()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bytes_whatever_the_threads(tmp_path: Path, threads: int) -> None:
    folder = odd_tree(tmp_path)
    assert written(folder, threads)[1] == written(folder)[1]


def test_zero_chunks_are_holes_and_neighbours_are_one() -> None:
    data = b"x" * 4096 + bytes(5 * 4096) + b"y" * 4096 + bytes(4096)
    layer, blob = one_file(data, [(4096,)] * 8)
    table = json.loads(document(layer, blob, "manifest-position"))
    rows = [(e.get("chunkOffset", 0), e["chunkSize"], e.get("chunkType", "")) for e in table["entries"]]
    assert rows == [(0, 4096, ""), (4096, 20480, "zeros"), (24576, 4096, ""), (28672, 4096, "zeros")]
    assert table["entries"][1]["chunkDigest"] == "sha256:" + hashlib.sha256(bytes(20480)).hexdigest()
    assert [(e.start, e.length) for e in layer.files[0].extents(0)] == [(0, 4096), (24576, 4096)]
    assert unpacked(blob)[512 : 512 + len(data)] == data


def test_a_file_of_zeros_only_and_one_of_one_chunk_have_no_chunk_fields() -> None:
    for data in (bytes(9000), b"z" * 9000):
        layer, blob = one_file(data)
        (entry,) = json.loads(document(layer, blob, "manifest-position"))["entries"]
        assert entry["digest"] == "sha256:" + hashlib.sha256(data).hexdigest()
        assert not [key for key in entry if key.startswith("chunk")]
        scanned = ScannedLayer.of(BytesBlob(blob, layer.descriptor))
        assert scanned.entries[0].inode is not None
        assert scanned.read(scanned.entries[0].inode) == data


def test_cuts_that_do_not_reach_the_end_go_on_as_the_grid() -> None:
    layer, _ = one_file(os.urandom(600_000), [(1000,)])
    assert list(layer.files[0].chunks.lengths) == [1000, 262144, 262144, 74712]


def test_a_name_that_is_not_utf8_leaves_the_tar_split_out() -> None:
    """JSON cannot hold it: containers/storage would find that the two documents differ, and refuse the layer."""
    out = io.BytesIO()
    layer = write_layer([Member(b"\xff\xfe", Inode(0o100644))], out.write)
    assert PREFIX + "tarsplit-position" not in layer.descriptor.annotations
    assert b"tarSplitDigest" not in document(layer, out.getvalue(), "manifest-position")
    scanned = ScannedLayer.of(BytesBlob(out.getvalue(), layer.descriptor))
    assert [entry.path for entry in scanned.entries] == [b"\xff\xfe"]


def test_a_payload_that_is_too_short_is_an_error() -> None:
    with pytest.raises(FormatError, match="ends 10 bytes early"):
        one_file(b"x" * 90, size=100)


def test_a_path_may_come_once() -> None:
    with pytest.raises(FormatError, match="twice"):
        write_layer([Member(b"a", Inode(0o100644))] * 2, io.BytesIO().write)


@pytest.mark.parametrize(
    "inode", [Inode(0o140755), Inode(0o020600, rdev=os.makedev(1 << 21, 1))], ids=["socket", "device"]
)
def test_a_file_that_has_no_place(inode: Inode) -> None:
    with pytest.raises(FormatError, match="no place"):
        write_layer([Member(b"s", inode)], io.BytesIO().write)


def test_memory_does_not_grow_with_the_payload() -> None:
    """512 MiB through a process of its own: a few batches and columns, whatever the size."""
    code = """if True:
        import resource
        from ckptfs.layers.zstd_chunked_writer import Member, write_layer
        from ckptfs.model.toc import Inode
        class Pages:
            at = 0
            def readinto(self, buffer):
                for i in range(0, len(buffer), 4096):
                    buffer[i:i+8] = (self.at + i).to_bytes(8, "little")
                self.at += len(buffer)
                return len(buffer)
            def close(self): pass
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        size = 512 << 20
        member = Member(b"p", Inode(0o100600, size=size), payload=Pages, cuts=lambda: [(16384,) * 16] * (size >> 18))
        write_layer([member], lambda data: None)
        print((peak() - before) >> 10)
    """
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(grown.stdout) < 100
