"""From a reference to a manifest: registry or cache, platform chosen, digest pinned. Blocks, in a worker thread.

The node's cache remembers manifests by digest and the digest that a tag had, so that a pinned reference needs no
network, and a tag can still be mounted while its registry is away if the user says `--offline` or everything is here.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from ckptfs.engine.threads import in_thread
from ckptfs.errors import FormatError, LimitExceeded, NotFoundError, UnavailableError
from ckptfs.image.views import is_checkpoint_index
from ckptfs.model.oci import Descriptor, Digest, Index, Manifest, Reference, parse_document
from ckptfs.settings import Limits
from ckptfs.sources import Source
from ckptfs.sources.offline import offline_source

log = logging.getLogger(__name__)


class DocumentStore(Protocol):
    """What is needed of the node's cache for documents (engine/documents.py)."""

    def get_document(self, key: str) -> bytes | None: ...
    def put_document(self, key: str, data: bytes) -> None: ...
    def put_document_soon(self, key: str, data: bytes) -> None: ...


class Resolved(NamedTuple):
    """`reference` is pinned to the digest that the user's reference led to (the index's where there is one).

    loose_blobs: of containerd's checkpoint index, whose entries are not images; `manifest` stands for the index then
    and has no layers.
    """

    reference: Reference
    manifest: Manifest
    from_cache: bool
    loose_blobs: tuple[Descriptor, ...] = ()


def resolve(source: Source, documents: DocumentStore, limits: Limits, *, offline: bool = False) -> Resolved:
    """The image manifest for this machine. UnavailableError when it is neither here nor to be had."""
    reference = source.reference
    document, from_cache = _top(source, documents, offline)
    pinned = reference.pinned(document.digest)

    def fetch(chosen: Descriptor) -> bytes:
        raw = documents.get_document(_manifest_key(chosen.digest))
        if raw is not None:
            chosen.digest.check(raw, "the cached manifest")
            return raw
        if offline and reference.kind == "registry":
            raise _not_here(reference)
        raw = source.fetch(chosen)
        documents.put_document(_manifest_key(chosen.digest), raw)
        return raw

    found = find_image(document, fetch, limits)
    if isinstance(found, Manifest):
        return Resolved(pinned, found, from_cache)
    whole = Descriptor(found.media_type, found.digest, len(found.raw))
    stand_in = Manifest(found.raw, found.digest, found.media_type, whole, (), found.annotations)
    return Resolved(pinned, stand_in, from_cache, found.manifests)


def find_image(document: Manifest | Index, fetch: Callable[[Descriptor], bytes], limits: Limits) -> Manifest | Index:
    """From what a reference names, through indexes, to the manifest for this machine.

    containerd's checkpoint index, which names no image, is returned itself. `fetch` gets a manifest or an index whole.
    FormatError when there is none for this machine, or too deep, or with too many layers or bytes: a manifest may claim
    any number, and of a plain tar each chunk is gone through one by one.
    """
    for _ in range(limits.index_depth):
        if isinstance(document, Manifest):
            _check_limits(document.layers, limits)
            return document
        if is_checkpoint_index(document.manifests):
            _check_limits(document.manifests, limits)
            return document
        chosen = document.select()
        document = parse_document(fetch(chosen), chosen.media_type, chosen.digest)
    raise FormatError(f"the index nests deeper than {limits.index_depth} levels")


def _check_limits(layers: Sequence[Descriptor], limits: Limits) -> None:
    size = sum(layer.size for layer in layers)
    if len(layers) > limits.layers:
        raise LimitExceeded(f"the image has {len(layers)} layers, more than {limits.layers}")
    if size > limits.image_bytes:
        raise LimitExceeded(
            f"the manifest says that the layers have {size} bytes, more than {limits.image_bytes}",
            hint="no registry holds so much for one image; the manifest is wrong",
        )


async def resolve_in_thread(
    source: Source, documents: DocumentStore, limits: Limits, *, offline: bool
) -> tuple[Source, Resolved]:
    """`resolve` in a worker thread; with it the source to go on with, which asks no registry when `offline`."""
    if offline:
        source = offline_source(source)
    look = partial(resolve, source, documents, limits, offline=offline)
    return source, await in_thread(look)


def _top(source: Source, documents: DocumentStore, offline: bool) -> tuple[Manifest | Index, bool]:
    reference = source.reference
    digest = reference.digest
    if reference.kind != "registry":
        return source.resolve(), False
    if digest is None and offline:
        digest = _remembered(reference, documents)
        if digest is None:
            raise _not_here(reference)
    if digest is not None:
        cached = _cached(digest, documents)
        if cached is not None:
            return cached, True
        if offline:
            raise _not_here(reference)
    try:
        document = source.resolve()
    except UnavailableError as error:
        digest = _remembered(reference, documents)
        cached = _cached(digest, documents) if digest is not None else None
        if cached is None:
            raise
        log.warning("%s; going on with %s as it was seen last", error.message, digest)
        return cached, True
    documents.put_document(_manifest_key(document.digest), document.raw)
    if reference.digest is None:
        documents.put_document(_reference_key(reference), str(document.digest).encode())
    return document, False


def _cached(digest: Digest, documents: DocumentStore) -> Manifest | Index | None:
    raw = documents.get_document(_manifest_key(digest))
    if raw is None:
        return None
    digest.check(raw, "the cached manifest")
    return parse_document(raw, digest=digest)


def _remembered(reference: Reference, documents: DocumentStore) -> Digest | None:
    raw = documents.get_document(_reference_key(reference))
    return Digest.parse(raw.decode("ascii", "replace")) if raw is not None else None


def _manifest_key(digest: Digest) -> str:
    return f"manifest/{digest}"


def _reference_key(reference: Reference) -> str:
    return f"reference/{reference}"


def _not_here(reference: Reference) -> NotFoundError:
    return NotFoundError(
        f"{reference} is not in this node's cache", hint="mount it once without --offline, or name another --cache-dir"
    )
