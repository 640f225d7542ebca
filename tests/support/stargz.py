"""eStargz layers of any tar, as docs/estargz.md of the stargz snapshotter describes them; honest ones.

tocs.py makes those that no honest tool would write.
"""

import base64
import gzip
import hashlib
import io
import json
import tarfile
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from tests.support.blobs import BytesBlob
from tests.support.tocs import estargz

_TYPES = {
    tarfile.REGTYPE: "reg",
    tarfile.DIRTYPE: "dir",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}
_XATTR = "SCHILY.xattr."


def estargz_of(tar: bytes, chunk: int) -> BytesBlob:
    """Names have to be UTF-8: the table is JSON."""
    payload = bytearray()
    entries: list[dict[str, Any]] = []
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        position = 0
        for member in archive:
            payload += gzip.compress(tar[position : member.offset_data])
            position = member.offset_data
            entry = _entry(member)
            entries.append(entry)
            if not member.isreg():
                continue
            data = tar[position : position + member.size]
            position += member.size
            for at in range(0, len(data), chunk):
                piece = data[at : at + chunk]
                place = {"offset": len(payload), "chunkDigest": _digest(piece)}
                if len(data) > chunk:
                    place |= {"chunkOffset": at, "chunkSize": len(piece)}
                if at == 0:
                    entry |= {**place, "digest": _digest(data)}
                else:
                    entries.append({"name": member.name, "type": "chunk", **place})
                payload += gzip.compress(piece)
        payload += gzip.compress(tar[position:])
    return estargz(json.dumps({"version": 1, "entries": entries}).encode(), bytes(payload))


def _entry(member: tarfile.TarInfo) -> dict[str, Any]:
    moment = int(Decimal(member.pax_headers.get("mtime", int(member.mtime))) * 1_000_000_000)
    seconds, fraction = divmod(moment, 1_000_000_000)
    time = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    xattrs = {
        key.removeprefix(_XATTR): base64.b64encode(value.encode("utf-8", "surrogateescape")).decode()
        for key, value in member.pax_headers.items()
        if key.startswith(_XATTR)
    }
    entry: dict[str, Any] = {
        "name": member.name + ("/" if member.isdir() else ""),
        "type": _TYPES[member.type],
        "mode": member.mode,
        "uid": member.uid,
        "gid": member.gid,
        "modtime": time + (f".{fraction:09}".rstrip("0") if fraction else "") + "Z",
    }
    optional = {
        "size": member.size if member.isreg() else 0,
        "linkName": member.linkname,
        "devMajor": member.devmajor if member.ischr() or member.isblk() else 0,
        "devMinor": member.devminor if member.ischr() or member.isblk() else 0,
        "xattrs": xattrs,
    }
    return entry | {key: value for key, value in optional.items() if value}


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
