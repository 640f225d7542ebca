"""A checkpoint that lies in layers: an image of a registry or an OCI layout, or an archive, which is one layer.

Opens the layers with the formats of layers/, merges them, and reads files front to back: a range of the blob at a time
where chunks can be fetched one by one and have digests; otherwise (gzip, one zstd frame, plain tar, a registry without
ranges) the layer is unpacked once, and hashed, into a nameless file of the work directory, without its holes. Nothing
wrong is to get new digests here that say it is right. Blocks; no event loop, no cache.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from ckptfs.errors import CacheError, FormatError, IntegrityError
from ckptfs.image.resolve import find_image
from ckptfs.layers import Layer, right_as_a_whole, select_format
from ckptfs.layers.protocols import OtherFormat
from ckptfs.layers.stream import StreamLayer
from ckptfs.layers.toc_layer import ANNOTATION_TOC_DIGEST, TocLayer
from ckptfs.layers.zstd_chunked_writer import Payload
from ckptfs.model.annotations import OURS
from ckptfs.model.blob import Blob
from ckptfs.model.node import Node
from ckptfs.model.oci import Manifest, parse_json
from ckptfs.model.toc import Chunk, Extent, Inode, piece_of
from ckptfs.model.tree import Tree, Whiteouts
from ckptfs.push.checkpoint_files import Checkpoint, CheckpointFile
from ckptfs.push.spool import PiecesPayload, Spool, nameless
from ckptfs.settings import MiB, Settings
from ckptfs.sources import Source
from ckptfs.sources.documents import CONFIG_TYPES
from ckptfs.sources.pull_through import NoRanges

_ZEROS = bytes(MiB)
# Files that the stargz snapshotter adds to a layer: they are of its format, not of the checkpoint.
_FURNITURE = frozenset((b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"))


class LayerFiles:
    """The files of a few layers. A context manager: unpacked streams are kept until it is closed."""

    def __init__(
        self,
        blobs: Sequence[Blob],
        work: Path,
        settings: Settings,
        *,
        names_only: bool = False,
        whiteouts: Whiteouts = "merge",
    ) -> None:
        """Scans all layers; streams are unpacked into `work`, unless only the names are asked for."""
        self.tree = Tree(limits=settings.limits)
        self._work = work if not names_only else None
        self._window = settings.sizes.sequential_extent
        self._whiteouts: Whiteouts = whiteouts
        self._stack = ExitStack()
        self._readers: list[_ChunkReader] = []
        self._stargz: set[int] = set()  # ranks of its layers
        try:
            for number, blob in enumerate(blobs):
                rank = number + 1
                self.tree.begin(rank)
                layer = _opened(blob, number, settings)
                if ANNOTATION_TOC_DIGEST in blob.descriptor.annotations:
                    self._stargz.add(rank)
                try:
                    self._scan(blob, layer, rank)
                except OtherFormat as found:
                    self._scan(blob, _stream(found.format.name, blob, number, settings), rank)
                except NoRanges:
                    if not isinstance(layer, TocLayer):
                        raise
                    self._scan(blob, _stream(layer.stream, blob, number, settings), rank)
                self.tree.finish(rank)
        except BaseException:
            self.close()
            raise

    def files(self) -> list[CheckpointFile]:
        """All files that a layer describes, in the order of their paths, parents first; implied directories are not."""
        nodes = [(node.path, node.inode) for node in self.tree.walk() if node.rank and not self._is_furniture(node)]
        first: dict[int, bytes] = {}
        out = []
        for path, inode in sorted(nodes, key=lambda pair: pair[0]):
            if inode is None:
                continue
            target = path if inode.is_dir else first.setdefault(inode.ino, path)
            out.append(CheckpointFile(path, inode, target if target != path else None, partial(self.open, inode)))
        return out

    def _is_furniture(self, node: Node) -> bool:
        return node.rank in self._stargz and node.path in _FURNITURE

    def open(self, inode: Inode) -> Payload:
        """The bytes of a file, front to back."""
        return PiecesPayload(self._pieces(inode))

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _scan(self, blob: Blob, layer: Layer, rank: int) -> None:
        if not layer.sequential or self._work is None:
            self.tree.add(layer.scan(_ignore), rank, whiteouts=self._whiteouts)
            self._readers.append(_Ranged(blob, layer, self._window))
            return
        unpacked = _Unpacked(self._stack.enter_context(nameless(self._work)))
        self.tree.add(layer.scan(unpacked.keep), rank, whiteouts=self._whiteouts)
        unpacked.complete()
        self._readers.append(unpacked)

    def _pieces(self, inode: Inode) -> Iterator[bytes | memoryview]:
        position = 0
        for index, extent in enumerate(inode.extents):
            yield from _hole(extent.start - position)
            data = self._readers[extent.chunk.layer].chunk(inode.extents, index)
            yield piece_of(data, extent.skip, extent.length)
            position = extent.start + extent.length
        yield from _hole(inode.size - position)


def select_manifest(source: Source, settings: Settings) -> Manifest:
    """The image manifest that `source` names, through indexes. FormatError when there is none for this machine."""
    found = find_image(source.resolve(), source.fetch, settings.limits)
    if not isinstance(found, Manifest):
        raise FormatError(f"{source.reference} is a checkpoint of containerd in raw blobs, not an image")
    return found


def read_image(source: Source, manifest: Manifest, layers: LayerFiles) -> Checkpoint:
    """The checkpoint in an image whose layers `layers` has scanned, with the image's annotations and architecture."""
    architecture = None
    if manifest.config.media_type in CONFIG_TYPES:  # artifacts have others, or an empty one that need not be anywhere
        config = parse_json(source.fetch(manifest.config), "config")
        architecture = config.get("architecture") if isinstance(config, dict) else None
    return Checkpoint(
        layers.files(),
        kept_annotations(manifest.annotations),
        architecture if isinstance(architecture, str) else "",
    )


