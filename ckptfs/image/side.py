"""Looking for what is known of an image's layers outside of them, before they are opened.

In this order: what this node has found for the image before; a SOCI index that the manifest names; what refers to the
manifest, our own index before SOCI's; for zstd layers, in the same round trip, a seek table at their end. Nothing is
asked for images that bring their index along, nor for layers with a table of contents of their own or that this node
has streamed. Whatever goes wrong here costs the help, never the mount.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import trio

from ckptfs.engine.threads import in_thread
from ckptfs.errors import CkptfsError, FormatError, NotFoundError, UnavailableError
from ckptfs.image.remembered import LayerMemory
from ckptfs.image.resolve import DocumentStore
from ckptfs.layers import select_format
from ckptfs.layers.estargz import ExternalTable
from ckptfs.layers.indexed import Indexed
from ckptfs.layers.protocols import SideDocument
from ckptfs.layers.soci import Ztoc
from ckptfs.layers.zstd_seekable import SeekTable, parse_seek_table, read_seek_table
from ckptfs.model.annotations import (
    ESTARGZ_LAYER,
    INDEX_ARTIFACT,
    INDEX_LAYER,
    SOCI_INDEX_DIGEST,
    SOCI_LAYER,
    SOCI_V1,
    SOCI_V2,
)
from ckptfs.model.oci import Descriptor, Digest, Manifest, parse_document, parse_json, string_map
from ckptfs.settings import Settings
from ckptfs.sources import Repository, Source

log = logging.getLogger(__name__)

T = TypeVar("T")
Found = dict[Digest, SideDocument]
Documents = dict[Digest, tuple[str, bytes]]  # of layers: kind and bytes

_THREADS = 4
_EXTERNAL_SUFFIX = "-esgztoc"  # stargz-snapshotter docs/estargz.md: the image that has the tables of another


async def find_side_documents(
    source: Source,
    manifest: Manifest,
    cache: DocumentStore,
    memory: LayerMemory,
    settings: Settings,
    *,
    offline: bool,
    strict: bool,
) -> Found:
    """By layer. Gives up after `Timeouts.side_documents`. `strict`: only what makes chunks verifiable."""
    search = _Search(source, manifest, cache, memory, settings)
    found = search.known()
    if search.wanted and not offline:
        with trio.move_on_after(settings.timeouts.side_documents) as scope:
            found |= await in_thread(search.ask, strict)
        if scope.cancelled_caught:
            log.warning("no answer about an index of %s; going on without", source.reference)
    return found


class _Search:
    def __init__(
        self, source: Source, manifest: Manifest, cache: DocumentStore, memory: LayerMemory, settings: Settings
    ) -> None:
        self._source = source
        self._repository = source if isinstance(source, Repository) else None
        self._manifest = manifest
        self._cache = cache
        self._settings = settings
        self._layers: dict[Digest, Descriptor] = {}
        self._formats: dict[Digest, str] = {}
        for layer in manifest.layers:
            try:
                self._formats[layer.digest] = select_format(layer).name
            except CkptfsError:
                continue  # whoever opens the layer says so
            if self._formats[layer.digest] in ("gzip", "zstd", "tar") and memory.document(layer) is None:
                self._layers[layer.digest] = layer

    @property
    def wanted(self) -> Sequence[Descriptor]:
        return list(self._layers.values())

    def known(self) -> Found:
        """Without asking anybody; layers that are not wanted any more are crossed off."""
        found: Found = {}
        if self._repository is not None:
            for digest, name in self._formats.items():
                if name == "estargz":
                    found[digest] = ExternalTable(self._external(self._repository, digest), self._settings)
        for digest, (kind, document) in self._remembered().items():
            layer = self._layers.get(digest)
            parsed = self._parsed(kind, document, layer) if layer is not None else None
            if parsed is not None:
                found[digest] = parsed
                del self._layers[digest]
        return found

    def ask(self, strict: bool) -> Found:
        """Ask the registry; one round trip where there is nothing to be found."""
        wanted = self.wanted
        with ThreadPoolExecutor(_THREADS, "side") as pool:
            tables = {
                layer.digest: _begun(pool, read_seek_table, self._source.blob(layer), self._settings)
                for layer in wanted
                if self._formats[layer.digest] == "zstd" and not strict
            }
            documents = self._quietly(lambda: self._published(pool)) or {}
            for digest, future in tables.items():
                table = self._quietly(_result(future))
                if table is not None:
                    documents[digest] = ("seek table", table.raw)
        found: Found = {}
        kept = {}
        for digest, (kind, document) in documents.items():
            parsed = self._parsed(kind, document, self._layers[digest])
            if parsed is not None:
                found[digest] = parsed
                kept[digest] = (kind, document)
        if kept:
            self._remember(kept)
        return found

    # What others have attached to the image.

    def _published(self, pool: ThreadPoolExecutor) -> Documents:
        repository = self._repository
        if repository is None:
            return {}
        named = self._manifest.annotations.get(SOCI_INDEX_DIGEST)
        if named is not None:
            documents = self._quietly(lambda: self._named(pool, repository, named))
            if documents:
                return documents
        offers = repository.referrers(self._manifest.digest)
        for kind, artifact, annotation in (("index", INDEX_ARTIFACT, INDEX_LAYER), ("ztoc", SOCI_V1, SOCI_LAYER)):
            for offer in offers:
                if offer.artifact_type == artifact:
                    documents = self._quietly(partial(self._offered, pool, offer, annotation, kind))
                    if documents:
                        return documents
        return {}

    def _named(self, pool: ThreadPoolExecutor, repository: Repository, digest: str) -> Documents:
        """Of the SOCI index that the image names. A copy of the image may have been made without it."""
        index = repository.document(str(Digest.parse(digest)))
        if isinstance(index, Manifest) and index.config.media_type == SOCI_V2:
            return self._documents(pool, index, SOCI_LAYER, "ztoc")
        return {}

    def _offered(self, pool: ThreadPoolExecutor, offer: Descriptor, annotation: str, kind: str) -> Documents:
        document = parse_document(self._source.fetch(offer), offer.media_type)
        if not isinstance(document, Manifest):
            raise FormatError(f"{offer.digest} is attached as an index and is a list of images")
        if document.subject is None or document.subject.digest != self._manifest.digest:
            raise FormatError(f"the index {offer.digest} is attached to another image")
        return self._documents(pool, document, annotation, kind)

    def _documents(self, pool: ThreadPoolExecutor, index: Manifest, annotation: str, kind: str) -> Documents:
        """The documents that an index lists for layers that are wanted, by layer."""
        futures: dict[Digest, Future[bytes]] = {}
        for blob in index.layers[: self._settings.limits.layers]:
            name = blob.annotations.get(annotation)
            digest = Digest.parse(name) if name is not None else None
            if digest is not None and digest in self._layers and digest not in futures:
                futures[digest] = _begun(pool, self._source.fetch, blob)
        found = {digest: self._quietly(_result(future)) for digest, future in futures.items()}
        return {digest: (kind, document) for digest, document in found.items() if document is not None}

    def _external(self, repository: Repository, layer: Digest) -> Callable[[], bytes]:
        def fetch() -> bytes:
            tag = self._source.reference.tag
            if not tag:
                raise NotFoundError(
                    "the table of contents of the layer is in the image TAG-esgztoc, and no tag is known",
                    hint="mount the image by its tag",
                )
            document = repository.document(tag + _EXTERNAL_SUFFIX)
            if not isinstance(document, Manifest):
                chosen = document.select()
                document = parse_document(self._source.fetch(chosen), chosen.media_type)
            for blob in document.layers if isinstance(document, Manifest) else ():
                if blob.annotations.get(ESTARGZ_LAYER) == str(layer):
                    return self._source.fetch(blob)
            raise NotFoundError(f"the image {tag}{_EXTERNAL_SUFFIX} has no table of contents for layer {layer}")

        return fetch

    # From bytes to documents.

    def _parsed(self, kind: str, document: bytes, layer: Descriptor) -> SideDocument | None:
        settings = self._settings

        def parse() -> SideDocument:
            if kind == "index":
                return Indexed.parse(document, layer, settings, own=False)
            if kind == "ztoc":
                return Ztoc.parse(document, layer, settings)
            table: SeekTable = parse_seek_table(document, layer.size, settings)
            return table

        return self._quietly(parse)

    def _quietly(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except CkptfsError as error:
            log.warning("an index of %s is not used: %s", self._source.reference, error)
            return None

    # What was found is kept for the image it was found with, and for no other that has the same layer.

    def _remembered(self) -> Mapping[Digest, tuple[str, bytes]]:
        raw = self._cache.get_document(self._key)
        record = self._quietly(lambda: string_map(parse_json(raw, "record of indexes"), "record")) if raw else None
        found = {}
        for name, kind in (record or {}).items():
            document = self._cache.get_document(f"{self._key}/{name}")
            if document is not None:
                found[Digest.parse(name)] = (kind, document)
        return found

    def _remember(self, found: Mapping[Digest, tuple[str, bytes]]) -> None:
        for digest, (_, document) in found.items():
            self._cache.put_document(f"{self._key}/{digest}", document)
        record = {str(digest): kind for digest, (kind, _) in found.items()}
        self._cache.put_document(self._key, json.dumps(record).encode())

    @property
    def _key(self) -> str:
        reference = self._source.reference
        return f"side/{reference.kind}/{reference.host}/{reference.repository}{reference.path}@{self._manifest.digest}"


def _begun(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: object) -> Future[T]:
    try:
        return pool.submit(work, *arguments)
    except RuntimeError as error:  # of threading: a limit on tasks
        failed: Future[T] = Future()
        failed.set_exception(UnavailableError(str(error)))
        return failed


def _result(future: Future[T]) -> Callable[[], T]:
    return future.result
