"""Tar layers that nobody should make, one test for each sin: refused, or harmless."""

import gzip
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import pytest
import trio
import zstandard

from ckptfs.criu.wire import encoded
from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.reader import Reader
from ckptfs.errors import FormatError, LimitExceeded, only_error
from ckptfs.image.inner import InodeBlob, within
from ckptfs.image.remembered import LayerMemory
from ckptfs.image.views import CONTAINERD_CONFIG, CRIU_TAR
from ckptfs.layers.grid import Grid
from ckptfs.layers.stream import StreamFormat
from ckptfs.layers.tar import TarFormat
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.model.toc import Chunk, Entry, Inode
from ckptfs.model.tree import Tree
from ckptfs.settings import KiB, Limits, MiB, Settings
from tests.support.blobs import TAR, ScannedLayer, blob_of
from tests.support.memory import peak_memory
from tests.support.speed import slowness
from tests.support.tars import END, entries, gnu_long, gnu_sparse, header, member, padded, pax, refused, tar_of
from tests.support.tocs import gzip_bomb
from tests.support.trees import layout_with
from tests.support.views import show

LIMITS = Limits()
Figure = Callable[[str, object], None]


def with_limits(**limits: int) -> Settings:
    return Settings()._replace(limits=LIMITS._replace(**limits))


# M1: paths


@pytest.mark.row("M1")
@pytest.mark.parametrize(
    "name", [b"../x", b"..", b"a/../../b", b"a/../..", b"/../etc/passwd", b"./../x", b"a/./../../b", b"../" * 30 + b"x"]
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
@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"a/../b", b"b"),
        (b"a/./../b", b"b"),
        (b"/a/b/../../c/", b"c"),
        (b"a/../b/../c", b"c"),
        (b"..a/b..", b"..a/b.."),
    ],
)
def test_a_name_that_turns_back_inside_is_where_engines_put_it(name: bytes, path: bytes) -> None:
    assert [entry.path for entry in entries(header(name, flag=b"5") + END)] == [path]
    assert [entry.path for entry in entries(pax([(b"path", name)]) + header(b"x", flag=b"5") + END)] == [path]
    (link,) = entries(header(b"x", flag=b"1", link=name) + END)
    assert link.link == path


@pytest.mark.row("M1")
def test_a_root_that_is_not_a_directory() -> None:
    refused(member(b"./", b"", flag=b"2", link=b"x") + END, "root")
    refused(member(b"", b"data") + END, "root")
    refused(member(b"a/..", b"data") + END, "root")
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
def test_a_size_that_the_archive_does_not_have(size: int | bytes, record_property: Figure) -> None:
    started = time.process_time()
    with peak_memory() as peak:
        refused(header(b"x", size) + END)
        refused(header(b"x", size, flag=b"L") + END)
    took = time.process_time() - started
    record_property("figure", f"{size!r}: {took * 1000:.0f} ms, {peak.grown / MiB:.1f} MiB")
    assert peak.grown < 64 * MiB
    assert took < 0.1 * slowness()


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
    assert len(ScannedLayer.of(blob, TarFormat(), settings).entries) == 1
    with pytest.raises(FormatError, match="size"):
        ScannedLayer.of(blob_of(member(b"x", bytes(1001)) + END), TarFormat(), settings)


@pytest.mark.row("M3")
def test_a_stream_that_claims_exabytes_costs_nothing() -> None:
    data = gzip.compress(header(b"huge", 1 << 61) + bytes(1000))
    blob = blob_of(data, TAR + "+gzip")
    found: list[Entry] = []
    with peak_memory() as peak, pytest.raises(FormatError, match="cut off"):
        found.extend(StreamFormat("gzip").open(blob, 0, Settings()).scan(lambda chunk, piece: None))
    assert peak.grown < 16 * MiB


@pytest.mark.row("M3")
@pytest.mark.parametrize("segments", [[(0, 1 << 60, 512)], [((1 << 60) - 512, 512, 1536)]], ids=["payload", "hole"])
def test_a_tar_inside_that_claims_exabytes_costs_nothing(segments: list[tuple[int, int, int]]) -> None:
    """Its name and its members are known without a walk over 2**42 chunks: it would be in the event loop."""
    grid = FewChunks("outer", 0, 256 * KiB)
    outer = Inode(0o100644, size=1 << 60, extents=grid.extents(segments))
    blob = InodeBlob(cast("Reader", None), outer, TAR)
    others = [Inode(0o100644, size=1 << 60, extents=grid.extents([(a, b, c + 1)])) for a, b, c in segments]
    assert blob.descriptor.digest != InodeBlob(cast("Reader", None), others[0], TAR).descriptor.digest
    member = Inode(0o100644, size=1 << 59, extents=FewChunks("inner", 1, 256 * KiB).extents([(0, 1 << 59, 512)]))
    found = within(Entry(b"big", member), outer, b"rootfs-diff").inode
    assert found is not None and len(found.extents) == ((1 << 41) + 1 if segments[0][0] == 0 else 0)


