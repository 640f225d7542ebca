"""Images in an OCI image layout on this machine (image-spec image-layout.md): index.json and blobs/ALGORITHM/HEX."""

import os
from pathlib import Path

from ckptfs.errors import FormatError, LimitExceeded, NotFoundError
from ckptfs.model.blob import Blob
from ckptfs.model.oci import (
    ANNOTATION_REF_NAME,
    OCI_INDEX,
    Descriptor,
    Digest,
    Index,
    Manifest,
    Reference,
    parse_document,
)
from ckptfs.settings import Limits
from ckptfs.sources.documents import check_document, check_limit
from ckptfs.sources.files import FileBlob, OpenFile, open_inside, translated


class LayoutSource:
    """The images of `oci:DIR[:TAG][@DIGEST]`. Without a tag the only one; a digest picks whatever blob has it."""

    def __init__(self, reference: Reference, limits: Limits | None = None) -> None:
        self._reference = reference
        self._limits = limits or Limits()
        place = on_disk(reference)
        self._top, self._tag = Path(place.path), place.tag

    @property
    def reference(self) -> Reference:
        return self._reference

    def resolve(self) -> Manifest | Index:
        digest = self._reference.digest
        try:
            if not self._top.is_dir():
                raise NotFoundError(
                    f"there is no directory {self._top}", hint="name an OCI image layout: oci:DIR[:TAG]"
                )
        except OSError as error:
            raise translated(error, self._top) from None
        if digest is not None:
            raw = self._small(self._open(digest))
            digest.check(raw, f"{self._top}: {digest}")
            return parse_document(raw, digest=digest)
        chosen = self._chosen()
        return parse_document(self.fetch(chosen), chosen.media_type, chosen.digest)

    def fetch(self, descriptor: Descriptor) -> bytes:
        check_limit(descriptor, self._limits)
        raw = self.blob(descriptor).read_at(0, descriptor.size)
        check_document(raw, descriptor, str(self._top))
        return raw

    def blob(self, descriptor: Descriptor) -> Blob:
        return FileBlob(lambda: self._open(descriptor.digest), descriptor)

    def _chosen(self) -> Descriptor:
        """The entry of index.json that has the tag, or the only one."""
        index = parse_document(self._small(open_inside(self._top, "index.json")), OCI_INDEX)
        if not isinstance(index, Index):
            raise FormatError(f"{self._top}/index.json is not an index", hint="is this an OCI image layout?")
        tag = self._tag
        found = [m for m in index.manifests if not tag or m.annotations.get(ANNOTATION_REF_NAME) == tag]
        tags = sorted({m.annotations.get(ANNOTATION_REF_NAME, "") for m in index.manifests} - {""})
        offered = f"it has {', '.join(tags)}" if tags else "none of its images has a tag"
        if not found:
            raise NotFoundError(f"{self._top} has no image {tag}".rstrip(), hint=offered)
        if len({m.digest for m in found}) > 1:
            raise NotFoundError(f"{self._top} has {len(found)} images", hint=f"name one, oci:DIR:TAG; {offered}")
        return found[0]

    def _open(self, digest: Digest) -> OpenFile:
        return open_inside(self._top, "blobs", digest.algorithm, digest.hex)

    def _small(self, file: OpenFile) -> bytes:
        size, limit = file.identity.size, self._limits.manifest_bytes
        if size > limit:
            raise LimitExceeded(f"{file.name} has {size} bytes, more than {limit}")
        return file.read(0, size)


def on_disk(reference: Reference) -> Reference:
    """`reference` cut where its directory ends: buildah and skopeo write names for tags, oci:DIR:localhost/app:1.

    As it is where no directory is there yet.
    """
    path, tag = reference.path, reference.tag
    while path and not os.path.isdir(path):
        path, _, name = path.rpartition(":")
        tag = f"{name}:{tag}" if tag else name
    return reference._replace(path=path, tag=tag) if path else reference
