"""The document that keeps a layer's table of contents: what goes in comes out, and nothing else does."""

import hashlib
import stat

import pytest
import zstandard

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.layers.grid import Grid
from ckptfs.model.packed import OnlyExtent, PackedExtents
from ckptfs.model.toc import Chunk, Entry, Extent, Inode, derived_key
from ckptfs.model.toc_document import decode_toc, encode_toc
from ckptfs.settings import GiB, KiB, Limits

DIGEST = "sha256:" + "1" * 64


def key(n: int) -> bytes:
    return hashlib.sha256(b"%d" % n).digest()


def encoded(*entries: Entry) -> bytes:
    return encode_toc(entries, layer_digest=DIGEST, format="x", verification="chunk")


def described(entries: tuple[Entry, ...]) -> list[object]:
    found: list[object] = []
    for entry in entries:
        i = entry.inode
        if i is None:
            found.append((entry.path, entry.link))
            continue
        extents = [
            (e.start, e.length, e.skip, c.key, c.layer, c.offset, c.size, c.length, c.digest, c.inner)
            for e in i.extents
            for c in (e.chunk,)
        ]
        found.append((entry.path, i.mode, i.uid, i.gid, i.size, i.mtime_ns, i.rdev, i.target, dict(i.xattrs), extents))
    return found


def file(size: int, *extents: Extent) -> Inode:
    return Inode(stat.S_IFREG | 0o644, size=size, extents=extents)


def test_everything_that_an_entry_can_be() -> None:
    shared = Chunk(key(1), 3, 100, 50, 200, key(1))
    inner = Chunk(derived_key(DIGEST, 100, 7), 3, 100, 50, 300, None, 7)
    own = Chunk(key(9), 3, 900, 5, 5)
    entries = (
        Entry(b"", Inode(stat.S_IFDIR | 0o1777)),
        Entry(
            b"latin-\xe9/\nx", file(1000, Extent(0, 50, shared), Extent(500, 150, shared, 50), Extent(700, 300, inner))
        ),
        Entry(b"own", file(5, Extent(0, 5, own))),
        Entry(b"holes", file(1 << 62)),
        Entry(b"hard", None, b"latin-\xe9/\nx"),
        Entry(b"soft", Inode(stat.S_IFLNK | 0o777, target=b"../\xff", size=4)),
        Entry(b"old", Inode(stat.S_IFREG | 0o4711, 4294967295, 3, mtime_ns=-62_135_596_800_000_000_000 + 5)),
        Entry(b"far", Inode(stat.S_IFREG, mtime_ns=(1 << 39) * 1_000_000_000 + 999_999_999)),
        Entry(b"null", Inode(stat.S_IFCHR | 0o666, rdev=0x103)),
        Entry(b"x", Inode(stat.S_IFREG, xattrs={b"user.\xff": bytes(range(256)), b"user.empty": b""})),
        Entry(b"x", Inode(stat.S_IFIFO | 0o600)),
    )
    toc = decode_toc(encoded(*entries), layer=3, layer_digest=DIGEST)
    assert described(toc.entries) == described(entries)
    first = toc.entries[1].inode
    assert first is not None and first.extents[0].chunk is first.extents[1].chunk


def test_a_table_that_contradicts_itself_stays_as_it_is() -> None:
    """One place with two digests: each file is checked with its own also when the table comes out of the cache."""
    one, other = (Chunk(key(n), 3, 100, 50, 200, key(n)) for n in (1, 2))
    entries = tuple(Entry(b"%d" % n, file(200, Extent(0, 200, c))) for n, c in enumerate((one, other, one, one)))
    assert described(decode_toc(encoded(*entries), layer=3, layer_digest=DIGEST).entries) == described(entries)


def test_an_empty_layer() -> None:
    assert decode_toc(encoded(), layer=0, layer_digest=DIGEST).entries == ()


