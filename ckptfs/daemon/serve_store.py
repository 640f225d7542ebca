"""The process that keeps an additional layer store: open images, FUSE session and control socket under one roof.

What serve_image.py is for the mount of one image. Started by mounting.py.
"""

import logging
import os
import time
from functools import partial
from typing import Any

import trio

from ckptfs import __version__
from ckptfs.control.client import MountFiles
from ckptfs.daemon.requests import Announce, StoreRequest
from ckptfs.daemon.resident import Resident, keep_house, run_with
from ckptfs.engine.activity import reads_now
from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.memory import MemoryCache
from ckptfs.fuse.mount import MountSession, mount_options
from ckptfs.fuse.store_operations import StoreOperations
from ckptfs.image import ImageOptions
from ckptfs.image.layer_store import LayerStore, StoredImage
from ckptfs.image.residency import ResidencyMeter
from ckptfs.model.names import InodeNames
from ckptfs.redaction import redact
from ckptfs.sources import open_source
from ckptfs.telemetry import NetworkCounters

log = logging.getLogger(__name__)

NAME = "layer-store"  # what the mount table and the status call it, in place of an image's reference

# A stream that nobody waits for rests in its thread; these are all that trio would have by default (40), and more.
_THREADS = 4096


def run(request: StoreRequest, mountpoint: str, files: MountFiles, announce: Announce) -> None:
    """Serve until unmounted."""
    size = request.settings.sizes.disk_cache
    cache = ChunkCache.open(request.cache_dir, size=size, secret=request.cache_key)
    run_with(cache, _serve, request, cache, mountpoint, files, announce)


async def _serve(
    request: StoreRequest, cache: ChunkCache, mountpoint: str, files: MountFiles, announce: Announce
) -> None:
    counters, settings = NetworkCounters(), request.settings
    trio.to_thread.current_default_thread_limiter().total_tokens = _THREADS

    reach = partial(open_source, settings=settings, counters=counters, plain_http=request.plain_http)
    memory = MemoryCache(settings.sizes.memory_cache)
    options = ImageOptions(
        view="layers",
        offline=request.offline,
        strict=request.strict,
        prefetch=False,
        background=False,  # until a file of the image is read, see LayerStore
        settings=settings,
        memory=memory,
    )
    async with trio.open_nursery() as nursery:
        store = LayerStore(
            mountpoint, reach, cache, options, counters, nursery, background=request.background and not request.offline
        )
        operations = StoreOperations(store, time.time_ns())
        session = MountSession(operations, mountpoint, settings)
        measured = StoreStatus(store, operations, counters, request)

        def status(question: dict[str, Any]) -> dict[str, Any]:
            now = measured.now(detail=bool(question.get("detail")))
            return {**now, "mountpoint": mountpoint, **resident.facts}

        def ready() -> None:
            resident.ready("the layer store", NAME)

        def activity() -> tuple[int, int]:
            return store.reads.count, store.reads.bytes

        resident = Resident(request, mountpoint, files, announce, status, session.stop)
        await resident.open(nursery)
        nursery.start_soon(store.keep_house)
        nursery.start_soon(keep_house, cache, memory, activity)
        try:
            await session.run(mount_options(NAME, allow_other=request.allow_other, read_only=False), ready)
        finally:
            nursery.cancel_scope.cancel()


class StoreStatus:
    """What the product documentation names for a mount, where it makes sense, and the open images."""

    def __init__(
        self, store: LayerStore, operations: StoreOperations, counters: NetworkCounters, request: StoreRequest
    ) -> None:
        self._store = store
        self._operations = operations
        self._counters = counters
        self._request = request
        self._meters: dict[StoredImage, tuple[ResidencyMeter, InodeNames]] = {}

    def now(self, *, detail: bool) -> dict[str, Any]:
        """`detail`: with what is being read."""
        network, reads, images = self._counters, self._store.reads, self._store.images()
        self._meters = {
            stored: self._meters.get(stored) or (ResidencyMeter(stored.image), InodeNames(stored.image.tree))
            for stored in images
        }
        shown = [self._image(stored) for stored in images]
        errors = [*self._store.errors, *(error for image in shown for error in image["errors"])]
        size, cached = (sum(image[key] for image in shown) for key in ("image_bytes", "cached_bytes"))
        found = {
            "version": __version__,
            "reference": NAME,
            "digest": "",  # each image has its own
            "view": "layers",
            "pid": os.getpid(),
            "seconds": round(time.monotonic() - self._request.started, 3),
            "background": self._request.background,
            "images": shown,
            "image_bytes": size,
            "cached_bytes": cached,
            "complete": size == cached,
            "network": network.figures(),
            "reads": reads.figures(),
            "prefetch": {
                "bytes": sum(stored.image.fetcher.prefetched_bytes for stored in images),
                "used_bytes": sum(stored.image.fetcher.prefetched_used for stored in images),
            },
            "verify": "chunk" if all(image["verify"] == "chunk" for image in shown) else "transport",
            "errors": [redact(error) for error in errors[-20:]],
        }
        if detail:
            found |= {
                "layers": [],
                "roles": {},
                "reading": [read for stored in images for read in self._reading(stored)],
            }
        return found

    def _image(self, stored: StoredImage) -> dict[str, Any]:
        image, manifest = stored.image, stored.image.resolved.manifest
        size = sum(layer.size for layer in manifest.layers)
        # What layers that still arrive have of their bytes is not known; a blob that is read counts as a layer.
        cached = self._meters[stored][0].measure().cached_bytes if image.known else 0
        return {
            "reference": str(stored.reference),
            "digest": str(manifest.digest),
            "layers": len(manifest.layers),
            "image_bytes": size,
            "cached_bytes": min(cached, size),
            "users": self._store.users(stored.reference),
            "verify": image.verification,
            "errors": [redact(error) for error in image.errors[-5:]],
        }

    def _reading(self, stored: StoredImage) -> list[dict[str, Any]]:
        handles = self._operations.handles(stored)
        return reads_now(stored.image.reader.waits, handles, self._meters[stored][1], time.monotonic())
