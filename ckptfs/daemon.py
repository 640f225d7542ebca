"""The process that keeps a mount: image, FUSE session and control socket under one roof, until one of them ends."""

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio

from ckptfs import __version__
from ckptfs.control.client import MountFiles, write_state
from ckptfs.control.exposition import exposition
from ckptfs.control.metrics import open_port
from ckptfs.control.ready import notify, tell
from ckptfs.control.server import ControlServer
from ckptfs.engine.activity import reads_now
from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.recording import ReadRecorder
from ckptfs.errors import only_error
from ckptfs.fuse.mount import MountSession, mount_options
from ckptfs.fuse.operations import Operations
from ckptfs.hardening import release_memory, settle_garbage_collector
from ckptfs.image import ImageOptions, OpenImage, open_image
from ckptfs.image.residency import Residency, ResidencyMeter
from ckptfs.model.oci import Reference
from ckptfs.mounting import MountRequest
from ckptfs.redaction import redact
from ckptfs.sources import Source
from ckptfs.telemetry import NetworkCounters

log = logging.getLogger(__name__)

_AT_REST = 15.0  # seconds without a read or a byte from the network after which the memory cache is given back
_FRAGMENTED = 60.0  # seconds of reading without a pause: 50 of 110 MiB were holes in the heap after four minutes
_REFRESH = 5.0  # seconds; looks at one directory and at the end of the files that others write: 0.1 ms


def run(
    request: MountRequest,
    source: Source,
    reach: Callable[[Reference], Source],
    counters: NetworkCounters,
    mountpoint: str,
    files: MountFiles,
    writer: int | None,
) -> None:
    """Serve until unmounted. `reach` opens other images.

    The parent waits at the pipe `writer` for the first status; None in foreground.
    """
    size = request.settings.sizes.disk_cache
    if request.ephemeral:
        cache = ChunkCache.ephemeral(size=size)
    else:
        cache = ChunkCache.open(request.cache_dir, size=size, secret=request.cache_key)
    try:
        cache.require_key()
        trio.run(_serve, request, source, reach, counters, cache, mountpoint, files, writer)
    except BaseExceptionGroup as group:
        raise only_error(group) from None
    finally:
        cache.close()


async def _serve(
    request: MountRequest,
    source: Source,
    reach: Callable[[Reference], Source],
    counters: NetworkCounters,
    cache: ChunkCache,
    mountpoint: str,
    files: MountFiles,
    writer: int | None,
) -> None:
    options = ImageOptions(
        view=request.view,
        offline=request.offline,
        strict=request.strict,
        prefetch=request.prefetch,
        background=request.background,
        base=request.base,
        settings=request.settings,
    )
    async with open_image(source, cache, options, counters, reach) as image:
        await image.ready()
        operations = Operations(image)
        session = MountSession(operations, mountpoint, request.settings)
        meter, names = ResidencyMeter(image), operations.names
        facts: dict[str, Any] = {"metrics": None}

        def status(question: dict[str, Any]) -> dict[str, Any]:
            residency = meter.measure(exact=bool(question.get("exact")))
            found = {**mount_status(image, residency, mountpoint, request), **facts}
            if question.get("detail"):
                reading = reads_now(image.reader.waits, operations.handles, names, time.monotonic())
                found |= {**_parts(residency), "reading": reading}
            ready_at = found.pop("ready_at", time.monotonic())
            # Ready means that CRIU's metadata is here as well; eager pages, fetched right after it, do not count.
            found["round_trips_to_ready"] = counters.round_trips(image.metadata_at or ready_at)
            return found

        def ready() -> None:
            now = time.monotonic()
            facts["ready_ms"] = round((now - request.started) * 1000, 1)
            facts["ready_at"] = now
            write_state(
                files, {"mountpoint": mountpoint, "reference": str(image.resolved.reference), "pid": os.getpid()}
            )
            log.info("%s is mounted on %s after %.0f ms", image.resolved.reference, mountpoint, facts["ready_ms"])
            settle_garbage_collector()
            image.reader.observer = recorder
            image.reader.transfer_rate = request.transfer_rate
            if request.ready_fd is not None:
                tell(request.ready_fd)
            if writer is None:
                notify("READY=1")
            else:
                os.write(writer, json.dumps(status({})).encode() + b"\n")
                os.close(writer)

        def stop(_: dict[str, Any]) -> dict[str, int]:
            session.stop()
            return {"pid": os.getpid()}

        recorder = ReadRecorder(request.record, names, request.started) if request.record is not None else None
        async with trio.open_nursery() as nursery:
            if request.metrics is not None:
                port = await open_port(request.metrics, lambda: exposition([status({})]))
                facts["metrics"] = port.address
                nursery.start_soon(port.run)
            nursery.start_soon(_keep_house, cache, image)
            if recorder is not None:
                nursery.start_soon(recorder.run)
            if request.publish_index and not request.offline:
                nursery.start_soon(_publish_index, image, request)
            nursery.start_soon(ControlServer(files, {"status": status, "stop": stop}).run)
            try:
                await session.run(mount_options(str(request.reference), allow_other=request.allow_other), ready)
            finally:
                if request.stats is not None:
                    with suppress(OSError):
                        request.stats.write_text(json.dumps(status({"exact": True}), indent=2) + "\n")
                nursery.cancel_scope.cancel()


