"""containerd's own checkpoints (`ctr container checkpoint`): an index whose manifests are raw blobs.

As it is in an OCI layout, or nested: the layout's files in an image or an archive. The blobs become the flat layout:
the CRIU tar is checkpoint/, the rw layer rootfs-diff.tar, the config's JSON spec.dump. Sources: client/
container_checkpoint_opts.go and core/images/mediatypes.go of containerd. Called by push/__init__.py.
"""

import io
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from ckptfs.errors import FormatError
from ckptfs.image.views import CONTAINERD_CONFIG, CRIU_TAR, index_entries, is_checkpoint_index, spec_of
from ckptfs.layers.zstd_chunked_writer import Payload
from ckptfs.model.annotations import BASE_NAME
from ckptfs.model.blob import Blob, HashedStream
from ckptfs.model.oci import (
    ANNOTATION_REF_NAME,
    OCI_INDEX,
    Descriptor,
    Digest,
    Index,
    Manifest,
    parse_document,
)
from ckptfs.model.toc import Inode
from ckptfs.push.checkpoint_files import CheckpointFile
from ckptfs.push.image_files import LayerFiles, kept_annotations
from ckptfs.push.spool import PiecesPayload, Work, keep
from ckptfs.settings import Settings
from ckptfs.sources import Source

_LAYER = "application/vnd.oci.image.layer.v1.tar"

Found = tuple[list[CheckpointFile], Mapping[str, str]]


def nested(files: Sequence[CheckpointFile], work: Work, settings: Settings) -> Found | None:
    """Files and annotations of the checkpoint in an OCI layout that `files` are; None when they hold none."""
    every = {file.path: file for file in files if file.is_regular}
    index = every.get(b"index.json")
    if index is None or b"oci-layout" not in every:
        return None

    def document(digest: Digest) -> bytes:
        raw = _file(every, digest).read(settings.limits.manifest_bytes)
        digest.check(raw, "a document of the layout in the source")
        return raw

    def blob(descriptor: Descriptor) -> Blob:
        spool = work.spool()
        keep(_file(every, descriptor.digest), spool, descriptor.media_type)
        if spool.descriptor.digest != descriptor.digest:
            raise FormatError(f"blob {descriptor.digest} of the layout in the source has another digest")
        return spool

    raw = index.read(settings.limits.manifest_bytes)
    for _ in range(settings.limits.index_depth):
        entries = index_entries(raw)
        if is_checkpoint_index(entries):
            flat = _flat(entries, blob, index.inode.mtime_ns, work, settings)
            return flat, _annotations(parse_document(raw, OCI_INDEX))
        if not entries:
            return None
        raw = document(entries[0].digest)
        if not isinstance(parse_document(raw, entries[0].media_type), Index):
            return None
    return None


def raw_blobs(index: Index, source: Source, work: Work, settings: Settings) -> Found:
    """Files and annotations of the checkpoint whose raw blobs `index` lists."""
    return _flat(index.manifests, source.blob, 0, work, settings), _annotations(index)


def _flat(
    descriptors: Sequence[Descriptor], blob: Callable[[Descriptor], Blob], mtime_ns: int, work: Work, settings: Settings
) -> list[CheckpointFile]:
    """`mtime_ns` for the files that are made here: their blobs have no time of their own."""
    files: dict[bytes, CheckpointFile] = {}
    for descriptor in descriptors:
        if descriptor.media_type == CRIU_TAR:
            opened = work.enter(LayerFiles([blob(descriptor)], work.directory, settings))
            for file in opened.files():
                path = b"checkpoint/" + file.path if file.path else b"checkpoint"
                link = b"checkpoint/" + file.link if file.link is not None else None
                files[path] = CheckpointFile(path, file.inode, link, file.open)
        elif descriptor.media_type == CONTAINERD_CONFIG:
            if descriptor.size > settings.limits.dump_bytes:
                raise FormatError(f"containerd's config blob has {descriptor.size} bytes")
            raw = blob(descriptor).read_at(0, descriptor.size)
            descriptor.digest.check(raw, "containerd's config blob")
            spec = spec_of(raw)
            inode = Inode(stat.S_IFREG | 0o600, size=len(spec), mtime_ns=mtime_ns)
            files[b"spec.dump"] = CheckpointFile(b"spec.dump", inode, open=partial(io.BytesIO, spec))
        elif descriptor.media_type.startswith(_LAYER):
            inode = Inode(stat.S_IFREG | 0o600, size=descriptor.size, mtime_ns=mtime_ns)
            files[b"rootfs-diff.tar"] = CheckpointFile(
                b"rootfs-diff.tar", inode, open=partial(_content, blob(descriptor))
            )
    return [files[path] for path in sorted(files)]


def _annotations(index: Index | Manifest) -> dict[str, str]:
    """ctr names the base image where others name the image itself."""
    notes = kept_annotations(index.annotations)
    base = notes.pop(ANNOTATION_REF_NAME, "")
    return notes | ({BASE_NAME: base} if base else {})


def _content(blob: Blob) -> Payload:
    return PiecesPayload(_checked(blob))


def _checked(blob: Blob) -> Iterator[bytes | memoryview]:
    """The blob in pieces, the last one only when all of them have the digest: nobody asks for more behind it."""
    pieces, arrived = HashedStream(blob), 0
    for piece in pieces:
        arrived += len(piece)
        if arrived == blob.size:
            pieces.check()
        yield piece


def _file(every: dict[bytes, CheckpointFile], digest: Digest) -> CheckpointFile:
    file = every.get(f"blobs/{digest.algorithm}/{digest.hex}".encode())
    if file is None:
        raise FormatError(f"the layout in the source has no blob {digest}", hint="it was cut short")
    return file
