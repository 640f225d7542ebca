"""The documents of M: image config, index, manifest. The same checkpoint gives the same bytes.

image-spec config.md and manifest.md. No history, no build time: `created` is the time of the dump. Makes documents;
publishes nothing.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ckptfs.layers.zstd_chunked_writer import CHUNK_DIGEST, WrittenLayer
from ckptfs.model.index import INLINE_BYTES, IndexedFile, IndexedLayer, encode_index
from ckptfs.model.oci import OCI_MANIFEST, Descriptor, Digest, machine_architecture
from ckptfs.model.times import BILLION, rfc3339
from ckptfs.model.toc import Entry
from ckptfs.push.checkpoint_files import Checkpoint
from ckptfs.push.pages import PagesFile
from ckptfs.push.plan import PlannedLayer
from ckptfs.settings import KiB, Limits, MiB

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"

_SMALL = 256 * KiB  # a metadata file up to here has its content in the index, as long as all of it fits
_CONTENTS = 8 * MiB  # of content before compression, in all
_INLINE = INLINE_BYTES // 4 * 3  # bytes that base64 makes INLINE_BYTES of


@dataclass(frozen=True, slots=True)
class BuiltLayer:
    planned: PlannedLayer
    written: WrittenLayer


def encode_config(checkpoint: Checkpoint, diff_ids: Iterable[Digest]) -> bytes:
    """The image config: runnable in form, with nothing to run."""
    return to_json(
        {
            "created": created(checkpoint),
            "architecture": checkpoint.architecture or machine_architecture(),
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [str(digest) for digest in diff_ids]},
        }
    )


def encode_manifest(config: Descriptor, layers: Iterable[Descriptor], annotations: Mapping[str, str]) -> bytes:
    return to_json(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in layers],
            "annotations": {key: annotations[key] for key in sorted(annotations)},
        }
    )


def encode_inline_index(
    layers: Sequence[BuiltLayer],
    pages: Mapping[bytes, PagesFile],
    limits: Limits,
    reused: Sequence[IndexedLayer] = (),
) -> str | None:
    """The value of `dev.ckptfs.index`; None when it does not fit even without contents: every layer has its own TOC.

    The chunks of very large files are left to their layers. `reused` layers of another image come first.
    """
    eager = {path: file.eager() for path, file in pages.items()}
    for contents in (_CONTENTS, 512 * KiB, 0):
        document = encode_index(chain(reused, (_indexed(layer, eager, contents, limits) for layer in layers)))
        if len(document) <= _INLINE:
            return base64.b64encode(document).decode()
    return None


def created(checkpoint: Checkpoint) -> str:
    """When CRIU wrote the inventory, else the newest file: RFC 3339, whole seconds."""
    dumped = [file.inode.mtime_ns for file in checkpoint.files if file.name == b"inventory.img"]
    newest = max(dumped or [file.inode.mtime_ns for file in checkpoint.files if file.is_regular] or [0])
    return rfc3339(max(newest, 0) // BILLION * BILLION)


def to_json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _indexed(
    layer: BuiltLayer,
    eager: Mapping[bytes, list[tuple[int, int]] | None],
    contents: int,
    limits: Limits,
) -> IndexedLayer:
    written = {file.path: file for file in layer.written.files}
    chosen = _with_content(layer.planned, contents)
    files = []
    for file in layer.planned.files:
        entry = Entry(file.path, None if file.link is not None else file.inode, file.link)
        at = written.get(file.path)
        if at is None or not at.chunks:
            files.append(IndexedFile(entry, eager=eager.get(file.path)))
            continue
        content = file.read(limits.criu_image_bytes) if file.path in chosen else None
        rows = list(at.rows()) if at.chunk_table is None else ()
        ranges = eager.get(file.path)
        files.append(IndexedFile(entry, at.offset, rows, content, at.chunk_table, at.cell_table, ranges))
    return IndexedLayer(layer.written.descriptor.digest, layer.written.descriptor.size, files, CHUNK_DIGEST)


def _with_content(layer: PlannedLayer, budget: int) -> set[bytes]:
    """The metadata files whose content goes along: the smallest first, as many as the budget takes."""
    if layer.role != "meta":
        return set()
    small = [file for file in layer.files if file.is_regular and 0 < file.inode.size <= _SMALL]
    chosen = set()
    for file in sorted(small, key=lambda file: (file.inode.size, file.path)):
        budget -= file.inode.size
        if budget < 0:
            break
        chosen.add(file.path)
    return chosen