@pytest.mark.row("M3")
def test_a_layer_that_claims_exabytes_is_not_remembered(tmp_path: Path) -> None:
    """A manifest may claim any size; the end of the command waits for what is written down."""
    blob = blob_of(b"", TAR)
    layer = TarFormat().open(blob, 0, Settings())
    for size, kept in ((1 << 20, True), (1 << 60, False)):
        extents = FewChunks(str(blob.descriptor.digest), 0, 256 * KiB).extents([(0, size, 512)])
        with ChunkCache.open(tmp_path / str(size)) as cache:
            memory = LayerMemory(cache, Settings())
            trio.run(memory.keep, [Entry(b"x", Inode(0o100644, size=size, extents=extents))], layer, blob.descriptor)
            assert (memory.entries(layer, 0, blob.descriptor) is not None) == kept


class FewChunks(Grid):
    def _made(self, index: int) -> Chunk:
        assert len(self._chunks) < 10, "somebody walks over the chunks"
        return super()._made(index)


@pytest.mark.row("M3")
def test_a_sparse_map_of_a_million_pieces(record_property: Figure) -> None:
    pieces = [(2 * i, 1) for i in range(1_000_000)]
    old = gnu_sparse(b"x", 2_000_000, pieces, b"")
    lines = b"\n".join(b"%d\n1" % (2 * i) for i in range(1_000_000))
    one = pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"2000000")])
    one += member(b"x", b"1000000\n" + lines)
    in_header = pax([(b"GNU.sparse.map", b"0,1," * 500_000)])[: 4 * MiB]
    for data in (old, one, in_header):
        scanner = TarScanner(Grid("x", 0, 256 * KiB), LIMITS)
        started = time.process_time()
        with peak_memory() as peak, pytest.raises(LimitExceeded):
            for low in range(0, len(data), 256 * KiB):
                scanner.feed(memoryview(data)[low : low + 256 * KiB])
        took = time.process_time() - started
        record_property("figure", f"sparse map: {took * 1000:.0f} ms, {peak.grown / MiB:.1f} MiB")
        assert took < 0.1 * slowness()
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
def test_a_bomb_is_streamed_chunk_by_chunk(kind: str, record_property: Figure) -> None:
    size = 128 * MiB
    tar = member(b"x")[:512] + header(b"bomb", size - 1024)
    if kind == "gzip":
        blob = blob_of(gzip.compress(tar) + gzip_bomb(size - 1024), TAR + "+gzip")
    else:
        blob = blob_of(zstandard.ZstdCompressor().compress(tar + bytes(size - 1024)), TAR + "+zstd")
    assert blob.size < size / 500
    total = 0
    with peak_memory() as peak:
        layer = StreamFormat(kind).open(blob, 0, Settings())

        def count(chunk: object, data: bytes) -> None:
            nonlocal total
            total += len(data)

        assert len(list(layer.scan(count))) == 2
    assert total == size
    record_property("figure", f"{kind}, {size // blob.size}:1: peak {peak.grown / MiB:.1f} MiB")
    assert peak.grown < 17 * MiB


