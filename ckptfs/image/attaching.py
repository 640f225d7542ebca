"""Attaching documents to an image that is in a registry already: an artifact whose subject is the image.

image-spec manifest.md, "Guidelines for Artifact Usage"; distribution-spec, "Listing Referrers". The image is not
changed. Where it goes comes from the caller. Blocks; called by publishing.py and profiles.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ckptfs.model.blob import Blob, MemoryBlob
from ckptfs.model.oci import OCI_MANIFEST, Descriptor, Digest, Manifest

_EMPTY = b"{}"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"  # image-spec manifest.md, "Guidance for an Empty Descriptor"


class Sink(Protocol):
    """Where artifacts go: a part of push.target.Target."""

    def has(self, descriptor: Descriptor) -> bool: ...
    def put_blob(self, descriptor: Descriptor, blob: Blob, sent: Callable[[int], None]) -> None: ...
    def put_manifest(self, raw: bytes, media_type: str, tag: str) -> Digest: ...


@dataclass(frozen=True, slots=True)
class Attached:
    """`manifest` names the artifact; `sent` bytes of blobs were not there yet."""

    manifest: Descriptor
    sent: int


def attach(
    sink: Sink,
    image: Manifest,
    artifact_type: str,
    documents: Sequence[tuple[Descriptor, bytes]],
    annotations: Mapping[str, str] | None = None,
) -> Attached:
    """Publish `documents` as one artifact, blobs first. The same documents and annotations give the same artifact."""
    empty = Descriptor(_EMPTY_TYPE, Digest.of(_EMPTY), len(_EMPTY))
    sent = 0
    for descriptor, data in ((empty, _EMPTY), *documents):
        if not sink.has(descriptor):
            sink.put_blob(descriptor, MemoryBlob(descriptor, data), _nothing)
            sent += descriptor.size
    artifact: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": empty.to_json(),
        "layers": [descriptor.to_json() for descriptor, _ in documents],
        "subject": Descriptor(image.media_type, image.digest, len(image.raw)).to_json(),
    }
    if annotations:
        artifact["annotations"] = dict(annotations)
    raw = json.dumps(artifact, separators=(",", ":")).encode()
    digest = sink.put_manifest(raw, OCI_MANIFEST, "")
    return Attached(Descriptor(OCI_MANIFEST, digest, len(raw), annotations or {}, artifact_type), sent)


def _nothing(count: int) -> None:
    pass
