"""OCI layouts on disk, blob by blob, for tests of what reads them."""

import json
from pathlib import Path

from ckptfs.model.oci import ANNOTATION_REF_NAME, OCI_INDEX, OCI_MANIFEST, Digest
from tests.support.blobs import TAR

CONFIG = "application/vnd.oci.image.config.v1+json"


class Layout:
    """An OCI layout that a test fills."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.entries: list[dict[str, object]] = []
        (top / "blobs" / "sha256").mkdir(parents=True)
        (top / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def blob(self, data: bytes, media_type: str) -> dict[str, object]:
        digest = Digest.of(data)
        (self.top / "blobs" / "sha256" / digest.hex).write_bytes(data)
        return {"mediaType": media_type, "digest": str(digest), "size": len(data)}

    def manifest(self, *layers: bytes, architecture: str = "amd64") -> dict[str, object]:
        config = json.dumps({"architecture": architecture, "os": "linux"}).encode()
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self.blob(config, CONFIG),
            "layers": [self.blob(layer, TAR) for layer in layers],
        }
        return self.blob(json.dumps(document).encode(), OCI_MANIFEST)

    def index(self, *manifests: dict[str, object]) -> dict[str, object]:
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(manifests)}
        return self.blob(json.dumps(document).encode(), OCI_INDEX)

    def tag(self, entry: dict[str, object], tag: str) -> None:
        self.entries.append({**entry, "annotations": {ANNOTATION_REF_NAME: tag}})
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": self.entries}
        (self.top / "index.json").write_text(json.dumps(document))
