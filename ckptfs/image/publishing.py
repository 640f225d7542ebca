"""Our own index of an image that somebody else pushed: made by streaming its layers once, attached to it as a referrer.

An artifact whose subject is the image, with one document for each layer that has no table of contents of its own
(model/layer_index.py). The same image gives the same artifact. Called by `ckptfs index` and, with `--publish-index`, by
a mount when its streams have ended. Blocks, but for `publish_when_streamed`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import trio

from ckptfs.engine.threads import in_thread
from ckptfs.errors import CkptfsError, FormatError, IntegrityError
from ckptfs.image.attaching import Sink, attach
from ckptfs.image.opened import OpenImage
from ckptfs.layers import select_format
from ckptfs.layers.stream import StreamLayer
from ckptfs.model.annotations import INDEX_ARTIFACT, INDEX_BLOB, INDEX_LAYER
from ckptfs.model.blob import Blob, DescribedBlob
from ckptfs.model.layer_index import LayerIndex, encode_layer_index
from ckptfs.model.oci import Descriptor, Digest, Manifest
from ckptfs.model.toc import Chunk, Entry
from ckptfs.settings import Settings
from ckptfs.sources import Source

log = logging.getLogger(__name__)

_THREADS = 2
_STREAMED = ("gzip", "zstd", "tar")
_POLL = 0.2  # seconds between two looks at whether the last index has been written

Documents = Mapping[Digest, bytes]


@dataclass(frozen=True, slots=True)
class PublishedIndex:
    """`manifest` names the artifact; `layers` are its documents, by layer. `sent` bytes were not there yet."""

    manifest: Descriptor
    layers: Mapping[Digest, Descriptor]
    sent: int


def index_layers(
    source: Source, manifest: Manifest, settings: Settings, report: Callable[[int], None] = lambda _: None
) -> Documents:
    """An index of every layer that needs one and can have one; each is streamed, so that the index can be small.

    `report` is told of bytes of layers as they have passed, from several threads. FormatError where no layer that
    needs one can have one.
    """
    wanted = {d.digest: d for d in manifest.layers if select_format(d).name in _STREAMED}

    def one(descriptor: Descriptor) -> bytes | None:
        index = _indexed(source.blob(descriptor), settings, report)
        if index is None:
            log.warning("layer %s gets no index: random access to it is not possible", descriptor.digest)
        return encode_layer_index(index) if index is not None else None

    pool = ThreadPoolExecutor(_THREADS, "index")
    try:
        made = zip(wanted, pool.map(one, wanted.values()), strict=True)
        documents = {digest: document for digest, document in made if document is not None}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what still streams when one has failed is wanted by nobody
    if wanted and not documents:
        raise FormatError(
            "no layer of the image can be read at random",
            hint="ckptfs push makes a copy that can be: ckptfs push REF REF",
        )
    return documents


def _indexed(blob: Blob, settings: Settings, report: Callable[[int], None]) -> LayerIndex | None:
    layer, entries = _streamed(select_format(blob.descriptor).name, blob, settings, report)
    if layer.found is not None and layer.found != layer.format:  # streams are cut according to what they are
        said = f"is called {blob.descriptor.media_type} and is {layer.found}"
        log.warning("layer %s %s: it is read once more", blob.descriptor.digest, said)
        report(-blob.size)
        layer, entries = _streamed(layer.found, blob, settings, report)
    return layer.index(entries)


def _streamed(
    format_: str, blob: Blob, settings: Settings, report: Callable[[int], None]
) -> tuple[StreamLayer, list[Entry]]:
    counted = _Counted(blob, report)
    layer = StreamLayer(format_, counted, 0, settings, sparse=True)
    try:
        return layer, list(layer.scan(_ignore))
    except IntegrityError as error:
        log.warning("%s; trying again", error)
        report(-counted.passed)
        return layer, list(layer.scan(_ignore, attempt=1))


def publish_index(sink: Sink, manifest: Manifest, documents: Documents) -> PublishedIndex:
    """Attach the documents to the image: blobs first, the artifact last."""
    layers = {
        digest: Descriptor(INDEX_BLOB, Digest.of(document), len(document), {INDEX_LAYER: str(digest)})
        for digest, document in documents.items()
    }
    attached = attach(sink, manifest, INDEX_ARTIFACT, [(layers[digest], documents[digest]) for digest in layers])
    return PublishedIndex(attached.manifest, layers, attached.sent)


async def publish_when_streamed(image: OpenImage, sink: Sink) -> None:
    """Let a mount's streams run to their ends, then publish what they have taught. An error is logged, nothing more."""
    manifest = image.resolved.manifest
    ours = {descriptor.digest for descriptor in manifest.layers}
    try:
        image.run_on()
        await image.all_known()
        streamed = {d.digest: d for d, layer in image.layers.values() if isinstance(layer, StreamLayer)}
        wanted = {digest: descriptor for digest, descriptor in streamed.items() if digest in ours}
        documents: dict[Digest, bytes] = {}
        with trio.move_on_after(image.options.settings.timeouts.read_deadline):
            while len(documents) < len(wanted):
                await trio.sleep(_POLL)
                for digest, descriptor in wanted.items():
                    if digest not in documents and (document := image.memory.document(descriptor)) is not None:
                        documents[digest] = document
        if documents:
            published = await in_thread(publish_index, sink, manifest, documents)
            log.info("the index of %s is published as %s", image.resolved.reference, published.manifest.digest)
    except CkptfsError as error:
        log.error("the index is not published: %s", error)
        image.errors.append(f"the index is not published: {error}")


class _Counted(DescribedBlob):
    """A blob that tells how much of it has been streamed."""

    def __init__(self, blob: Blob, report: Callable[[int], None]) -> None:
        super().__init__(blob.descriptor)
        self.passed = 0
        self._blob = blob
        self._report = report

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        return self._blob.read_at(offset, length, attempt=attempt)

    def stream(
        self, offset: int, length: int, *, attempt: int = 0, patient: bool = False
    ) -> Iterator[bytes | memoryview]:
        for piece in self._blob.stream(offset, length, attempt=attempt, patient=patient):
            yield piece
            self.passed += len(piece)
            self._report(len(piece))


def _ignore(chunk: Chunk, data: bytes) -> None:
    pass
