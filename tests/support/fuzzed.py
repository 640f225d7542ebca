"""Every parser of what others wrote, with honest documents to begin with.

Whatever the bytes are, `parse` ends with a value or with an error of ckptfs/errors.py, soon and in little memory.
Called by hypothesis in tests/should_fail/test_fuzz_parsers.py and by atheris in tests/soak/fuzz.py.
"""

import gzip
from collections.abc import Callable
from typing import NamedTuple

import zstandard

from ckptfs.layers.soci import Ztoc
from ckptfs.layers.zstd_seekable import read_seek_table
from ckptfs.model.index import decode_index, encode_index
from ckptfs.model.layer_index import decode_layer_index, encode_layer_index
from ckptfs.model.oci import Digest, parse_document
from ckptfs.model.profile import decode_profile
from ckptfs.model.toc_document import decode_toc, encode_toc
from ckptfs.settings import Limits, Settings
from ckptfs.sources.auth import parse_challenges
from tests.should_fail.test_fuzz_layers import GOOD, scan
from tests.support import soci
from tests.support.blobs import TAR, ScannedLayer, blob_of
from tests.support.side import index_of, seekable
from tests.support.tars import END, header, member
from tests.support.tocs import entry, estargz, table, zstd_chunked
from tests.unit.test_criu_hostile import PARSERS, consume, real_images
from tests.unit.test_push_index import body_of
from tests.unit.test_push_index import layers as indexed_layers

SETTINGS, LIMITS = Settings(), Limits()
PLAIN = header(b"dir/", flag=b"5") + member(b"dir/file", b"x" * 9000) + header(b"l", flag=b"2", link=b"t") + END
BLOB = blob_of(gzip.compress(PLAIN), TAR + "+gzip")
DIGEST = str(BLOB.descriptor.digest)
KINDS = sorted(PARSERS)
TABLE = table([entry(), entry(name="b"), {"type": "dir", "name": "c", "xattrs": {"user.x": "eA=="}}])
PROFILE = b'{"version":1,"recordings":1,"files":["a"],"runs":[[0,0,4096,0],[0,8192,4096,5]]}'
MANIFEST = (
    b'{"schemaVersion":2,"config":{"mediaType":"x","digest":"%(d)s","size":2},'
    b'"layers":[{"mediaType":"y","digest":"%(d)s","size":5,"annotations":{"a":"b"}}]}'
) % {b"d": str(Digest.of(b"")).encode()}


class Target(NamedTuple):
    parse: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]


def mended(tar: bytes) -> bytes:
    """With the checksums that its headers should have, so that what lies behind them is reached."""
    out = bytearray(tar)
    for at in range(0, len(out) - 512, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def criu(data: bytes) -> None:
    if data:
        consume(KINDS[data[0] % len(KINDS)], data[1:])


def criu_seeds() -> list[bytes]:
    names = {kind: f"{kind}-" for kind in KINDS} | {"pstree": "pstree.", "files": "files.", "inventory": "inventory."}
    images = real_images()
    return [
        bytes((KINDS.index(kind),)) + data[:4096]
        for kind, prefix in names.items()
        for name, data in images.items()
        if name.startswith(prefix)
    ]


def document_seeds() -> list[bytes]:
    scanned = ScannedLayer.of(blob_of(GOOD))
    return [encode_toc(scanned.entries, layer_digest=DIGEST, format="tar", verification="transport")]


TARGETS: dict[str, Target] = {
    "tar": Target(lambda data: scan(blob_of(mended(data))), lambda: [GOOD]),
    "gzip": Target(lambda data: scan(blob_of(data, TAR + "+gzip")), lambda: [BLOB.data]),
    "zstd": Target(lambda data: scan(blob_of(data, TAR + "+zstd")), lambda: [zstandard.compress(GOOD)]),
    "zstd:chunked": Target(lambda data: scan(zstd_chunked(data)), lambda: [TABLE]),
    "estargz": Target(lambda data: scan(estargz(data)), lambda: [TABLE]),
    "soci": Target(
        lambda data: Ztoc.parse(data, BLOB.descriptor, SETTINGS), lambda: [soci.gzip_ztoc(BLOB, PLAIN, span=4096)]
    ),
    "seek table": Target(
        lambda data: read_seek_table(blob_of(data, TAR + "+zstd"), SETTINGS), lambda: [seekable(GOOD, 2000)]
    ),
    "layer index": Target(
        lambda data: decode_layer_index(data, DIGEST, BLOB.size), lambda: [encode_layer_index(index_of(BLOB))]
    ),
    "image index": Target(decode_index, lambda: [encode_index(indexed_layers())]),
    "image index, inside": Target(
        lambda data: decode_index(zstandard.compress(data)), lambda: [body_of(encode_index(indexed_layers()))]
    ),
    "kept table": Target(lambda data: decode_toc(data, layer=0, layer_digest=DIGEST), document_seeds),
    "kept table, inside": Target(
        lambda data: decode_toc(zstandard.compress(data), layer=0, layer_digest=DIGEST),
        lambda: [zstandard.decompress(document_seeds()[0])],
    ),
    "profile": Target(lambda data: decode_profile(data, LIMITS), lambda: [PROFILE]),
    "manifest": Target(parse_document, lambda: [MANIFEST]),
    "criu": Target(criu, criu_seeds),
    "challenge": Target(
        lambda data: parse_challenges([data.decode("latin-1")]), lambda: [b'Bearer realm="https://x/t",scope="a b"']
    ),
}