async def _publish_index(image: OpenImage, request: MountRequest) -> None:
    from ckptfs.image.publishing import publish_when_streamed
    from ckptfs.sources.upload import RegistryTarget

    target = RegistryTarget(request.reference, request.settings, image.counters, plain_http=request.plain_http)
    await publish_when_streamed(image, target)


async def _keep_house(cache: ChunkCache, image: OpenImage) -> None:
    """Let go of what is not needed: files that other processes have evicted, and memory when nobody reads any more."""
    seen, quiet, held = (0, 0), 0.0, 0.0
    while True:
        await trio.sleep(_REFRESH)
        await trio.to_thread.run_sync(cache.refresh, abandon_on_cancel=True)
        now = (image.reader.counters.count, image.counters.bytes)
        quiet = quiet + _REFRESH if now == seen else 0.0
        seen = now
        held = held + _REFRESH if not quiet else 0.0
        if _AT_REST <= quiet < _AT_REST + _REFRESH:
            image.fetcher.memory.clear()
            release_memory()
        elif held >= _FRAGMENTED:
            held = 0.0
            await trio.to_thread.run_sync(release_memory, abandon_on_cancel=True)


def mount_status(image: OpenImage, residency: Residency, mountpoint: str, request: MountRequest) -> dict[str, Any]:
    """The fields that product documentation names; names and meanings are stable."""
    network, reads, fetcher, profile = image.counters, image.reader.counters, image.fetcher, image.profile
    cached = residency.cached_bytes
    return {
        "version": __version__,
        "mountpoint": mountpoint,
        "reference": str(request.reference),
        "digest": str(image.resolved.manifest.digest),
        "view": request.view,
        "pid": os.getpid(),
        "seconds": round(time.monotonic() - request.started, 3),
        "background": request.background,
        "image_bytes": image.image_bytes,
        "cached_bytes": cached,
        "complete": cached == image.image_bytes,
        "network": {
            "requests": network.requests,
            "bytes": network.bytes,
            "retries": network.retries,
            "errors": network.errors,
            "in_flight": network.in_flight,
        },
        "reads": {
            "count": reads.count,
            "bytes": reads.bytes,
            "memory_hits": reads.memory_hits,
            "disk_hits": reads.disk_hits,
            "misses": reads.misses,
            "waiting": reads.waiting,
            "waits": reads.waits,
            "waited_ms": round(reads.waited_ms, 3),
            "wait_ms_p50": reads.wait_ms(0.5),
            "wait_ms_p99": reads.wait_ms(0.99),
        },
        "prefetch": {"bytes": fetcher.prefetched_bytes, "used_bytes": fetcher.prefetched_used},
        "profile": {"runs": len(profile.runs), "recordings": profile.recordings} if profile is not None else None,
        "verify": image.verification,
        "errors": [redact(error) for error in image.errors[-20:]],
    }


def _parts(residency: Residency) -> dict[str, Any]:
    layers = [{"name": part.name, "bytes": part.size, "cached_bytes": part.cached} for part in residency.layers]
    roles = {part.name: {"bytes": part.size, "cached_bytes": part.cached} for part in residency.roles}
    return {"layers": layers, "roles": roles}
