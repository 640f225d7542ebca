"""`ckptfs pull`: the eager way. Everything is fetched and written to a directory, as an extraction would have it.

The same views as a mount, and the same image underneath; nothing of it goes through the node's cache, which a pull
neither fills nor uses: it is what lazy is measured against. Blocks; called by the command line and by tests.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.disk import Buffer
from ckptfs.engine.schedule import Priority
from ckptfs.errors import only_error
from ckptfs.image import ImageOptions, OpenImage, View, open_image
from ckptfs.model.oci import Digest, Reference
from ckptfs.model.toc import Chunk, Inode
from ckptfs.pull.contents import Contents
from ckptfs.pull.destination import Destination, Directories, translated
from ckptfs.settings import Settings
from ckptfs.sources import OpenSource, Source
from ckptfs.telemetry import NetworkCounters

__all__ = ["PullProgress", "PullResult", "pull"]

_WORKERS = 8
_UNBOUNDED = 1 << 60  # bytes: what layers that are streams unpack to; it lies on the disk that is written to


@dataclass(slots=True)
class PullProgress:
    """Bytes; to be read by another thread while `pull` runs. `image`: of the layers, compressed."""

    image: int = 0
    written: int = 0
    to_write: int = 0


@dataclass(frozen=True, slots=True)
class PullResult:
    """What is there now. `digest`: of the image's manifest. `written` are bytes of files, holes not counted.

    omitted    how many things this user or file system does not allow (devices, attributes); `left_out` names some.
    """

    digest: Digest
    layout: str
    files: int
    written: int
    image_bytes: int
    omitted: int
    left_out: tuple[str, ...]


def pull(
    source: Source,
    directory: Path,
    open_source: OpenSource,
    counters: NetworkCounters,
    *,
    view: View = "checkpoint",
    base: Reference | None = None,
    settings: Settings | None = None,
    progress: PullProgress | None = None,
) -> PullResult:
    """Write the image to `directory`, which appears when all of it is there, and not at all after an error."""
    options = ImageOptions(
        view=view,
        base=base,
        prefetch=False,
        background=False,
        increments=False,
        remember=False,
        settings=settings or Settings(),
    )
    with Destination(directory) as destination:
        cache = ChunkCache.ephemeral(destination.target.parent, size=_UNBOUNDED)
        try:
            return trio.run(_pull, source, destination, open_source, counters, options, cache, progress)
        except BaseExceptionGroup as group:
            raise only_error(group) from None
        finally:
            cache.close()


async def _pull(
    source: Source,
    destination: Destination,
    open_source: OpenSource,
    counters: NetworkCounters,
    options: ImageOptions,
    cache: ChunkCache,
    progress: PullProgress | None,
) -> PullResult:
    progress = progress or PullProgress()
    async with open_image(source, cache, options, counters, open_source) as image:
        progress.image = image.image_bytes
        await _know_everything(image)
        extraction = _Extraction(image, destination)
        contents = extraction.contents
        await trio.to_thread.run_sync(extraction.begin)
        progress.to_write = contents.total
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, contents, progress)
            async with trio.open_nursery() as workers:
                for _ in range(_WORKERS):
                    workers.start_soon(_work, contents)
            nursery.cancel_scope.cancel()
        image.raise_broken()
        await trio.to_thread.run_sync(extraction.finish)
        return PullResult(
            image.resolved.manifest.digest,
            str(image.layout),
            extraction.count,
            contents.written,
            image.image_bytes,
            destination.omitted,
            tuple(destination.left_out),
        )


async def _know_everything(image: OpenImage) -> None:
    """Until every name of the view and every chunk of every file is known."""
    pending = [image.tree.root]
    while pending:
        children = await image.listing(pending.pop())
        pending += [node for node in children if node.inode is not None and node.inode.is_dir]
    image.raise_broken()
    await image.tables.load_all()


async def _work(contents: Contents) -> None:
    await trio.to_thread.run_sync(contents.work, abandon_on_cancel=True)


async def _watch(contents: Contents, progress: PullProgress) -> None:
    """Until cancelled, by the end or by a failure: then nothing is written any more."""
    try:
        while True:
            await trio.sleep(0.1)
            progress.written = contents.written
    finally:
        contents.stop()


class _Extraction:
    """The tree of an open image, all of which is known, on its way into the destination. One thread at a time."""

    def __init__(self, image: OpenImage, destination: Destination) -> None:
        self.count = 0
        self._image = image
        self._destination = destination
        self._directories: list[tuple[bytes, Inode]] = []
        self._links: list[tuple[bytes, bytes]] = []

        async def fetch(chunk: Chunk) -> Buffer:
            return await image.fetcher.get(chunk, Priority.DEMAND)

        def late(chunk: Chunk) -> Buffer:
            return trio.from_thread.run(fetch, chunk)

        self.contents = Contents(image.fetcher, destination, image.options.settings.sizes, late)

    def begin(self) -> None:
        """Make all that has no bytes, and list what has."""
        with translated(self._destination.target):
            self._begin()
        self.contents.prepare()

    def finish(self) -> None:
        """Hard links, and what describes directories, from the inside out; then show the result."""
        with translated(self._destination.target):
            self._finish()
        self._destination.show()

    def _begin(self) -> None:
        where = Directories(self._destination.top)
        first: dict[int, bytes] = {}
        try:
            for node in self._image.tree.walk():
                inode = node.inode
                if inode is None:
                    continue
                path = node.path
                if inode.is_dir:
                    self._directories.append((path, inode))
                    if path:
                        self._destination.make(where, path, inode)
                    continue
                self.count += 1
                target = first.setdefault(inode.ino, path)
                if target != path:
                    self._links.append((target, path))
                elif inode.is_file:
                    self._file(where, path, inode)
                else:
                    self._destination.make(where, path, inode)
        finally:
            where.close()

    def _file(self, where: Directories, path: bytes, inode: Inode) -> None:
        if len(inode.extents):
            self.contents.add(path, inode)
            return
        file = self._destination.create(where, path)
        try:
            os.ftruncate(file, inode.size)
            self._destination.dress(file, path, inode)
        finally:
            os.close(file)

    def _finish(self) -> None:
        sources, targets = Directories(self._destination.top), Directories(self._destination.top)
        try:
            for source, target in self._links:
                self._destination.link(sources, source, targets, target)
            for path, inode in reversed(self._directories):
                self._destination.dress(targets.at(path), path, inode)
        finally:
            sources.close()
            targets.close()
