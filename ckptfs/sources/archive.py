"""A checkpoint archive, FILE.tar[.gz|.zst], as an image of one layer.

The sha256 of 4 GB takes 2 s and reads all of it, so the layer's digest is a name instead: the hash of the file's path,
device, inode, size and time of last change. It is marked as synthetic, so that no bytes are compared with it, and it
changes with the file, so that the node's cache keeps no stale chunk.
"""

import hashlib
import json
from pathlib import Path

from ckptfs.errors import FormatError, IntegrityError, NotFoundError
from ckptfs.model.blob import Blob
from ckptfs.model.oci import (
    ANNOTATION_SYNTHETIC,
    OCI_MANIFEST,
    Descriptor,
    Digest,
    Index,
    Manifest,
    Reference,
    parse_document,
)
from ckptfs.sources.files import FileBlob, OpenFile, open_file

_TAR = "application/vnd.oci.image.layer.v1.tar"
_EMPTY = b"{}"
_CONFIG = Descriptor("application/vnd.oci.empty.v1+json", Digest.of(_EMPTY), len(_EMPTY))
_BLOCK = 512  # of a tar: an archive is at least one


class ArchiveSource:
    """The image of `archive:FILE`: an empty config and the file as the only layer."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._file: OpenFile | None = None

    @property
    def reference(self) -> Reference:
        return self._reference

    def resolve(self) -> Manifest | Index:
        """A manifest of our own making. NotFoundError, or FormatError where the file cannot be a tar."""
        layer = self._layer()
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": _CONFIG.to_json(),
            "layers": [layer.to_json()],
        }
        manifest = parse_document(json.dumps(document, separators=(",", ":")).encode())
        if self._reference.digest not in (None, manifest.digest):
            raise IntegrityError(f"{self._reference.path} is not the file any more that it was", hint="mount it again")
        assert isinstance(manifest, Manifest)
        return manifest._replace(layers=(layer,))

    def fetch(self, descriptor: Descriptor) -> bytes:
        if descriptor.digest != _CONFIG.digest:
            raise NotFoundError(f"{self._reference.path} is an archive and has no {descriptor.media_type}")
        return _EMPTY

    def blob(self, descriptor: Descriptor) -> Blob:
        if descriptor.digest != self._layer().digest:
            raise NotFoundError(f"{self._reference.path} is not the file any more that it was", hint="mount it again")
        return FileBlob(self._opened, descriptor)

    def _opened(self) -> OpenFile:
        if self._file is None:
            self._file = open_file(Path(self._reference.path))
        return self._file

    def _layer(self) -> Descriptor:
        file = self._opened()
        is_ = file.identity
        if is_.size < _BLOCK and not file.read(0, is_.size).startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
            raise FormatError(f"{file.name} is too short for a tar", hint="was the checkpoint written to the end?")
        name = f"{Path(file.name).absolute()}/{is_.device}/{is_.inode}/{is_.size}/{is_.mtime_ns}"
        digest = Digest("sha256", hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest())
        return Descriptor(_TAR + _suffix(file), digest, is_.size, {ANNOTATION_SYNTHETIC: "file"})


def _suffix(file: OpenFile) -> str:
    """The compression by the first bytes, whatever the file's name says."""
    head = file.read(0, min(6, file.identity.size))
    if head.startswith(b"\x1f\x8b"):
        return "+gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return "+zstd"
    if head.startswith((b"\xfd7zXZ\0", b"BZh")):
        raise FormatError(f"{file.name} is compressed with xz or bzip2", hint="use gzip, zstd or no compression")
    return ""
