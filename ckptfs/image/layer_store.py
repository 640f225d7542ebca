"""The images behind an additional layer store: opened when somebody asks for a layer, closed when nobody needs them.

Paths are `<base64 of the image's reference>/<digest>/`, as containers/storage makes them (drivers/overlay/overlay.go:
getAdditionalLayerPath). Which manifest a layer belonged to is kept in the node's cache as long as the layer is in use,
with the number of its users, so that a store that was stopped goes on where it was, and a tag that has moved breaks no
image that was pulled before. Owns the opened images; knows no FUSE. Called by fuse/store_operations.py and
daemon/serve_store.py.
"""

import base64
import binascii
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.reader import ReadCounters
from ckptfs.engine.threads import in_thread
from ckptfs.errors import CkptfsError, FormatError, UsageError, only_error
from ckptfs.image.ahead import fetch_rest
from ckptfs.image.layer_directories import LayerDirectories, toc_digest
from ckptfs.image.opened import ImageOptions, OpenImage, open_image
from ckptfs.image.resolve import resolve_in_thread
from ckptfs.model.oci import Digest, Reference
from ckptfs.sources import OpenSource
from ckptfs.telemetry import NetworkCounters

log = logging.getLogger(__name__)

_FRESH = 3.0  # seconds in which the registry is not asked again what it has just answered, or failed to answer
_IDLE = 30.0  # seconds that an image which nobody knows any more stays open


@dataclass(eq=False, slots=True)
class StoredImage:
    """One open image. `slot` is its own in the life of the store; `held` says whether the kernel knows any of it."""

    slot: int
    reference: Reference
    image: OpenImage
    directories: LayerDirectories
    held: Callable[[], bool] = lambda: False
    fetching: bool = False
    idle_since: float | None = None
    end: trio.Event = field(default_factory=trio.Event)

    @property
    def broken(self) -> bool:
        """Whether a layer of it cannot be read; another try needs the image to be opened anew."""
        try:
            self.image.raise_broken()
        except CkptfsError:
            return True
        return False


@dataclass(slots=True)
class _Use:
    """What is remembered of a layer: which manifest has it, how many use it."""

    manifest: Digest
    count: int


