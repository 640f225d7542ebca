"""eStargz layers: a gzip member for each file or chunk, and a table of contents in the last one.

The footer names the table's place, the manifest's annotation its digest (stargz-snapshotter docs/estargz.md). A layer
without that annotation is read as plain gzip. Landmarks and stargz.index.json are files like others: an extraction by
tools that know nothing of eStargz shows them too. The table can also be in an image of its own, <tag>-esgztoc
(`ExternalTable`): the footer says so, and the digest in the manifest covers it all the same.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.layers.compression import Bytes, gunzip_chunk, gunzipped
from ckptfs.layers.media_types import compression_of
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.layers.toc_layer import ANNOTATION_TOC_DIGEST, TocLayer
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor, Digest
from ckptfs.model.toc import Chunk, Entry, Extent
from ckptfs.settings import Settings

_INDEX = b"stargz.index.json"
_EMPTY_MEMBER = b"\x1f\x8b\x08\x04"  # gzip, deflate, FEXTRA
# Length of the footer -> its extra field: what stands before and after the 16 hexadecimal digits of the offset.
_FOOTERS = {51: (b"\x1a\x00SG\x16\x00", b"STARGZ"), 47: (b"\x16\x00", b"STARGZ")}
_EXTERNAL = (46, b"STARGZEXTERNALTOC")
_EXTRA = 10  # where the extra field begins


class EStargzFormat:
    name = "estargz"

    def matches(self, descriptor: Descriptor) -> bool:
        return compression_of(descriptor.media_type) == "gzip" and ANNOTATION_TOC_DIGEST in descriptor.annotations

    def open(self, blob: Blob, layer: int, settings: Settings) -> "EStargzLayer":
        return EStargzLayer(blob, layer, settings)


class ExternalTable(NamedTuple):
    """A side document for any eStargz layer: where its table is to be had if it is not in the layer.

    `fetch` gives the compressed archive with the table; called, in a worker thread, only when the footer says so.
    """

    fetch: Callable[[], bytes]
    settings: Settings

    def open(self, blob: Blob, layer: int) -> "EStargzLayer":
        return EStargzLayer(blob, layer, self.settings, self.fetch)


class EStargzLayer(TocLayer):
    format = "estargz"
    stream = "gzip"
    entries: Sequence[Entry] | None = None

    def __init__(self, blob: Blob, layer: int, settings: Settings, external: Callable[[], bytes] | None = None) -> None:
        super().__init__(blob, layer, settings)
        self.table = blob.descriptor.annotations[ANNOTATION_TOC_DIGEST]
        self._digest = Digest.parse(self.table)
        self._external = external

    def _table(self, attempt: int) -> tuple[bytes, int, list[Entry]]:
        blob, limits = self._blob, self._settings.limits
        start = max(0, blob.size - self._settings.sizes.toc_guess)
        tail = blob.read_at(start, blob.size - start, attempt=attempt) if blob.size else b""
        if self._external is not None and _is_external(tail):
            text, _, _ = self._unpacked(memoryview(self._external()))
            return text, blob.size - _EXTERNAL[0], []
        offset, footer = _find_table(tail, blob.size)
        if footer - offset > limits.toc_compressed_bytes:
            raise LimitExceeded(f"the eStargz table of contents has {footer - offset} bytes")
        if offset < start:
            tail = blob.read_at(offset, start - offset, attempt=attempt) + tail
            start = offset
        text, entry, position = self._unpacked(memoryview(tail)[offset - start : footer - start])
        if entry.inode is not None:
            entry.inode.extents = self._index_extents(text, position, offset, footer)
        return text, offset, [entry]

    def _unpacked(self, member: memoryview) -> tuple[bytes, Entry, int]:
        """The table out of its compressed archive, its digest checked; the file that it is there, and its place."""
        limits = self._settings.limits
        archive = bytearray()
        for piece in gunzipped(iter((member,)), 1 << 20, limits):
            archive += piece
            if len(archive) > limits.toc_bytes:
                raise LimitExceeded(f"the eStargz table of contents has more than {limits.toc_bytes} bytes")
        place = _Place()
        found = TarScanner(place, limits, len(archive)).feed(memoryview(archive))
        if len(found) != 1 or found[0].path != _INDEX or found[0].inode is None or len(place.segments) != 1:
            raise FormatError(f"the eStargz table of contents is not {_INDEX.decode()}")
        ((_, length, position),) = place.segments
        text = bytes(memoryview(archive)[position : position + length])
        self._digest.check(text, f"the table of contents of layer {self._blob.descriptor.digest}")
        return text, found[0], position

    def _index_extents(self, text: bytes, position: int, offset: int, footer: int) -> tuple[Extent, ...]:
        """The table as a file of the layer: chunks of its gzip member."""
        step = self._settings.sizes.sequential_extent
        extents = []
        for low in range(0, len(text), step):
            digest = hashlib.sha256(text[low : low + step]).digest()
            length = min(step, len(text) - low)
            chunk = Chunk(digest, self._layer, offset, footer - offset, length, digest, position + low)
            extents.append(Extent(low, length, chunk))
        return tuple(extents)

    def _unpack(self, chunk: Chunk, data: memoryview) -> Bytes:
        return gunzip_chunk(data, chunk.inner, chunk.length, self._settings.limits)


class _Place:
    """Where the only file of a tar lies."""

    def __init__(self) -> None:
        self.segments: Sequence[tuple[int, int, int]] = ()

    def extents(self, segments: Sequence[tuple[int, int, int]]) -> Sequence[Extent]:
        self.segments = segments
        return ()


def _find_table(tail: bytes, size: int) -> tuple[int, int]:
    """The positions of the table's gzip member and of the footer behind it, from the blob's last bytes."""
    for length, (before, after) in _FOOTERS.items():
        footer = tail[-length:]
        digits = footer[_EXTRA + len(before) :][:16]
        if not footer.startswith(_EMPTY_MEMBER) or footer[_EXTRA:][: len(before) + 22] != before + digits + after:
            continue
        try:
            offset = int(digits, 16)
        except ValueError:
            break
        if not 0 < offset < size - length:
            raise FormatError("the eStargz footer points outside the layer")
        return offset, size - length
    if _is_external(tail):
        raise FormatError(
            "the table of contents of this eStargz layer is in an image of its own",
            hint="mount the image from the registry that has it, by its tag",
        )
    raise FormatError("the layer has an eStargz digest and no eStargz footer")


def _is_external(tail: bytes) -> bool:
    """Whether the footer says that the table is elsewhere."""
    return tail[-_EXTERNAL[0] :].startswith(_EMPTY_MEMBER) and _EXTERNAL[1] in tail[-_EXTERNAL[0] :]
