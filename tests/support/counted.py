"""A source that counts what is asked of it, as a registry's would: requests, bytes, and which had to wait for which.

Each request takes a moment, so that those that go out together overlap and the round trips come out as behind a link.
Called by tests of what commands fetch.
"""

import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.image import ImageOptions, OpenImage, open_image
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor, Index, Manifest, Reference
from ckptfs.sources import Source
from ckptfs.sources.layout import LayoutSource
from ckptfs.telemetry import NetworkCounters

T = TypeVar("T")

_DELAY = 0.1  # seconds; more than a thread takes to start on a busy machine


class CountedSource:
    def __init__(self, source: Source, counters: NetworkCounters, delay: float = _DELAY) -> None:
        self.source = source
        self.counters = counters
        self.delay = delay

    @property
    def reference(self) -> Reference:
        return self.source.reference

    def resolve(self) -> Manifest | Index:
        began = self.counters.began()
        time.sleep(self.delay)
        document = self.source.resolve()
        self.counters.received(len(document.raw))
        self.counters.ended(began)
        return document

    def fetch(self, descriptor: Descriptor) -> bytes:
        began = self.counters.began()
        time.sleep(self.delay)
        data = self.source.fetch(descriptor)
        self.counters.received(len(data))
        self.counters.ended(began)
        return data

    def blob(self, descriptor: Descriptor) -> Blob:
        return CountedBlob(self.source.blob(descriptor), self.counters, self.delay)


class CountedBlob(Blob):
    def __init__(self, blob: Blob, counters: NetworkCounters, delay: float) -> None:
        self._blob = blob
        self._counters = counters
        self._delay = delay

    @property
    def descriptor(self) -> Descriptor:
        return self._blob.descriptor

    @property
    def size(self) -> int:
        return self._blob.size

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        return b"".join(self.stream(offset, length, attempt=attempt))

    def stream(self, offset: int, length: int, *, attempt: int = 0, patient: bool = False) -> Iterator[bytes]:
        began = self._counters.began()
        time.sleep(self._delay)
        try:
            for at in range(offset, offset + length, 64 * 1024):
                piece = self._blob.read_at(at, min(64 * 1024, offset + length - at))
                self._counters.received(len(piece))
                yield piece
        finally:
            self._counters.ended(began)


def with_layouts(
    layouts: list[Path], cache: Path, work: Callable[[list[OpenImage]], Awaitable[T]]
) -> tuple[T, NetworkCounters]:
    """Open the only image of each layout as commands without a mount do, run `work`, and tell what it fetched."""
    counters = NetworkCounters()
    options = ImageOptions(prefetch=False, background=False, increments=False)

    async def run() -> T:
        opened = [
            open_image(CountedSource(LayoutSource(Reference.parse(f"oci:{path}")), counters), node, options, counters)
            for path in layouts
        ]
        images: list[OpenImage] = []
        try:
            for one in opened:
                images.append(await one.__aenter__())
                await images[-1].ready()
            return await work(images)
        finally:
            for one in reversed(opened[: len(images)]):
                await one.__aexit__(None, None, None)

    node = ChunkCache.open(cache)
    try:
        return trio.run(run), counters
    finally:
        node.close()