def kept_annotations(annotations: Mapping[str, str]) -> dict[str, str]:
    """The source's own annotations; buildah writes empty base names, which say nothing, and ours are made anew."""
    return {key: value for key, value in annotations.items() if value and not key.startswith(OURS)}


# -- reading chunks ----------------------------------------------------------------------------------------------------


def _opened(blob: Blob, number: int, settings: Settings) -> Layer:
    layer = select_format(blob.descriptor).open(blob, number, settings)
    if isinstance(blob, Spool) or not right_as_a_whole(layer, blob):  # a spool has been hashed as it was written
        return layer
    return _stream(layer.format, blob, number, settings)


def _stream(format_: str, blob: Blob, number: int, settings: Settings) -> StreamLayer:
    stream = StreamLayer(format_, blob, number, settings)
    stream.learning = False
    return stream


class _ChunkReader(Protocol):
    def chunk(self, extents: Sequence[Extent], index: int) -> bytes | memoryview:
        """The decoded chunk of extents[index]; the ones behind it will be asked for next."""


class _Ranged:
    """A layer whose chunks can be fetched one by one: fetches those of the next few MiB of a file together."""

    def __init__(self, blob: Blob, layer: Layer, window: int) -> None:
        self._blob = blob
        self._layer = layer
        self._window = window
        self._start = 0
        self._data = b""
        self._last: tuple[bytes, bytes | memoryview] = (b"", b"")  # neighbours in a tar share a chunk

    def chunk(self, extents: Sequence[Extent], index: int) -> bytes | memoryview:
        chunk = extents[index].chunk
        if self._last[0] == chunk.key:
            return self._last[1]
        try:
            data = self._decode(chunk, extents, index, 0)
        except IntegrityError:  # a flipped bit on the way: once more, elsewhere if there is another place
            self._data = b""
            data = self._decode(chunk, extents, index, 1)
        self._last = (chunk.key, data)
        return data

    def _decode(self, chunk: Chunk, extents: Sequence[Extent], index: int, attempt: int) -> bytes | memoryview:
        at = chunk.offset - self._start
        if not 0 <= at <= len(self._data) - chunk.size:
            end = chunk.offset + chunk.size
            for extent in extents[index + 1 : index + 1 + self._window // 4096]:
                following = extent.chunk
                if following.layer != chunk.layer or not end <= following.offset <= end + self._window // 16:
                    break
                if following.offset + following.size > chunk.offset + self._window:
                    break
                end = following.offset + following.size
            self._start, at = chunk.offset, 0
            self._data = self._blob.read_at(chunk.offset, end - chunk.offset, attempt=attempt)
        return self._layer.decode(chunk, memoryview(self._data)[at : at + chunk.size])


class _Unpacked:
    """The decoded stream of a layer, in a file with holes where it is zero."""

    def __init__(self, spool: BinaryIO) -> None:
        self._spool = spool.fileno()
        self._end = 0

    def keep(self, chunk: Chunk, data: bytes) -> None:
        self._end = chunk.offset + len(data)
        if data.count(0) == len(data):
            return
        try:
            view = memoryview(data)
            at = 0
            while at < len(view):
                at += os.pwrite(self._spool, view[at:], chunk.offset + at)
        except OSError as error:
            raise _full(error) from None

    def complete(self) -> None:
        try:
            os.ftruncate(self._spool, self._end)
        except OSError as error:
            raise _full(error) from None

    def chunk(self, extents: Sequence[Extent], index: int) -> bytes:
        chunk = extents[index].chunk
        return os.pread(self._spool, min(chunk.length, self._end - chunk.offset), chunk.offset)


def _full(error: OSError) -> CacheError:
    return CacheError(f"cannot unpack the source: {error.strerror}", hint="name a larger --work-dir")


def _ignore(chunk: Chunk, data: bytes) -> None:
    pass


def _hole(length: int) -> Iterator[bytes | memoryview]:
    while length > 0:
        piece = memoryview(_ZEROS)[: min(length, len(_ZEROS))]
        yield piece
        length -= len(piece)
