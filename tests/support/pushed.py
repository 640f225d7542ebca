"""Images and artifacts put into a registry document by document, as other tools put them there."""

import json
from collections.abc import Sequence
from typing import Any

from ckptfs.model.blob import Blob
from ckptfs.model.oci import OCI_MANIFEST, Descriptor, Digest, Reference
from ckptfs.settings import Settings
from ckptfs.sources.upload import RegistryTarget
from ckptfs.telemetry import NetworkCounters
from tests.support.blobs import BytesBlob, blob_of
from tests.support.docker_registry import DockerRegistry

CONFIG = "application/vnd.oci.image.config.v1+json"


def target(registry: DockerRegistry, repository: str) -> RegistryTarget:
    reference = Reference.parse(registry.reference(f"{repository}:any"))
    return RegistryTarget(reference, Settings(), NetworkCounters())


def push_blobs(sink: RegistryTarget, blobs: Sequence[Blob]) -> None:
    for blob in blobs:
        if not sink.has(blob.descriptor):
            sink.put_blob(blob.descriptor, blob, lambda count: None)


def push_image(
    sink: RegistryTarget, tag: str, layers: Sequence[BytesBlob], annotations: dict[str, str] | None = None
) -> Descriptor:
    """An image of these layers; its descriptor."""
    config = blob_of(json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {}}).encode(), CONFIG)
    push_blobs(sink, [config, *layers])
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": config.descriptor.to_json(),
        "layers": [layer.descriptor.to_json() for layer in layers],
    }
    if annotations:
        document["annotations"] = annotations
    raw = json.dumps(document).encode()
    return Descriptor(OCI_MANIFEST, sink.put_manifest(raw, OCI_MANIFEST, tag), len(raw))


def push_artifact(sink: RegistryTarget, raw: bytes, documents: Sequence[bytes], tag: str = "") -> Digest:
    """A manifest made elsewhere, with its blobs."""
    empty = blob_of(b"{}", "application/json")
    push_blobs(sink, [empty, *(blob_of(document, "application/octet-stream") for document in documents)])
    return sink.put_manifest(raw, OCI_MANIFEST, tag)