@pytest.mark.row("M4")
def test_a_zstd_window_at_the_limit_and_one_past_it() -> None:
    data = member(b"x", os.urandom(300_000)) + END

    def packed(window_log: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return compressor.compress(data) + compressor.flush()

    settings = with_limits(zstd_window_bytes=1 << 20)
    assert len(ScannedLayer.of(blob_of(packed(20), TAR + "+zstd"), StreamFormat("zstd"), settings).entries) == 1
    with pytest.raises(LimitExceeded, match="window"):
        ScannedLayer.of(blob_of(packed(21), TAR + "+zstd"), StreamFormat("zstd"), settings)


@pytest.mark.row("M4")
@pytest.mark.parametrize("past", [0, 1])
def test_a_config_of_containerd_at_the_limit_and_one_past_it(past: int, tmp_path: Path) -> None:
    size, criu = LIMITS.dump_bytes + past, tar_of({"inventory.img": b"x"})
    kinds = {CRIU_TAR: "a", CONTAINERD_CONFIG: "b"}
    index = {"manifests": [{"mediaType": kind, "digest": "sha256:" + d * 64, "size": 1} for kind, d in kinds.items()]}
    spec = b'"' + b" " * (size - 7) + b'"'
    blobs = {b"a": criu, b"b": b"\x12" + encoded(len(spec)) + spec}
    assert len(blobs[b"b"]) == size
    layer = member(b"oci-layout", b"{}") + member(b"index.json", json.dumps(index).encode())
    layer += b"".join(member(b"blobs/sha256/" + name * 64, data) for name, data in blobs.items()) + END
    layout = layout_with(tmp_path / "layout", [blob_of(gzip.compress(layer, 1), TAR + "+gzip")])
    if past:
        with pytest.raises(BaseExceptionGroup) as caught:
            show(f"oci:{layout}", tmp_path / "cache")
        error = only_error(caught.value)
        assert isinstance(error, LimitExceeded) and "config blob" in str(error)
    else:
        assert show(f"oci:{layout}", tmp_path / "cache").entries["spec.dump"]["size"] == len(spec)


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


@pytest.mark.row("M6")
@pytest.mark.parametrize("kind", ["forwards", "backwards", "in a circle"])
def test_chains_of_hard_links(kind: str, record_property: Figure) -> None:
    """A hundred thousand, and what a million take, in seconds of CPU."""
    took = [resolved(kind, 100_000), resolved(kind, 1_000_000)]
    record_property("figure", f"{kind}: 10^5 in {took[0]:.2f} s, 10^6 in {took[1]:.1f} s")
    assert took[0] <= 1.0 * slowness()
    assert took[1] <= 20 * took[0], "no more than in proportion"


@pytest.mark.row("M6")
@pytest.mark.parametrize("layers", [2, 40])
def test_links_to_nothing_among_many_hidden_files(layers: int, record_property: Figure) -> None:
    """In proportion to their number: the event loop stands still meanwhile. And once, however many layers end."""
    count, tree = 50_000, Tree()
    for rank in range(1, layers + 1):
        tree.begin(rank)
    tree.add([Entry(b"%d" % i, Inode(0o100644)) for i in range(count)], 1)
    links = (Entry(b"link%d" % i, None, b"nothing%d" % i) for i in range(count))
    tree.add([Entry(b".wh..wh..opq", Inode(0o100644)), *links], layers)
    began = time.process_time()
    with pytest.raises(FormatError, match="does not have"):
        for rank in range(layers, 0, -1):
            tree.finish(rank)
    took = time.process_time() - began
    record_property("figure", f"{layers} layers: {took:.2f} s")
    assert took <= 1.0 * slowness()


@pytest.mark.row("M2")
@pytest.mark.parametrize("target", [b"l%d", b"l%d" + b"/." * 2000], ids=["chain", "long targets"])
def test_chains_of_symbolic_links(target: bytes, record_property: Figure) -> None:
    """As many as the kernel follows are followed; a path through them costs little more than a long one."""
    links = [Entry(b"l%d" % i, Inode(0o120777, target=target % (i + 1))) for i in range(60)]
    tree = Tree()
    tree.begin(1)
    tree.add(links, 1)
    began = time.process_time()
    for i in range(20_000):
        good = len(target) < 10 and i % 2 == 0
        with nullcontext() if good else pytest.raises(FormatError, match="too many"):
            tree.add([Entry(b"l%d/f%d" % (60 - LIMITS.path_links - i % 2, i), Inode(0o100644))], 1)
        assert not good or tree.find(b"l60/f%d" % i)
    took = time.process_time() - began
    record_property("figure", f"20 000 files in {took:.2f} s")
    assert took <= 3.0 * slowness()


def resolved(kind: str, count: int) -> float:
    """CPU seconds until a tree knows what a chain of links leads to, or that it leads nowhere."""
    file = Entry(b"%d" % count, Inode(0o100644))
    if kind == "backwards":
        links = [file, *(Entry(b"%d" % i, None, b"%d" % (i + 1)) for i in reversed(range(count)))]
    else:
        last = [file] if kind == "forwards" else []
        links = [*(Entry(b"%d" % i, None, b"%d" % ((i + 1) % (count + len(last)))) for i in range(count)), *last]
    tree = Tree()
    tree.begin(1)
    began = time.process_time()
    with pytest.raises(FormatError) if kind == "in a circle" else nullcontext():
        tree.add(links, 1)
        tree.finish(1)
    took = time.process_time() - began
    found = tree.find(b"0")
    assert kind == "in a circle" or (found is not None and found.inode is file.inode)
    return took
