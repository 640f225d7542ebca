"""What this node remembers of a layer from one mount to the next: its table of contents, or an index if one was made.

Both are documents of the node's cache by the layer's digest. An index is kept of layers that were streamed once; with
it the layer is read at random, and checked chunk by chunk. Whoever opens the layer loads it; keeping runs in a thread.
The codecs are imported by who needs one: an image with an index of its own does not.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

import trio

from ckptfs.engine.threads import in_thread
from ckptfs.errors import FormatError
from ckptfs.hardening import release_memory
from ckptfs.image.resolve import DocumentStore
from ckptfs.layers import Layer
from ckptfs.layers.protocols import SideDocument
from ckptfs.layers.toc_layer import TocLayer
from ckptfs.model.oci import Descriptor
from ckptfs.model.toc import Entry
from ckptfs.settings import Settings

log = logging.getLogger(__name__)

_MANY = 10_000  # entries: 5 MB and more have been needed to read and to write them
_LATER = 1.0  # seconds for which so many are left alone: the mount is about to be ready, and Python has one lock


class RemovableStore(DocumentStore, Protocol):
    """A DocumentStore out of which a damaged document can be taken."""

    def delete_document(self, key: str) -> None: ...


class LayerMemory:
    def __init__(self, cache: RemovableStore, settings: Settings, *, learning: bool = True) -> None:
        """`learning`: whether anything is to be kept; a stream is read faster without."""
        self._cache = cache
        self._settings = settings
        self._learning = learning

    def prepare(self, layer: Layer) -> None:
        """Before the layer's first scan."""
        if layer.sequential:
            from ckptfs.layers.stream import StreamLayer

            if isinstance(layer, StreamLayer):
                layer.learning = self._learning

    def document(self, descriptor: Descriptor) -> bytes | None:
        """The index of a layer that this node has streamed, as `encode_layer_index` wrote it."""
        return self._cache.get_document(_index_key(descriptor))

    def index(self, descriptor: Descriptor) -> SideDocument | None:
        """The same, read."""
        document = self.document(descriptor)
        if document is None:
            return None
        from ckptfs.layers.indexed import Indexed

        try:
            return Indexed.parse(document, descriptor, self._settings, own=True)
        except FormatError as error:
            log.warning("%s; streaming the layer again", error)
            self._cache.delete_document(_index_key(descriptor))
            return None

    def entries(self, layer: Layer, number: int, descriptor: Descriptor) -> Sequence[Entry] | None:
        """The entries that a scan of this very layer has given; its chunks get `number`."""
        document = self._cache.get_document(_toc_key(layer, descriptor))
        if document is None:
            return None
        from ckptfs.model.toc_document import decode_toc

        try:
            limits = self._settings.limits
            toc = decode_toc(document, layer=number, layer_digest=str(descriptor.digest), limits=limits)
        except FormatError as error:
            log.warning("%s; reading the layer's own again", error)
            self._cache.delete_document(_toc_key(layer, descriptor))
            return None
        return toc.entries if toc.format == layer.format else None  # others cut it into other chunks

    async def keep(self, entries: list[Entry], layer: Layer, descriptor: Descriptor) -> None:
        """After a complete scan: the next mount needs no scan and no network for it. The image's end waits for this.

        Empties the list: the tree has all that it said.
        """
        many = len(entries) >= _MANY
        try:
            if many:
                await trio.sleep(_LATER)
        finally:
            if self._learning:
                with trio.move_on_after(_LATER, shield=True):  # the next mount can do without
                    # 0.3 s for 100 000 files: not in the event loop
                    await in_thread(self._keep, entries, layer, descriptor)
        entries.clear()
        if many:
            await in_thread(release_memory)

    def _keep(self, entries: Sequence[Entry], layer: Layer, descriptor: Descriptor) -> None:
        from ckptfs.layers.stream import StreamLayer
        from ckptfs.model.layer_index import encode_layer_index
        from ckptfs.model.toc_document import encode_toc

        index = layer.index(entries) if isinstance(layer, StreamLayer) else None
        if index is not None:
            self._cache.put_document(_index_key(descriptor), encode_layer_index(index))
            if self.document(descriptor) is not None:  # the cache leaves out what is larger than its share
                return
        chunks = sum(len(entry.inode.extents) for entry in entries if entry.inode is not None)
        if chunks > self._settings.limits.kept_chunks:
            log.debug("%s is not remembered: its files have %d chunks", descriptor.digest, chunks)
            return
        digest, format_, verification = str(descriptor.digest), layer.format, layer.verification
        document = encode_toc(entries, layer_digest=digest, format=format_, verification=verification)
        self._cache.put_document(_toc_key(layer, descriptor), document)


def _index_key(descriptor: Descriptor) -> str:
    return f"index/{descriptor.digest}"


def _toc_key(layer: Layer, descriptor: Descriptor) -> str:
    """What has been read is the table that the manifest named: another manifest can name another one."""
    table = f"/{layer.table}" if isinstance(layer, TocLayer) else ""
    return f"toc/{descriptor.digest}{table}"
