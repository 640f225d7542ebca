"""A checkpoint archive as a blob: podman's export, the kubelet's tar; plain, gzip or zstd, whatever its name says."""

import hashlib
import os
from pathlib import Path

from ckptfs.errors import FormatError, NotFoundError, UnavailableError
from ckptfs.layers.compression import MAGIC_BYTES, sniff
from ckptfs.model.blob import DescribedBlob
from ckptfs.model.oci import ANNOTATION_SYNTHETIC, Descriptor, Digest

_TAR = "application/vnd.oci.image.layer.v1.tar"


class FileBlob(DescribedBlob):
    """Bytes of a local file, which must not change while it is open. Any thread may read."""

    def __init__(self, path: Path, media_type: str = "") -> None:
        """Without `media_type` the first bytes tell. A compressed file is read once more: streams are checked."""
        self._name = str(path)
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise NotFoundError(f"cannot read {path}: {error.strerror}") from None
        try:
            super().__init__(self._describe(media_type))
        except BaseException:
            self._file.close()
            raise

    def _describe(self, media_type: str) -> Descriptor:
        try:
            status = os.fstat(self._file.fileno())
            compression = sniff(os.pread(self._file.fileno(), MAGIC_BYTES, 0))
            synthetic = compression == "none"  # nothing is compared with its digest, it only names the chunks
            if synthetic:
                digest = Digest.of(f"{self._name}/{status.st_size}/{status.st_mtime_ns}".encode())
            else:
                digest = Digest("sha256", hashlib.file_digest(self._file, "sha256").hexdigest())
        except OSError as error:
            raise NotFoundError(f"cannot read {self._name}: {error.strerror}") from None
        if not status.st_size:
            raise FormatError(f"{self._name} is empty", hint="was the checkpoint written to the end?")
        kind = media_type or (_TAR if compression == "none" else f"{_TAR}+{compression}")
        return Descriptor(kind, digest, status.st_size, {ANNOTATION_SYNTHETIC: "file"} if synthetic else {})

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        try:
            data = os.pread(self._file.fileno(), length, offset)
        except OSError as error:
            raise UnavailableError(f"cannot read {self._name}: {error.strerror}", permanent=True) from None
        if len(data) != length:
            raise FormatError(f"{self._name} ends {length - len(data)} bytes early", hint="was it changed meanwhile?")
        return data

    def close(self) -> None:
        self._file.close()