class LayerStore:
    """The open images of one store. All methods run in the event loop."""

    def __init__(
        self,
        name: str,
        reach: OpenSource,
        cache: ChunkCache,
        options: ImageOptions,
        counters: NetworkCounters,
        nursery: trio.Nursery,
        *,
        background: bool,
    ) -> None:
        """`name` tells stores of one cache apart. `background`: fetch the rest of an image once a file is read."""
        self.errors: list[str] = []
        self.reads = ReadCounters()
        self._name = name
        self._reach = reach
        self._cache = cache
        self._options = options
        self._counters = counters
        self._nursery = nursery
        self._background = background
        self._images: dict[int, StoredImage] = {}
        self._next_slot = 1
        self._uses: dict[Reference, dict[str, _Use]] = {}
        self._locks: dict[Reference, trio.Lock] = {}
        # What was answered last and when: that an image has no such layer, or (no digest) why it cannot be opened.
        self._answers: dict[tuple[Reference, Digest | None], tuple[float, CkptfsError | None]] = {}

    # -- layers --------------------------------------------------------------------------------------------------------

    async def find(self, reference: Reference, digest: Digest) -> StoredImage | None:
        """The image with that layer, or with that table of contents; None when `reference` is no image that has it."""
        async with self._lock(reference):
            for stored in self.images(reference):
                if str(digest).encode() in stored.directories and not stored.broken:
                    stored.idle_since = None
                    return stored
            since, error = self._answers.get((reference, None), (-_FRESH, None))
            absent, _ = self._answers.get((reference, digest), (-_FRESH, None))
            now = time.monotonic()
            if error is not None and now - since < _FRESH:
                raise error
            if now - absent < _FRESH:
                return None
            try:
                found = await self._open_with(reference, digest)
            except CkptfsError as failure:
                self._answers[reference, None] = time.monotonic(), failure
                raise
            if found is None:
                self._answers[reference, digest] = time.monotonic(), None
            return found

    async def use(self, reference: Reference, digest: Digest) -> None:
        """One more user of the layer."""
        async with self._lock(reference):
            uses = await self._uses_of(reference)
            found = [s for s in self.images(reference) if str(digest).encode() in s.directories]
            if str(digest) in uses:
                uses[str(digest)].count += 1
            elif found:
                uses[str(digest)] = _Use(found[-1].image.resolved.manifest.digest, 1)
            await self._keep_uses(reference)

    async def release(self, reference: Reference, digest: Digest) -> None:
        """One user less; what nobody uses is forgotten, and closed once the kernel has forgotten it too."""
        async with self._lock(reference):
            uses = await self._uses_of(reference)
            use = uses.get(str(digest))
            if use is not None:
                use.count -= 1
                if use.count <= 0:
                    del uses[str(digest)]
                await self._keep_uses(reference)

    def read(self, stored: StoredImage) -> None:
        """A file of the image is about to be read."""
        if self._background and not stored.fetching:
            stored.fetching = True
            stored.image.nursery.start_soon(fetch_rest, stored.image)

    # -- what there is -------------------------------------------------------------------------------------------------

    def images(self, reference: Reference | None = None) -> list[StoredImage]:
        """The open images, those of `reference` if one is given."""
        return [s for s in self._images.values() if not s.end.is_set() and reference in (None, s.reference)]

    def image(self, slot: int) -> StoredImage | None:
        return self._images.get(slot)

    def users(self, reference: Reference) -> int:
        """How often layers of the image are in use."""
        return sum(use.count for use in self._uses.get(reference, {}).values())

    # -- opening and closing -------------------------------------------------------------------------------------------

    async def _open_with(self, reference: Reference, digest: Digest) -> StoredImage | None:
        """Open the image that had the layer when it was pulled, else the one that the registry has now."""
        use = (await self._uses_of(reference)).get(str(digest))
        source = self._reach(reference.pinned(use.manifest) if use is not None else reference)
        limits = self._options.settings.limits
        _, resolved = await resolve_in_thread(source, self._cache, limits, offline=self._options.offline)
        layers = resolved.manifest.layers
        by_toc = all(layer.digest != digest for layer in layers)
        if by_toc and all(toc_digest(layer) != digest for layer in layers):
            return None
        try:
            stored = await self._nursery.start(
                self._hold, reference, reference.pinned(resolved.manifest.digest), by_toc
            )
        except BaseExceptionGroup as group:
            raise only_error(group) from None
        assert isinstance(stored, StoredImage)
        return stored

    async def _hold(
        self, reference: Reference, pinned: Reference, by_toc: bool, *, task_status: trio.TaskStatus[StoredImage]
    ) -> None:
        """Keep one image open until it is to end; a bug in it ends only this image."""
        stored: StoredImage | None = None
        try:
            source = self._reach(pinned)
            async with open_image(source, self._cache, self._options, self._counters, self._reach) as image:
                image.reader.counters = self.reads
                directories = LayerDirectories(image, by_toc=by_toc)
                await directories.show()
                stored = StoredImage(self._next_slot, reference, image, directories)
                self._next_slot += 1
                self._images[stored.slot] = stored
                log.info("%s is open", image.resolved.reference)
                task_status.started(stored)
                await stored.end.wait()
        except Exception as error:
            if stored is None:
                raise
            log.error("%s ended unexpectedly", reference, exc_info=error)
            self.errors.append(f"internal error: {type(error).__name__}")
        finally:
            if stored is not None:
                stored.end.set()
                del self._images[stored.slot]
                log.info("%s is closed", reference)

    async def keep_house(self) -> None:
        """Close, once in a while, what nobody needs: an image that the kernel does not know of."""
        while True:
            await trio.sleep(_IDLE / 10)
            self.close_unused()

    def close_unused(self, *, idle: float = _IDLE) -> None:
        now = time.monotonic()
        for stored in self.images():
            if stored.held() or self._lock(stored.reference).locked():
                stored.idle_since = None
            elif stored.idle_since is None:
                stored.idle_since = now
            if stored.idle_since is not None and now - stored.idle_since >= idle:
                stored.end.set()
        self._answers = {key: answer for key, answer in self._answers.items() if now - answer[0] < _FRESH}
        needed = {stored.reference for stored in self._images.values()}
        for reference in [r for r, lock in self._locks.items() if r not in needed and not lock.locked()]:
            del self._locks[reference]
            self._uses.pop(reference, None)

    def _lock(self, reference: Reference) -> trio.Lock:
        return self._locks.setdefault(reference, trio.Lock())

    # -- what is remembered --------------------------------------------------------------------------------------------

    async def _uses_of(self, reference: Reference) -> dict[str, _Use]:
        if reference not in self._uses:
            raw = await in_thread(self._cache.get_document, self._key(reference), finish=True)
            self._uses[reference] = _parsed(raw) if raw is not None else {}
        return self._uses[reference]

    async def _keep_uses(self, reference: Reference) -> None:
        uses, key = self._uses[reference], self._key(reference)
        if uses:
            raw = json.dumps({layer: [str(use.manifest), use.count] for layer, use in uses.items()}).encode()
            await in_thread(self._cache.put_document, key, raw, finish=True)
        else:
            await in_thread(self._cache.delete_document, key, finish=True)

    def _key(self, reference: Reference) -> str:
        return f"layer-store/{self._name}/{reference}"


def reference_of(name: bytes) -> Reference | None:
    """The reference that a directory of the store stands for; None where it can be none.

    Only of registries: whoever can look up names must not make us open files of this machine. (No reference has a "/"
    in its base64: that takes a "?", a DEL or bytes that are not ASCII.)
    """
    try:
        reference = Reference.parse(base64.b64decode(name, validate=True).decode("ascii"))
    except (binascii.Error, UnicodeDecodeError, UsageError):
        return None
    return reference if reference.kind == "registry" else None


def name_of(reference: Reference) -> bytes:
    """The directory of a reference."""
    return base64.b64encode(str(reference).encode())


def digest_of(name: bytes) -> Digest | None:
    """The digest that is a directory's name; None where it is none."""
    try:
        return Digest.parse(name.decode("ascii"))
    except (UnicodeDecodeError, FormatError):
        return None


def _parsed(raw: bytes) -> dict[str, _Use]:
    """What was remembered; nothing of what does not make sense."""
    try:
        return {
            str(layer): _Use(Digest.parse(digest), int(count)) for layer, (digest, count) in json.loads(raw).items()
        }
    except (ValueError, TypeError, AttributeError, FormatError):
        return {}
