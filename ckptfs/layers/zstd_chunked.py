"""zstd:chunked layers: frames that decompress by themselves, and a table of contents named by annotations.

Three spellings are in the wild, all read here: containers/storage (`io.github.containers.zstd-chunked.*`), its tools of
2022 (skopeo 1.9, buildah 1.28: `io.containers.zstd-chunked.*`), and the stargz snapshotter's (the same keys as those,
and its own digest of the table). The annotations are in the manifest and so covered by its digest; the footer says the
same again, is covered by nothing, and is not read.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ckptfs.errors import FormatError, IntegrityError, LimitExceeded
from ckptfs.layers.compression import Bytes, unzstd_chunk
from ckptfs.layers.media_types import compression_of
from ckptfs.layers.toc_layer import ANNOTATION_TOC_DIGEST, TocLayer
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor, Digest
from ckptfs.model.toc import Chunk, Entry
from ckptfs.settings import Limits, Settings

_STORAGE = "io.github.containers.zstd-chunked."
_OLD = "io.containers.zstd-chunked."
_CHECKSUM = "manifest-checksum"
_POSITION = "manifest-position"
ANNOTATION_CHECKSUM = _STORAGE + _CHECKSUM
_CRFS = 1  # the only type of table that is defined


class ZstdChunkedFormat:
    name = "zstd:chunked"

    def matches(self, descriptor: Descriptor) -> bool:
        return compression_of(descriptor.media_type) == "zstd" and _prefix(descriptor.annotations) is not None

    def open(self, blob: Blob, layer: int, settings: Settings) -> "ZstdChunkedLayer":
        return ZstdChunkedLayer(blob, layer, settings)


class TablePosition(NamedTuple):
    """`offset:length:decoded length:type` of the compressed table in the blob."""

    offset: int
    length: int
    decoded: int

    @classmethod
    def parse(cls, text: str, blob_size: int, limits: Limits) -> "TablePosition":
        numbers = text.split(":")
        if len(numbers) != 4 or not all(n.isascii() and n.isdigit() and len(n) < 20 for n in numbers):
            raise FormatError(f"{text[:80]!r} is not the position of a zstd:chunked table of contents")
        offset, length, decoded, kind = map(int, numbers)
        if kind != _CRFS:
            raise FormatError(f"the zstd:chunked table of contents has the type {kind}", hint="ckptfs reads type 1")
        if length > limits.toc_compressed_bytes or decoded > limits.toc_bytes:
            raise LimitExceeded(f"the zstd:chunked table of contents has {length} bytes, {decoded} decompressed")
        if not length or offset + length > blob_size:
            raise FormatError("the zstd:chunked table of contents lies outside its layer")
        return cls(offset, length, decoded)


class ZstdChunkedLayer(TocLayer):
    format = "zstd:chunked"
    stream = "zstd"

    def __init__(self, blob: Blob, layer: int, settings: Settings) -> None:
        """FormatError when the annotations are incomplete, contradict each other, or point outside the blob."""
        super().__init__(blob, layer, settings)
        annotations = blob.descriptor.annotations
        prefix = _prefix(annotations) or _STORAGE
        checksum, position = annotations.get(prefix + _CHECKSUM), annotations.get(prefix + _POSITION)
        if checksum is None or position is None:
            missing = _CHECKSUM if checksum is None else _POSITION
            raise FormatError(f"layer {blob.descriptor.digest} has zstd:chunked annotations without {missing}")
        json_digest = annotations.get(ANNOTATION_TOC_DIGEST)
        if json_digest is not None and prefix == _STORAGE:
            # Two tables could tell two stories about the same layer (containers/storage refuses it as well).
            raise FormatError(f"layer {blob.descriptor.digest} claims to be zstd:chunked and eStargz at once")
        self._checksum = Digest.parse(checksum)
        self.table = checksum
        self._json_digest = Digest.parse(json_digest) if json_digest is not None else None
        self._position = TablePosition.parse(position, blob.size, settings.limits)

    def _table(self, attempt: int) -> tuple[bytes, int, list[Entry]]:
        at = self._position
        packed = self._blob.read_at(at.offset, at.length, attempt=attempt)
        what = f"the table of contents of layer {self._blob.descriptor.digest}"
        self._checksum.check(packed, what)
        try:
            text = bytes(unzstd_chunk(packed, at.decoded, self._settings.limits))
        except IntegrityError as error:
            raise FormatError(f"{what} does not decompress to {at.decoded} bytes: {error}") from None
        if self._json_digest is not None:
            self._json_digest.check(text, what)
        return text, at.offset, []

    def _unpack(self, chunk: Chunk, data: memoryview) -> Bytes:
        return unzstd_chunk(data, chunk.length, self._settings.limits)


def _prefix(annotations: Mapping[str, str]) -> str | None:
    for prefix in (_STORAGE, _OLD):
        if prefix + _CHECKSUM in annotations or prefix + _POSITION in annotations:
            return prefix
    return None
