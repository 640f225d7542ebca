"""zTOCs and SOCI indexes as the soci tool writes them, by the flatbuffers package (ckptfs has a reader of its own).

Field numbers, the layout of checkpoints and the manifests follow awslabs/soci-snapshotter: ztoc/fbs/ztoc.fbs,
ztoc/ztoc_marshaler.go, ztoc/compression/gzip_zinfo.c, soci/soci_index.go.
"""

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import flatbuffers
from flatbuffers.number_types import Int8Flags, Int32Flags, Int64Flags, Uint32Flags

from ckptfs.layers.gzip_index import PointFinder
from ckptfs.model.layer_index import AccessPoint, unpack_window
from ckptfs.model.oci import OCI_MANIFEST
from ckptfs.settings import KiB, Limits
from tests.support.blobs import BytesBlob

V1 = "application/vnd.amazon.soci.index.v1+json"
V2 = "application/vnd.amazon.soci.index.v2+json"
INDEX_DIGEST = "com.amazon.soci.index-digest"
_TYPES = {
    tarfile.REGTYPE: "reg",
    tarfile.AREGTYPE: "reg",
    tarfile.DIRTYPE: "dir",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}
File = dict[str, Any]


def files_of(tar: bytes) -> list[File]:
    """The metadata that the soci tool takes from each entry of a tar."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        for member in archive:
            moment = int(Decimal(member.pax_headers.get("mtime", int(member.mtime))) * 1_000_000_000)
            seconds, fraction = divmod(moment, 1_000_000_000)
            time = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            found.append(
                {
                    "name": member.name + ("/" if member.isdir() else ""),
                    "type": _TYPES[member.type],
                    "offset": member.offset_data,
                    "size": member.size if member.isreg() else 0,
                    "link": member.linkname,
                    "mode": member.mode,
                    "uid": member.uid,
                    "gid": member.gid,
                    "time": time + (f".{fraction:09}" if fraction else "") + "Z",
                    "major": member.devmajor,
                    "minor": member.devminor,
                    "pax": member.pax_headers,
                }
            )
    return found


def points_of(blob: bytes, span: int) -> list[AccessPoint]:
    """Access points at least `span` decoded bytes apart, windows unpacked."""
    finder = PointFinder()
    for _ in finder.inflated(iter((blob,)), 16 * KiB, Limits()):
        pass
    assert finder.access is not None
    chosen: list[AccessPoint] = []
    for point in finder.access.points:
        if not chosen or point.position - chosen[-1].position > span:
            chosen.append(point._replace(window=unpack_window(point.window)))
    return chosen


def checkpoints(points: Sequence[AccessPoint], span: int, *, version: int = 2) -> bytes:
    packed = [struct.pack("<iq", len(points), span)]
    for point in points[1 if version == 1 else 0 :]:
        into = point.offset + (1 if point.bits else 0)
        packed.append(struct.pack("<qqB", into, point.position, point.bits) + point.window.rjust(32 * KiB, b"\0"))
    return b"".join(packed)


def span_digests(blob: bytes, starts: Sequence[int], ends: Sequence[int]) -> list[str]:
    return [f"sha256:{hashlib.sha256(blob[a:b]).hexdigest()}" for a, b in zip(starts, ends, strict=True)]


def gzip_ztoc(layer: BytesBlob, tar: bytes, span: int = 256 * KiB, *, version: int = 2, **changes: Any) -> bytes:
    points = points_of(layer.data, span)
    starts = [point.offset for point in points]
    ends = [*(point.offset + (1 if point.bits else 0) for point in points[1:]), layer.size]
    fields = {
        "compressed": layer.size,
        "length": len(tar),
        "files": files_of(tar),
        "algorithm": 1,
        "max_span": len(points) - 1,
        "digests": span_digests(layer.data, starts, ends),
        "checkpoints": checkpoints(points, span, version=version),
    }
    return ztoc(**(fields | changes))


def tar_ztoc(layer: BytesBlob) -> bytes:
    span = 256 * KiB
    starts = list(range(0, layer.size, span))
    fields = {
        "compressed": layer.size,
        "length": layer.size,
        "files": files_of(layer.data),
        "algorithm": 2,
        "max_span": len(starts) - 1,
        "digests": span_digests(layer.data, starts, [*starts[1:], layer.size]),
        "checkpoints": tar_zinfo(span, layer.size),
    }
    return ztoc(**fields)


def tar_zinfo(span: int, size: int) -> bytes:
    builder = flatbuffers.Builder(0)
    builder.StartObject(3)
    builder.PrependInt32Slot(0, 2, 0)
    builder.PrependInt64Slot(1, span, 0)
    builder.PrependInt64Slot(2, size, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def ztoc(
    *,
    compressed: int,
    length: int,
    files: Sequence[File],
    algorithm: int,
    max_span: int,
    digests: Sequence[str],
    checkpoints: bytes,
) -> bytes:
    builder = flatbuffers.Builder(0)
    version, tool = builder.CreateString("0.9"), builder.CreateString("tests")
    metadata = _vector(builder, [_file(builder, file) for file in files])
    toc = _object(builder, 1, [(0, builder.PrependUOffsetTRelativeSlot, metadata)])
    points = builder.CreateByteVector(checkpoints)
    spans = _vector(builder, [builder.CreateString(digest) for digest in digests])
    builder.StartObject(4)
    builder.PrependSlot(Int8Flags, 0, algorithm, 1)
    builder.PrependSlot(Int32Flags, 1, max_span, 0)
    builder.PrependUOffsetTRelativeSlot(2, spans, 0)
    builder.PrependUOffsetTRelativeSlot(3, points, 0)
    info = builder.EndObject()
    builder.StartObject(6)
    builder.PrependUOffsetTRelativeSlot(0, version, 0)
    builder.PrependUOffsetTRelativeSlot(1, tool, 0)
    builder.PrependSlot(Int64Flags, 2, compressed, 0)
    builder.PrependSlot(Int64Flags, 3, length, 0)
    builder.PrependUOffsetTRelativeSlot(4, toc, 0)
    builder.PrependUOffsetTRelativeSlot(5, info, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def _file(builder: flatbuffers.Builder, file: File) -> int:
    strings = {}
    for field, key in ((0, "name"), (1, "type"), (4, "link"), (10, "time")):
        strings[field] = builder.CreateString(file[key], "utf-8", "surrogateescape")
    records = []
    for key, value in sorted(file["pax"].items()):
        pair = [builder.CreateString(text, "utf-8", "surrogateescape") for text in (key, value)]
        records.append(_object(builder, 2, [(i, builder.PrependUOffsetTRelativeSlot, at) for i, at in enumerate(pair)]))
    pax = _vector(builder, records)
    builder.StartObject(14)
    for field, at in strings.items():
        builder.PrependUOffsetTRelativeSlot(field, at, 0)
    for field, key in ((2, "offset"), (3, "size"), (5, "mode"), (11, "major"), (12, "minor")):
        builder.PrependSlot(Int64Flags, field, file[key], 0)
    builder.PrependSlot(Uint32Flags, 6, file["uid"], 0)
    builder.PrependSlot(Uint32Flags, 7, file["gid"], 0)
    builder.PrependUOffsetTRelativeSlot(13, pax, 0)
    return int(builder.EndObject())


def _vector(builder: flatbuffers.Builder, items: Sequence[int]) -> int:
    builder.StartVector(4, len(items), 4)
    for item in reversed(items):
        builder.PrependUOffsetTRelative(item)
    return int(builder.EndVector())


def _object(
    builder: flatbuffers.Builder, fields: int, slots: Sequence[tuple[int, Callable[[int, int, int], None], int]]
) -> int:
    builder.StartObject(fields)
    for field, prepend, at in slots:
        prepend(field, at, 0)
    return int(builder.EndObject())


def soci_index(
    layers: Sequence[tuple[BytesBlob, bytes]], *, version: int, subject: dict[str, Any] | None = None
) -> bytes:
    """The manifest of a SOCI index for layers with their zTOCs."""
    described = [
        {
            "mediaType": "application/octet-stream",
            "digest": f"sha256:{hashlib.sha256(document).hexdigest()}",
            "size": len(document),
            "annotations": {
                "com.amazon.soci.image-layer-digest": str(layer.descriptor.digest),
                "com.amazon.soci.image-layer-mediaType": layer.descriptor.media_type,
                "com.amazon.soci.span-size": str(256 * KiB),
            },
        }
        for layer, document in layers
    ]
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": V1 if version == 1 else V2,
            "digest": f"sha256:{hashlib.sha256(b'{}').hexdigest()}",
            "size": 2,
        },
        "layers": described,
        "annotations": {"com.amazon.soci.build-tool-identifier": "AWS SOCI CLI v0.2"},
    }
    if subject is not None:
        manifest["subject"] = subject
    return json.dumps(manifest).encode()
