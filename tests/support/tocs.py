"""zstd:chunked and eStargz layers around tables of contents that no honest tool would write."""

import base64
import gzip
import hashlib
import json
import struct
import zlib
from typing import Any

import zstandard

from ckptfs.model.oci import Digest
from tests.support.blobs import TAR, BytesBlob, blob_of
from tests.support.tars import END, member

STORAGE = "io.github.containers.zstd-chunked."
OLD = "io.containers.zstd-chunked."
STARGZ = "containerd.io/snapshot/stargz/toc.digest"
_ZSTD = zstandard.ZstdCompressor()
PAYLOAD = b"payload " * 100
ENTRY = {"type": "reg", "name": "file", "mode": 0o644, "size": len(PAYLOAD), "modtime": "2026-01-02T03:04:05Z"}


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def entry(**fields: Any) -> dict[str, Any]:
    """The entry of a file with PAYLOAD at the beginning of the layer; fields that are None are left out."""
    whole = {**ENTRY, "digest": sha256(PAYLOAD), "offset": 0, "endOffset": len(frame()), **fields}
    return {key: value for key, value in whole.items() if value is not None}


def frame(data: bytes = PAYLOAD) -> bytes:
    return _ZSTD.compress(data)


def table(entries: object, **fields: Any) -> bytes:
    return json.dumps({"version": 1, "entries": entries, **fields}).encode()


def zstd_chunked(toc: bytes, payload: bytes | None = None, prefix: str = STORAGE, **annotations: str) -> BytesBlob:
    """A layer of one frame and the table; annotations that are "" are left out, others replaced or added."""
    packed = _ZSTD.compress(toc)
    payload = frame() if payload is None else payload
    position = len(payload) + 8
    found = {
        prefix + "manifest-checksum": sha256(packed),
        prefix + "manifest-position": f"{position}:{len(packed)}:{len(toc)}:1",
    }
    found |= {prefix + key.replace("_", "-"): value for key, value in annotations.items()}
    blob = payload + b"\x50\x2a\x4d\x18" + struct.pack("<I", len(packed)) + packed
    return blob_of(blob, TAR + "+zstd", {key: value for key, value in found.items() if value})


def estargz(toc: bytes, payload: bytes | None = None, footer: bytes | None = None, index: bytes = b"") -> BytesBlob:
    """A layer of one gzip member, the table's member and a footer."""
    payload = gzip.compress(PAYLOAD) if payload is None else payload
    archive = gzip.compress(index or member(b"stargz.index.json", toc) + END)
    blob = payload + archive + (estargz_footer(len(payload)) if footer is None else footer)
    return blob_of(blob, TAR + "+gzip", {STARGZ: sha256(toc)})


def estargz_footer(offset: int, extra: bytes = b"SG\x16\x00%016xSTARGZ") -> bytes:
    field = extra % offset if b"%" in extra else extra
    return b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", len(field)) + field + b"\x01\0\0\xff\xff" + bytes(8)


def xattr(value: bytes) -> str:
    return base64.b64encode(value).decode()


def gzip_bomb(size: int) -> bytes:
    """A gzip member of `size` zeros."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    pieces = [compressor.compress(bytes(min(1 << 20, size - at))) for at in range(0, size, 1 << 20)]
    return b"".join(pieces) + compressor.flush()


def digest_of(blob: BytesBlob) -> str:
    return str(Digest.of(blob.data))
