"""The inline index: what goes in comes out, and nothing that a stranger put in does harm."""

import base64
import copy
import json
import struct
from typing import Any

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfs.errors import CkptfsError, FormatError, IntegrityError, LimitExceeded
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.index import (
    ANNOTATION_INDEX,
    IndexedFile,
    IndexedLayer,
    Table,
    decode_index,
    encode_index,
    encode_table,
    load_table,
    manifest_index,
)
from ckptfs.model.index_columns import Row
from ckptfs.model.oci import OCI_MANIFEST, Descriptor, Digest, Manifest
from ckptfs.model.toc import Entry, Inode
from ckptfs.settings import Limits

CONTENT = b"inventory" * 30
PAGES: list[Row] = [
    (0, 4096, 1000, 500, b"\1" * 32),
    (4096, 8192, 1500, 20, b""),
    (12288, 4096, 1520, 600, b"\2" * 32),
]
PLAIN: list[Row] = [(0, 16384, 3000, 9000, b"\3" * 32), (16384, 100, 12000, 90, b"\4" * 32)]


def regular(size: int, **more: Any) -> Inode:
    return Inode(0o100600, 7, 8, size, 1_700_000_000_123_456_789, **more)


def layers() -> list[IndexedLayer]:
    small = regular(len(CONTENT), xattrs={b"user.x": b"\0\xff"})
    return [
        IndexedLayer(
            Digest.of(b"meta"),
            5000,
            [
                IndexedFile(Entry(b"", Inode(0o40755, mtime_ns=-5))),
                IndexedFile(Entry(b"checkpoint", Inode(0o40700, mtime_ns=(1 << 40) * 10**9))),
                IndexedFile(
                    Entry(b"checkpoint/inventory.img", small), 60, [(0, len(CONTENT), 60, 44, b"\5" * 32)], CONTENT
                ),
                IndexedFile(Entry(b"checkpoint/again", None, b"checkpoint/inventory.img")),
                IndexedFile(Entry(b"checkpoint/parent", Inode(0o120777, size=6, target=b"../pre"))),
                IndexedFile(Entry(b"dev", Inode(0o20600, rdev=259 << 8 | 3))),
                IndexedFile(Entry(b"odd\xff", regular(0))),
            ],
            ChunkDigest.BLAKE3,
        ),
        IndexedLayer(
            Digest.of(b"pages"),
            100_000,
            [
                IndexedFile(Entry(b"checkpoint/pages-1.img", regular(16384)), 1000, PAGES, eager=[(0, 4096)]),
                IndexedFile(Entry(b"checkpoint/pages-2.img", regular(16484)), 3000, PLAIN, eager=[]),
            ],
        ),
    ]


