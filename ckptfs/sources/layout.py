"""Images in an OCI image layout on this machine (image-spec image-layout.md): index.json and blobs/ALGORITHM/HEX."""

import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from ckptfs.errors import CkptfsError, FormatError, IntegrityError, LimitExceeded, NotFoundError, UnavailableError
from ckptfs.model.blob import Blob
from ckptfs.model.oci import ANNOTATION_REF_NAME, Descriptor, Index, Manifest, Reference, parse_document
from ckptfs.settings import Limits, MiB


class LayoutSource:
    """The images of `oci:DIR[:TAG]`. Without a tag the only one; a digest picks whatever blob has it."""

    def __init__(self, reference: Reference, limits: Limits | None = None) -> None:
        self._reference = reference
        self._limits = limits or Limits()
        self._top = Path(reference.path)

    @property
    def reference(self) -> Reference:
        return self._reference

    def resolve(self) -> Manifest | Index:
        reference = self._reference
        if not self._top.is_dir():
            raise NotFoundError(f"there is no directory {self._top}", hint="name an OCI image layout: oci:DIR[:TAG]")
        index_raw = self._small(self._top / "index.json", self._limits.manifest_bytes, "index.json")
        index = parse_document(index_raw, "application/vnd.oci.image.index.v1+json")
        if not isinstance(index, Index):
            raise FormatError(f"{self._top}/index.json is not an index", hint="is this an OCI image layout?")
        if reference.digest is not None:
            raw = self._small(self._path_of(str(reference.digest)), self._limits.manifest_bytes, "manifest")
            reference.digest.check(raw, "the manifest")
            return parse_document(raw)
        named = [m for m in index.manifests if m.annotations.get(ANNOTATION_REF_NAME) == reference.tag]
        found = named if reference.tag else list(index.manifests)
        tags = sorted({m.annotations.get(ANNOTATION_REF_NAME, "") for m in index.manifests} - {""})
        offered = f"it has {', '.join(tags)}" if tags else "none of its images has a tag"
        if not found:
            raise NotFoundError(f"{self._top} has no image {reference.tag or ''}".rstrip(), hint=offered)
        if len(found) > 1:
            raise NotFoundError(f"{self._top} has {len(found)} images", hint=f"name one, oci:DIR:TAG; {offered}")
        return parse_document(self.fetch(found[0]), found[0].media_type)

    def fetch(self, descriptor: Descriptor) -> bytes:
        raw = self._small(self._path_of(str(descriptor.digest)), self._limits.config_bytes, "document")
        if len(raw) != descriptor.size:
            raise IntegrityError(f"blob {descriptor.digest} has {len(raw)} bytes, not {descriptor.size}")
        descriptor.digest.check(raw, "the blob")
        return raw

    def blob(self, descriptor: Descriptor) -> Blob:
        return FileBlob(self._path_of(str(descriptor.digest)), descriptor)

    def _path_of(self, digest: str) -> Path:
        algorithm, _, hexadecimal = digest.partition(":")
        return self._top / "blobs" / algorithm / hexadecimal

    def _small(self, path: Path, limit: int, what: str) -> bytes:
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise LimitExceeded(f"{path.name}: the {what} has {size} bytes, more than {limit}")
            return file.read(limit)


class FileBlob:
    """A blob that is a regular file of exactly the descriptor's size; opened on first use, closed with the object."""

    def __init__(self, path: Path, descriptor: Descriptor) -> None:
        self._path = path
        self._descriptor = descriptor
        self._fd = -1

    @property
    def descriptor(self) -> Descriptor:
        return self._descriptor

    @property
    def size(self) -> int:
        return self._descriptor.size

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        fd = self._open()
        parts = []
        while length:
            try:
                part = os.pread(fd, length, offset)
            except OSError as error:
                raise UnavailableError(f"blob {self._descriptor.digest}: {error.strerror}") from None
            if not part:
                raise IntegrityError(f"blob {self._descriptor.digest} ends {length} bytes early")
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def stream(self, offset: int, length: int, *, attempt: int = 0) -> Iterator[bytes]:
        for at in range(offset, offset + length, MiB):
            yield self.read_at(at, min(MiB, offset + length - at))

    def _open(self) -> int:
        if self._fd < 0:
            with _opened(self._path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != self._descriptor.size:
                    digest = self._descriptor.digest
                    raise IntegrityError(f"blob {digest} has {size} bytes, the descriptor says {self._descriptor.size}")
                self._fd = os.dup(file.fileno())
        return self._fd

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _opened(path: Path) -> FileIO:
    """A regular file, not a symlink: a layout from elsewhere must not make us read other files of this machine."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}", hint="is the layout complete?") from None
    except OSError as error:
        raise _cannot(path, error) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(f"{path} is not a regular file")
    return FileIO(fd, "rb")


def _cannot(path: Path, error: OSError) -> CkptfsError:
    return FormatError(f"{path} cannot be read: {error.strerror}")
