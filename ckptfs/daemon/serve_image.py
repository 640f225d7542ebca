"""The process that keeps a mount: image, FUSE session and control socket under one roof, until one of them ends."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import trio

from ckptfs import __version__
from ckptfs.control.client import MountFiles
from ckptfs.daemon.requests import Announce, MountRequest
from ckptfs.daemon.resident import Resident, keep_house, run_with
from ckptfs.engine.activity import reads_now
from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.recording import ReadRecorder
from ckptfs.errors import MountError
from ckptfs.fuse.mount import MountSession, mount_options
from ckptfs.fuse.operations import Operations
from ckptfs.image import ImageOptions, OpenImage, open_image
from ckptfs.image.residency import Residency, ResidencyMeter
from ckptfs.redaction import redact
from ckptfs.sources import OpenSource, Source
from ckptfs.telemetry import NetworkCounters

log = logging.getLogger(__name__)

_FAILURES = 5  # of readers, the last ones, that a status has with all that is known of them


def run(
    request: MountRequest,
    source: Source,
    reach: OpenSource,
    counters: NetworkCounters,
    mountpoint: str,
    files: MountFiles,
    announce: Announce,
) -> None:
    """Serve until unmounted. `reach` opens other images."""
    size = request.settings.sizes.disk_cache
    if request.ephemeral:
        cache = ChunkCache.ephemeral(size=size, secret=request.cache_key)
    else:
        cache = ChunkCache.open(request.cache_dir, size=size, secret=request.cache_key)
    run_with(cache, _serve, request, source, reach, counters, cache, mountpoint, files, announce)


async def _serve(
    request: MountRequest,
    source: Source,
    reach: OpenSource,
    counters: NetworkCounters,
    cache: ChunkCache,
    mountpoint: str,
    files: MountFiles,
    announce: Announce,
) -> None:
    async with open_image(source, cache, _image_options(request), counters, reach) as image:
        await image.ready()
        operations = Operations(image)
        session = MountSession(operations, mountpoint, request.settings)
        meter, names = ResidencyMeter(image), operations.names

        def status(question: dict[str, Any]) -> dict[str, Any]:
            residency = meter.measure(exact=bool(question.get("exact")))
            found = {**mount_status(image, residency, mountpoint, request), **resident.facts}
            failures = list(operations.failures)[-_FAILURES:]
            found["failures"] = [{**failure, "error": redact(failure["error"])} for failure in failures]
            if question.get("detail"):
                reading = reads_now(image.reader.waits, operations.handles, names, time.monotonic())
                found |= {**_parts(residency), "reading": reading}
            # Ready means that CRIU's metadata is here as well; eager pages, fetched right after it, do not count.
            ready_at = image.metadata_at or resident.ready_at or time.monotonic()
            found["round_trips_to_ready"] = counters.round_trips(ready_at)
            return found

        def activity() -> tuple[int, int]:
            return image.reader.counters.count, image.counters.bytes

        def ready() -> None:
            image.reader.observer = recorder
            image.reader.transfer_rate = request.transfer_rate
            reference = str(image.resolved.reference)
            resident.ready(reference, reference, str(image.resolved.manifest.digest))

        resident = Resident(request, mountpoint, files, announce, status, session.stop)
        recorder = ReadRecorder(request.record, names, request.started) if request.record is not None else None
        async with trio.open_nursery() as nursery:
            await resident.open(nursery)
            nursery.start_soon(keep_house, cache, image.fetcher.memory, activity)
            if recorder is not None:
                nursery.start_soon(recorder.run)
            if request.publish_index and not request.offline:
                nursery.start_soon(_publish_index, image, request)
            try:
                await session.run(mount_options(str(request.reference), allow_other=request.allow_other), ready)
            finally:
                if request.stats is not None:
                    _write_stats(request.stats, status({"exact": True}))
                nursery.cancel_scope.cancel()


def _image_options(request: MountRequest) -> ImageOptions:
    return ImageOptions(
        view=request.view,
        offline=request.offline,
        strict=request.strict,
        prefetch=request.prefetch,
        background=request.background,
        base=request.base,
        settings=request.settings,
    )


def _write_stats(file: Path, status: dict[str, Any]) -> None:
    """MountError: the daemon's log, which tells of it, stays. The command has tried the path before."""
    try:
        file.write_text(json.dumps(status, indent=2) + "\n")
    except OSError as error:
        raise MountError(f"the last status could not be written to {file}: {error.strerror}") from None


async def _publish_index(image: OpenImage, request: MountRequest) -> None:
    from ckptfs.image.publishing import publish_when_streamed
    from ckptfs.sources.upload import RegistryTarget

    target = RegistryTarget(request.reference, request.settings, image.counters, plain_http=request.plain_http)
    await publish_when_streamed(image, target)


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
        "network": network.figures(),
        "reads": reads.figures(),
        "prefetch": {"bytes": fetcher.prefetched_bytes, "used_bytes": fetcher.prefetched_used},
        "profile": {"runs": len(profile.runs), "recordings": profile.recordings} if profile is not None else None,
        "verify": image.verification,
        "errors": [redact(error) for error in image.errors[-20:]],
    }


def _parts(residency: Residency) -> dict[str, Any]:
    layers = [{"name": part.name, "bytes": part.size, "cached_bytes": part.cached} for part in residency.layers]
    roles = {part.name: {"bytes": part.size, "cached_bytes": part.cached} for part in residency.roles}
    return {"layers": layers, "roles": roles}