def test_a_large_file_is_small_in_the_document_and_in_memory() -> None:
    count = 16 * 1024
    chunks = PackedExtents(0)
    for n in range(count):
        chunks.append(n * 256 * KiB, 256 * KiB, n * 90_000, 90_000 - n % 1000, key(n))
    inode = Inode(stat.S_IFREG, size=4 * GiB, extents=chunks)
    document = encoded(Entry(b"pages-1.img", inode))
    assert len(document) < 34 * count, "a sha256 of 32 bytes for each chunk, and next to nothing else"
    (entry,) = decode_toc(document, layer=0, layer_digest=DIGEST).entries
    assert entry.inode is not None and isinstance(entry.inode.extents, PackedExtents)
    assert described((entry,)) == described((Entry(b"pages-1.img", inode),))


def test_a_grid_takes_next_to_nothing() -> None:
    inode = Inode(stat.S_IFREG, size=4 * GiB, extents=Grid(DIGEST, 0, 256 * KiB).extents([(0, 4 * GiB, 1536)]))
    document = encoded(Entry(b"pages-1.img", inode))
    assert len(document) < 8 * KiB
    (entry,) = decode_toc(document, layer=0, layer_digest=DIGEST).entries
    assert described((entry,)) == described((Entry(b"pages-1.img", inode),))


def test_documents_that_are_refused() -> None:
    document = encoded(Entry(b"x", file(5, Extent(0, 5, Chunk(key(1), 0, 0, 5, 5, key(1))))))
    plain = zstandard.decompress(document)
    for broken in (
        b"",
        b"x" * 100,
        document[:-1],
        document[:20] + bytes((document[20] ^ 1,)) + document[21:],
        zstandard.compress(b""),
        zstandard.compress(plain[:-1]),
        zstandard.compress(b"x" + plain[1:]),
        zstandard.compress(plain[:12] + b"[" + plain[13:]),
        zstandard.compress(plain.replace(b'"version":1', b'"version":2')),
        zstandard.compress(plain.replace(b'"entries":1', b'"entries":2')),
        zstandard.compress(plain.replace(b'"verification":"chunk"', b'"verification":"trust"')),
    ):
        with pytest.raises(FormatError):
            decode_toc(broken, layer=0, layer_digest=DIGEST)
    with pytest.raises(FormatError, match="another layer"):
        decode_toc(document, layer=0, layer_digest="sha256:" + "2" * 64)


def test_extents_that_lie_are_refused() -> None:
    chunk = Chunk(key(1), 0, 0, 5, 5, key(1))
    for inode in (file(4, Extent(0, 5, chunk)), file(9, Extent(0, 6, chunk)), file(9, Extent(0, 3, chunk, 3))):
        with pytest.raises(FormatError, match="damaged"):
            decode_toc(encoded(Entry(b"x", inode)), layer=0, layer_digest=DIGEST)


def test_a_document_at_each_limit_and_one_past_it() -> None:
    entries = [Entry(b"%d" % n, Inode(stat.S_IFDIR)) for n in range(3)]
    document = encoded(*entries)
    size = len(zstandard.decompress(document))
    for limits, good in (
        (Limits()._replace(toc_entries=3, toc_bytes=size), True),
        (Limits()._replace(toc_entries=2), False),
        (Limits()._replace(toc_bytes=size - 1), False),
    ):
        if good:
            assert len(decode_toc(document, layer=0, layer_digest=DIGEST, limits=limits).entries) == 3
            continue
        with pytest.raises(LimitExceeded):
            decode_toc(document, layer=0, layer_digest=DIGEST, limits=limits)


def test_files_of_one_chunk_are_columns_and_read_back_the_same() -> None:
    digests = [bytes([n]) * 32 for n in range(3)]
    chunks = [Chunk(digest, 4, 1000 * n, 700, 900, digest) for n, digest in enumerate(digests)]
    entries = [Entry(b"%d" % n, Inode(0o100644, size=900, extents=(Extent(0, 900, c),))) for n, c in enumerate(chunks)]
    entries.append(Entry(b"part", Inode(0o100644, size=400, extents=(Extent(0, 400, chunks[1], 500),))))
    found = [e.inode for e in decode_toc(encoded(*entries), layer=4, layer_digest=DIGEST).entries]
    assert [list(inode.extents) for inode in found if inode] == [list(e.inode.extents) for e in entries if e.inode]
    assert [isinstance(inode.extents, OnlyExtent) for inode in found if inode] == [True, True, True, False]
