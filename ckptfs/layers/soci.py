"""SOCI's zTOC: the table of contents and the access points of a plain gzip (or plain tar) layer, in a blob beside it.

awslabs/soci-snapshotter ztoc/fbs/ztoc.fbs and ztoc/compression/gzip_zinfo.c. Spans are cut where deflate blocks begin
and have digests over their *compressed* bytes, so what arrives is checked before it is inflated. How a zTOC is found is
image/'s matter; here it is judged and read.
"""

import hashlib
import stat
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ckptfs.errors import FormatError, IntegrityError, LimitExceeded
from ckptfs.layers.compression import Bytes
from ckptfs.layers.deflate import WINDOW, inflate_from
from ckptfs.layers.flatbuffers import Buffer, Table
from ckptfs.layers.grid import Cuts
from ckptfs.layers.protocols import Emit, Verification
from ckptfs.layers.tar_header import pax_xattrs
from ckptfs.layers.toc_json import rfc3339
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor, Digest
from ckptfs.model.paths import device_number, normalise, show, symlink_target
from ckptfs.model.toc import Chunk, Entry, Inode, derived_key
from ckptfs.settings import Limits, Settings

_GZIP, _UNCOMPRESSED = 1, 2
_HEADER = struct.Struct("<iq")  # checkpoints, decoded bytes between them
_POINT = struct.Struct("<qqB")  # in, out, bits; the window follows
_PACKED = _POINT.size + WINDOW
_FIRST = 10  # version 1 leaves the first checkpoint out, and takes the gzip header for one without a name
_BYTE = struct.Struct("<b")
_KINDS = {
    b"reg": stat.S_IFREG,
    b"dir": stat.S_IFDIR,
    b"symlink": stat.S_IFLNK,
    b"char": stat.S_IFCHR,
    b"block": stat.S_IFBLK,
    b"fifo": stat.S_IFIFO,
}


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes [start, end) of the blob, which inflate to [position, following) of the stream."""

    start: int
    end: int
    position: int
    following: int
    bits: int
    window: memoryview
    digest: bytes


@dataclass(frozen=True, slots=True)
class Ztoc:
    """A zTOC as a side document. `digest` is its own, so that a false one spoils no chunk of anybody else."""

    digest: str
    compressed: bool
    spans: Sequence[_Span]
    files: Sequence[tuple[Entry, int]]  # and where the bytes of a file begin in the stream
    settings: Settings

    @classmethod
    def parse(cls, document: bytes, descriptor: Descriptor, settings: Settings) -> "Ztoc":
        """FormatError or LimitExceeded for whatever is not a sound zTOC of this layer."""
        limits = settings.limits
        try:
            return _Parser(document, descriptor, settings).parse()
        except struct.error as error:
            raise FormatError(f"the zTOC is damaged ({error})") from None
        except MemoryError:
            raise LimitExceeded(f"the zTOC asks for more than {limits.toc_bytes} bytes") from None

    def open(self, blob: Blob, layer: int) -> "SociLayer":
        return SociLayer(self, blob, layer)


class SociLayer:
    """A span is a chunk."""

    verification: Verification = "chunk"
    sequential = False

    def __init__(self, ztoc: Ztoc, blob: Blob, layer: int) -> None:
        self.format = "gzip+soci" if ztoc.compressed else "tar+soci"
        self._ztoc = ztoc
        self._blob = blob
        self._layer = layer
        self._kind = f"soci/{ztoc.digest}"
        self._starts = [span.start for span in ztoc.spans]
        positions = [span.position for span in ztoc.spans]
        cuts = Cuts([*positions, ztoc.spans[-1].following] if ztoc.spans else [0], self._chunk)
        self.entries: Sequence[Entry] | None = []
        for entry, position in ztoc.files:
            inode = entry.inode
            if inode is not None and inode.size and inode.is_file:
                inode = Inode(inode.mode, inode.uid, inode.gid, inode.size, inode.mtime_ns, xattrs=inode.xattrs)
                inode.extents = cuts.extents(((0, inode.size, position),))
                entry = Entry(entry.path, inode)
            self.entries.append(entry)

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        yield from self.entries or ()

    def decode(self, chunk: Chunk, data: memoryview) -> Bytes:
        span = self._ztoc.spans[bisect_right(self._starts, chunk.offset) - 1]
        if hashlib.sha256(data).digest() != span.digest:
            raise IntegrityError(f"the span at byte {chunk.offset} of {self._blob.descriptor.digest} is damaged")
        if not self._ztoc.compressed:
            return data
        return inflate_from(span.window, span.bits, data, 0, chunk.length, self._ztoc.settings.limits)

    def _chunk(self, index: int) -> Chunk:
        span = self._ztoc.spans[index]
        key = derived_key(str(self._blob.descriptor.digest), span.start, kind=self._kind)
        return Chunk(key, self._layer, span.start, span.end - span.start, span.following - span.position)


class _Parser:
    def __init__(self, document: bytes, descriptor: Descriptor, settings: Settings) -> None:
        limits = settings.limits
        self._document = document
        self._descriptor = descriptor
        self._settings = settings
        self._limits = limits
        self._root = Buffer(document, tables=2 * limits.toc_entries, text=limits.toc_bytes).root()
        self._length = self._root.int64(3)

    def parse(self) -> Ztoc:
        toc, info = self._root.table(4), self._root.table(5)
        if toc is None or info is None:
            raise FormatError("the zTOC has no table of contents or no compression info")
        if self._root.int64(2) != self._descriptor.size:
            raise FormatError("the zTOC belongs to a layer of another size")
        if not 0 <= self._length <= self._limits.file_bytes:
            raise FormatError(f"the zTOC has a layer of {self._length} bytes")
        algorithm = info.number(0, _BYTE, _GZIP)
        if algorithm not in (_GZIP, _UNCOMPRESSED):
            raise FormatError(f"the zTOC has the compression algorithm {algorithm}")
        digests = [_sha256(text) for text in info.strings(2)]
        if len(digests) != info.int32(1) + 1 or len(digests) > self._limits.toc_entries:
            raise FormatError(f"the zTOC has {len(digests)} digests for {info.int32(1) + 1} spans")
        points = info.data(3)
        spans = self._gzip_spans(points, digests) if algorithm == _GZIP else self._tar_spans(points, digests)
        files = list(self._files(toc))
        name = str(Digest.of(self._document))
        return Ztoc(name, algorithm == _GZIP, spans, files, self._settings)

    def _gzip_spans(self, points: memoryview, digests: list[bytes]) -> list[_Span]:
        count, _ = _HEADER.unpack_from(points)
        given, rest = divmod(len(points) - _HEADER.size, _PACKED)
        if rest or count != len(digests) or given not in (count, count - 1):
            raise FormatError(f"the zTOC has {given} checkpoints for {len(digests)} spans")
        found = [] if given == count else [(_FIRST, 0, 0, memoryview(b""))]
        for at in range(_HEADER.size, len(points), _PACKED):
            into, out, bits = _POINT.unpack_from(points, at)
            window = points[at + _POINT.size : at + _PACKED]
            # What lies before the stream's first byte is nothing, and any padding for it
            found.append((into, out, bits, window[max(0, WINDOW - out) :] if out else window[:0]))
        ends = [*(into for into, *_ in found[1:]), self._descriptor.size]
        following = [*(out for _, out, *_ in found[1:]), self._length]
        spans = []
        for (into, out, bits, window), end, upto, digest in zip(found, ends, following, digests, strict=True):
            if bits > 7:
                raise FormatError("the zTOC has a checkpoint with more bits than a byte has")
            spans.append(_Span(into - (1 if bits else 0), end, out, upto, bits, window, digest))
        return self._checked(spans)

    def _tar_spans(self, points: memoryview, digests: list[bytes]) -> list[_Span]:
        info = Buffer(bytes(points), tables=1, text=0).root()
        step, size = info.int64(1), info.int64(2)
        if size != self._descriptor.size or step <= 0 or -(-size // step) != len(digests):
            raise FormatError(f"the zTOC has {len(digests)} spans of {step} bytes in a layer of {size}")
        starts = range(0, size, step)
        none = memoryview(b"")
        return self._checked(
            [
                _Span(low, min(low + step, size), low, min(low + step, size), 0, none, digest)
                for low, digest in zip(starts, digests, strict=True)
            ]
        )

    def _checked(self, spans: list[_Span]) -> list[_Span]:
        most = self._limits.chunk_bytes
        for span in spans:
            if not 0 <= span.start < span.end <= self._descriptor.size:
                raise FormatError("the zTOC has a span outside its layer")
            if span.end - span.start > most or span.following - span.position > most:
                raise LimitExceeded(f"the zTOC has a span of more than {most} bytes")
        if spans and spans[0].position:
            raise FormatError("the spans of the zTOC do not begin at the stream's first byte")
        if any(high.start <= low.start or high.position <= low.position for low, high in pairwise(spans)) or (
            spans and spans[-1].following <= spans[-1].position
        ):
            raise FormatError("the spans of the zTOC are out of order")
        return spans

    # Files.

    def _files(self, toc: Table) -> Iterator[tuple[Entry, int]]:
        if toc.count(0) > self._limits.toc_entries:
            raise LimitExceeded(f"the zTOC has {toc.count(0)} entries")
        times: dict[bytes, int] = {}
        for file in toc.tables(0):
            yield self._file(file, times)

    def _file(self, file: Table, times: dict[bytes, int]) -> tuple[Entry, int]:
        limits = self._limits
        name, kind = file.string(0), file.string(1)
        path = normalise(name, limits)
        if kind == b"hardlink":
            return Entry(path, None, normalise(file.string(4), limits)), 0
        file_type = _KINDS.get(kind)
        if file_type is None or (not path and file_type != stat.S_IFDIR):
            raise FormatError(f"the zTOC has the type {show(kind)} for {show(name)}")
        text = file.string(10)
        if text not in times:
            times[text] = rfc3339(text.decode("utf-8", "replace")) if text else 0
        inode = Inode(file_type | file.int64(5) & 0o7777, file.uint32(6), file.uint32(7), mtime_ns=times[text])
        if file.count(13):
            inode.xattrs = self._xattrs(file, limits, name)
        position = 0
        if file_type == stat.S_IFREG:
            position, inode.size = file.int64(2), file.int64(3)
            if inode.size < 0 or position < 0 or position + inode.size > self._length:
                raise FormatError(f"the zTOC has {show(name)} outside its layer")
        elif file_type == stat.S_IFLNK:
            inode.target = symlink_target(file.string(4), path, limits)
            inode.size = len(inode.target)
        elif file_type in (stat.S_IFCHR, stat.S_IFBLK):
            inode.rdev = device_number(file.int64(11), file.int64(12), path)
        return Entry(path, inode), position

    def _xattrs(self, file: Table, limits: Limits, name: bytes) -> dict[bytes, bytes]:
        """The field has all PAX records of the file, whatever the schema calls it."""
        records = [(record.string(0), record.string(1)) for record in file.tables(13)]
        if any(keyword.startswith(b"GNU.sparse.") for keyword, _ in records):
            # A zTOC has no place for the map: the file's bytes in the stream are not the file.
            raise FormatError(f"the zTOC has the sparse file {show(name)}")
        return pax_xattrs(records, limits)


def _sha256(text: bytes) -> bytes:
    digest = Digest.parse(text.decode("ascii", "replace"))
    if digest.algorithm != "sha256":
        raise FormatError(f"the zTOC has the digest {digest}")
    return digest.raw