def body_of(document: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(document)


def changed(change: Any) -> bytes:
    """The document with its JSON changed."""
    body = body_of(encode_index(layers()))
    (length,) = struct.unpack_from("<I", body, 8)
    value = json.loads(body[12 : 12 + length])
    change(value)
    text = json.dumps(value).encode()
    return zstandard.compress(body[:8] + struct.pack("<I", len(text)) + text + body[12 + length :])


def test_what_goes_in_comes_out() -> None:
    index = decode_index(encode_index(layers()), first_layer=5)
    for number, (given_layer, found) in enumerate(zip(layers(), index.layers, strict=True)):
        assert (found.digest, found.size) == (given_layer.digest, given_layer.size)
        assert found.chunk_digest is given_layer.chunk_digest
        for expected, file in zip(given_layer.files, found.files, strict=True):
            assert (file.entry.path, file.entry.link) == (expected.entry.path, expected.entry.link)
            assert (file.eager, file.content) == (expected.eager, expected.content)
            if expected.entry.inode is None:
                continue
            inode = file.entry.inode
            assert inode is not None
            for name in ("mode", "uid", "gid", "size", "mtime_ns", "rdev", "target", "xattrs"):
                assert getattr(inode, name) == getattr(expected.entry.inode, name)
            rows = [row for row in expected.rows if row[4]]
            assert [(e.start, e.length, e.chunk.offset, e.chunk.size) for e in inode.extents] == [r[:4] for r in rows]
            assert all(e.chunk.layer == 5 + number and e.chunk.length == e.length for e in inode.extents)
            if expected.content is None:
                assert [e.chunk.digest for e in inode.extents] == [row[4] for row in rows]
    assert index.contents == {blake3(CONTENT).digest(): CONTENT}


def test_extended_attributes_are_judged_one_by_one() -> None:
    """As in the tables of contents of the same layers, and by setxattr(2): a file may have many of the largest."""
    largest = {b"user.%d" % number: bytes(Limits().xattr_bytes) for number in range(3)}

    def decoded(xattrs: dict[bytes, bytes]) -> Inode | None:
        file = IndexedFile(Entry(b"x", regular(0, xattrs=xattrs)))
        return decode_index(encode_index([IndexedLayer(Digest.of(b"x"), 100, [file])])).layers[0].files[0].entry.inode

    found = decoded(largest)
    assert found is not None and found.xattrs == largest
    for wrong in ({b"user.0": bytes(Limits().xattr_bytes + 1)}, {b"": b""}, {b"user.\0": b""}, {b"u" * 256: b""}):
        with pytest.raises(FormatError, match="extended attribute"):
            decoded(wrong)


def test_the_same_layers_give_the_same_bytes() -> None:
    assert encode_index(layers()) == encode_index(copy.deepcopy(layers()))


def test_a_table_gives_the_extents_later() -> None:
    table = encode_table(PAGES)
    file = IndexedFile(
        Entry(b"pages", regular(16384)), 1000, table=Table(90_000, len(table), Digest.of(table), len(PAGES))
    )
    index = decode_index(encode_index([IndexedLayer(Digest.of(b"x"), 100_000, [file])]))
    (found,) = index.layers[0].files
    assert found.entry.inode is not None
    assert list(found.entry.inode.extents) == []
    with pytest.raises(IntegrityError):
        load_table(found, table[:-1] + b"!", 3, 100_000)
    load_table(found, table, 3, 100_000)
    assert [(e.start, e.chunk.offset, e.chunk.layer) for e in found.entry.inode.extents] == [
        (0, 1000, 3),
        (12288, 1520, 3),
    ]
    with pytest.raises(FormatError, match="outside"):
        load_table(found, table, 3, 2000)


def set_in(layer: int, file: int, **values: Any) -> Any:
    return lambda document: document["layers"][layer]["files"][file].update(values)


@pytest.mark.parametrize(
    "change",
    [
        set_in(0, 2, path="../etc/passwd"),
        set_in(0, 2, path="/etc/passwd"),
        set_in(0, 2, path="a//b"),
        set_in(0, 2, path="a\0b"),
        set_in(0, 2, path="./a"),
        set_in(0, 2, path=7),
        set_in(0, 2, path="\ud800"),
        set_in(0, 2, path="n" * 256),
        set_in(0, 2, path="/".join("a" * 300)),
        set_in(0, 2, mode=0o140777),
        set_in(0, 2, mode=-1),
        set_in(0, 2, uid=1 << 32),
        set_in(0, 2, mtime="yesterday"),
        set_in(0, 2, size=-1),
        set_in(0, 2, size=True),
        set_in(0, 2, rdev=1 << 32),
        set_in(0, 2, size=1 << 63),
        set_in(0, 2, size=len(CONTENT) + 1),
        set_in(0, 2, rows=2),
        set_in(0, 2, rows=0),
        set_in(0, 2, rows=1 << 40),
        set_in(0, 2, content=False),
        set_in(0, 2, xattrs={"user.x": "not base64!"}),
        set_in(0, 2, xattrs={"user.x": "QQ==" * 30000}),
        set_in(0, 2, xattrs=[]),
        set_in(0, 3, link="../outside"),
        set_in(0, 4, target=""),
        set_in(0, 4, target="a\0"),
        set_in(0, 1, size=5),
        set_in(1, 0, offset=99_999),
        set_in(1, 0, offset=1 << 62),
        set_in(1, 0, size=16385),
        set_in(1, 0, eager=[0]),
        set_in(1, 0, eager=[0, 20000]),
        set_in(1, 0, eager=[4096, 4096, 0, 4096]),
        set_in(1, 0, eager="all"),
        set_in(1, 0, table=[0, 5, "sha256:00", 3]),
        set_in(1, 0, table=[99_000, 5000, str(Digest.of(b"")), 3]),
        set_in(1, 0, table=[0, 5, str(Digest.of(b"")), -3]),
        set_in(1, 0, table={}),
        lambda document: document.update(layers=None),
        lambda document: document.update(layers=[{}] * 300),
        lambda document: document["layers"][0].update(digest="md5:0"),
        lambda document: document["layers"][0].update(chunks="md5"),
        lambda document: document["layers"][0].update(chunks=None),
        lambda document: document["layers"][0].update(size=10),
        lambda document: document["layers"][0].update(files={}),
        lambda document: document["layers"][0]["files"].append(3),
        lambda document: document["layers"].pop(),
    ],
)
def test_nonsense_is_refused(change: Any) -> None:
    with pytest.raises(FormatError):
        decode_index(changed(change))


def manifest(annotation: str, described: list[IndexedLayer]) -> Manifest:
    blobs = tuple(Descriptor("", layer.digest, layer.size) for layer in described)
    return Manifest(b"", Digest.of(b""), OCI_MANIFEST, blobs[0], blobs, {ANNOTATION_INDEX: annotation})


def test_the_index_of_a_manifest() -> None:
    text = base64.b64encode(encode_index(layers())).decode()
    index = manifest_index(manifest(text, layers()), first_layer=3)
    assert index is not None and [layer.digest for layer in index.layers] == [layer.digest for layer in layers()]
    assert manifest_index(manifest(text, layers())._replace(annotations={})) is None
    with pytest.raises(FormatError, match="other layers"):
        manifest_index(manifest(text, layers()[:1]))


@pytest.mark.parametrize("text", ["", "=", "not base64", "QUJD\n", "caf\u00e9", "QUJDRA=="])
def test_an_annotation_that_is_no_index(text: str) -> None:
    with pytest.raises(FormatError):
        manifest_index(manifest(text, layers()))


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    with pytest.raises(LimitExceeded):
        decode_index(zstandard.compress(bytes(2 << 20)), limits=Limits(toc_bytes=1 << 20))


def test_limits_hold_and_one_less_does_not() -> None:
    document = encode_index(layers())
    decode_index(document, limits=Limits(layers=2, toc_entries=7, chunk_bytes=16384))
    for limits in (Limits(layers=1), Limits(toc_entries=5), Limits(chunk_bytes=16383)):
        with pytest.raises(FormatError):
            decode_index(document, limits=limits)


@pytest.mark.parametrize(
    "document", [b"", b"junk", zstandard.compress(b""), zstandard.compress(b"CKPTIDX2" + bytes(9))]
)
def test_junk_is_refused(document: bytes) -> None:
    with pytest.raises(FormatError):
        decode_index(document)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_document_raises_our_errors_only(data: st.DataObject) -> None:
    body = bytearray(body_of(encode_index(layers())))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(len(body) // 2, len(body))) :]
    try:
        decode_index(zstandard.compress(bytes(body)))
    except CkptfsError:
        pass
