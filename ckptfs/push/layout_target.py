"""An OCI image layout as the target: blobs first, then index.json in one rename.

image-spec image-layout.md. Writers that come at the same time wait for each other (flock), so none loses a tag.
"""

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ckptfs.errors import CacheError, FormatError
from ckptfs.model.blob import Blob, HashedStream
from ckptfs.model.oci import ANNOTATION_REF_NAME, OCI_INDEX, Descriptor, Digest, Reference, parse_json
from ckptfs.push.target import Sent

_PART = ".part-"  # what a file is called that is not whole
_STALE = 3600.0  # seconds after the last write to such a file for which it may still be somebody's
_VERSION = '{"imageLayoutVersion":"1.0.0"}'


class LayoutTarget:
    """A directory, made if it is missing."""

    def __init__(self, directory: Path) -> None:
        self._top = directory
        with _translated(directory):
            (directory / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
            marker = directory / "oci-layout"
            if not marker.exists():
                marker.write_text(_VERSION)
            _sweep(directory / "blobs" / "sha256")

    @property
    def reference(self) -> Reference:
        return Reference("oci", path=str(self._top))

    def has(self, descriptor: Descriptor) -> bool:
        try:
            return self._path(descriptor.digest).stat().st_size == descriptor.size
        except OSError:
            return False

    def mount(self, descriptor: Descriptor, repository: str) -> bool:
        return False

    def put_blob(self, descriptor: Descriptor, blob: Blob, sent: Sent) -> None:
        pieces = HashedStream(blob)
        with _translated(self._top), self._new(self._path(descriptor.digest)) as file:
            for piece in pieces:
                file.write(piece)
                sent(len(piece))
            pieces.check()

    def put_manifest(self, raw: bytes, media_type: str, tag: str) -> Digest:
        digest = Digest.of(raw)
        with _translated(self._top), self._locked():
            with self._new(self._path(digest)) as file:
                file.write(raw)
            index = self._index()
            names = {ANNOTATION_REF_NAME: tag} if tag else {}
            kept = [m for m in index["manifests"] if not _replaced(m, str(digest), tag)]
            described = Descriptor(media_type, digest, len(raw), names).to_json()
            index["manifests"] = [*kept, described]
            with self._new(self._top / "index.json") as file:
                file.write(json.dumps(index, separators=(",", ":")).encode())
        return digest

    def _index(self) -> dict[str, Any]:
        path = self._top / "index.json"
        if not path.exists():
            return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
        index = parse_json(path.read_bytes(), "index.json")
        if not isinstance(index, dict) or not isinstance(index.get("manifests"), list):
            raise FormatError(f"{path} is no image index", hint="name a new directory")
        return index

    def _path(self, digest: Digest) -> Path:
        return self._top / "blobs" / digest.algorithm / digest.hex

    @contextmanager
    def _new(self, path: Path) -> Iterator[Any]:
        """A file that appears under its name when it is whole, and not at all after an error."""
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_PART, delete=False) as file:
            try:
                yield file
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._top, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _sweep(directory: Path) -> None:
    """Remove what a process has left that was killed while it wrote."""
    for path in directory.glob(f"{_PART}*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


def _replaced(manifest: object, digest: str, tag: str) -> bool:
    """Whether the new entry takes the place of this one: the same tag, or the same image without a name."""
    if not isinstance(manifest, dict):
        return False
    notes = manifest.get("annotations")
    name = notes.get(ANNOTATION_REF_NAME, "") if isinstance(notes, dict) else ""
    return bool(name == tag and (tag or manifest.get("digest") == digest))


@contextmanager
def _translated(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(f"cannot write {directory}: {error.strerror}", hint="name a directory with room") from None
