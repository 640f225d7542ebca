"""An open image: the tree that a view shows, the reader of its files, and the tasks that keep both going.

The composition root below the commands: here sources, layers, cache, engine and prefetch meet. Everything that is asked
of an image goes through `OpenImage`; who asks (FUSE, ls, cat, inspect) makes no difference.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.reader import Handle, Reader
from ckptfs.engine.scan import LayerScan
from ckptfs.engine.schedule import Priority
from ckptfs.errors import CkptfsError, IntegrityError, UnavailableError
from ckptfs.image.inner import InodeBlob, within
from ckptfs.image.resolve import Resolved, resolve
from ckptfs.layers import Layer, select_format
from ckptfs.layers.tar import TarFormat
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor
from ckptfs.model.toc import Chunk, Entry, Inode
from ckptfs.model.toc_document import decode_toc, encode_toc
from ckptfs.model.tree import Node, Tree
from ckptfs.prefetch.background import Background, Metadata
from ckptfs.settings import Settings
from ckptfs.sources import Source
from ckptfs.telemetry import NetworkCounters

log = logging.getLogger(__name__)

View = Literal["checkpoint", "raw", "rootfs"]

# Tars that checkpoints are known to hold (podman, CRI-O: docs), each shown as a directory beside it as well.
_KNOWN_TARS = (b"rootfs-diff.tar", b"devshm-checkpoint.tar")
_VOLUMES = b"volumes/"
_DERIVED = 1 << 20  # ranks of derived directories: above every layer
_BACKGROUND_DELAY = 1.0  # seconds; a restore with lazy pages has its first tick before the rest is fetched
_MAX_WAITING = 1024  # reads that wait for the network at the same time


@dataclass(frozen=True, slots=True)
class ImageOptions:
    view: View = "checkpoint"
    offline: bool = False
    strict: bool = False
    prefetch: bool = True
    background: bool = True
    settings: Settings = field(default_factory=Settings)


class OpenImage:
    """Made by `open_image`. Methods run in the event loop; only `lookup`, `listing`, `read` and `ready` wait."""

    def __init__(
        self,
        source: Source,
        resolved: Resolved,
        cache: ChunkCache,
        options: ImageOptions,
        counters: NetworkCounters,
        nursery: trio.Nursery,
    ) -> None:
        sizes = options.settings.sizes
        self.source = source
        self.resolved = resolved
        self.options = options
        self.counters = counters
        self.cache = cache
        self.fetcher = Fetcher(cache, MemoryCache(sizes.memory_cache), options.settings)
        self.reader = Reader(self.fetcher, _MAX_WAITING)
        self.changed: Callable[[int, bytes], None] | None = None
        self.tree = Tree(lambda ino, name: self.changed(ino, name) if self.changed else None)
        self.errors: list[str] = []
        self._nursery = nursery
        self._scans: dict[int, LayerScan] = {}  # rank -> scan
        self._dormant: dict[bytes, Callable[[], None]] = {}  # derived directory -> what starts its scan
        self._broken: dict[int, CkptfsError] = {}
        self._layers: list[Layer] = []
        self._progress = trio.Event()
        self._started_background = False

    # -- opening -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the layers and start what reads them. IntegrityError when strict and a layer cannot be verified."""
        self._nursery.start_soon(self.fetcher.run)
        for rank, descriptor in enumerate(self.resolved.manifest.layers, start=1):
            self._add_layer(self.source.blob(descriptor), descriptor, rank)
        self._derive()

    def _add_layer(self, blob: Blob, descriptor: Descriptor, rank: int) -> None:
        index = self.fetcher.next_layer
        layer = select_format(descriptor).open(blob, index)
        key = f"toc/{descriptor.digest}"
        document = self.cache.get_document(key)
        toc = decode_toc(document, layer=index, layer_digest=str(descriptor.digest)) if document is not None else None
        verified = layer.verification == "chunk" or (toc is not None and toc.verification == "chunk")
        if self.options.strict and not verified:
            raise IntegrityError(
                f"layer {descriptor.digest} ({layer.format}) cannot be verified chunk by chunk",
                hint="mount with --verify auto, or push the image with `ckptfs push`",
            )
        self.tree.begin(rank)
        entries: list[Entry] = []

        def arrived(batch: list[Entry]) -> None:
            entries.extend(batch)
            self._arrived(batch, rank)

        def ended(error: CkptfsError | None) -> None:
            if error is None:
                self._remember(key, list(entries), layer, descriptor)
            entries.clear()
            self._ended(rank, error)

        # With the background switched off, a stream runs only as far as somebody waits for it.
        scan = LayerScan(
            layer,
            self.fetcher,
            arrived,
            ended,
            known=toc is not None,
            eager=self.options.background or not layer.sequential,
        )
        self.fetcher.add_layer(blob, layer, scan if layer.sequential else None)
        self._scans[rank] = scan
        self._layers.append(layer)
        if toc is not None:
            self.tree.add(toc.entries, rank)
            self.tree.finish(rank)
        if toc is None or layer.sequential:
            self._nursery.start_soon(scan.run)

    def _remember(self, key: str, entries: list[Entry], layer: Layer, descriptor: Descriptor) -> None:
        """Keep the layer's table of contents on this node: the next mount needs no scan and no network."""
        document = encode_toc(
            entries, layer_digest=str(descriptor.digest), format=layer.format, verification=layer.verification
        )
        self.cache.put_document(key, document)

    def _arrived(self, entries: list[Entry], rank: int) -> None:
        try:
            self.tree.add(entries, rank)
        except CkptfsError as error:
            self._fail(rank, error)
        self._derive()
        self._notify()

    def _ended(self, rank: int, error: CkptfsError | None) -> None:
        if error is None:
            try:
                self.tree.finish(rank)
            except CkptfsError as bad:
                error = bad
        if error is not None:
            self._fail(rank, error)
        self._derive()
        self._notify()

    def _fail(self, rank: int, error: CkptfsError) -> None:
        if rank not in self._broken:
            log.error("layer %d: %s", rank, error)
            self.errors.append(str(error))
        self._broken[rank] = error

    def _notify(self) -> None:
        self._progress.set()
        self._progress = trio.Event()

    async def ready(self) -> None:
        """Until a first read works: tables of contents that can be had at once are here, streams have started."""
        deadline = self.options.settings.timeouts.mount_ready
        with trio.move_on_after(deadline) as scope:
            while True:
                if self._broken:
                    raise next(iter(self._broken.values()))
                waiting = [s for s in self._scans.values() if not s.complete]
                streams_under_way = all(s.layer.sequential or s.layer.format == "tar" for s in waiting)
                if not waiting or (streams_under_way and self.tree.root.children):
                    break
                for scan in waiting:
                    scan.run_on() if not self.tree.root.children else None
                await self._progress.wait()
        if scope.cancelled_caught:
            raise UnavailableError(f"the image could not be opened within {deadline:g} s")
        if self.options.prefetch:
            self.fetcher.want(Metadata().plan(self.tree), Priority.PREFETCH)
        if self.options.background:
            self._nursery.start_soon(self._background)

    async def _background(self) -> None:
        """Fetch all the rest, a little later or as soon as somebody reads pages from front to back."""
        with trio.move_on_after(_BACKGROUND_DELAY):
            await self.reader.sequential.wait()
        for scan in self._scans.values():
            if scan.layer.sequential:
                scan.run_on()
        while not all(scan.complete for scan in self._scans.values()):
            if self._broken:
                return
            await self._progress.wait()
        self.fetcher.fill(Background().plan(self.tree))

    def quiesce(self) -> None:
        """The mount is about to end: nothing new is fetched unless somebody waits for it."""
        self.fetcher.fill(iter(()))
        self.fetcher.scheduler.forget(Priority.PREFETCH)
        self.fetcher.scheduler.forget(Priority.BACKGROUND)

    # -- names ---------------------------------------------------------------------------------------------------------

    async def lookup(self, parent: Node, name: bytes) -> Node | None:
        """The visible child; None only when the image truly has none. Waits while layers that could have it arrive."""
        node = parent.children.get(name)
        if self.tree.complete():
            return node if node is not None and node.inode is not None else None
        path = parent.path
        path = path + b"/" + name if path else name
        while not self.tree.settled(path, node):
            await self._advance(path)
            node = parent.children.get(name)
        return node if node is not None and node.inode is not None else None

    async def listing(self, directory: Node) -> list[Node]:
        """All visible children, sorted by name; waits until all are known."""
        path = directory.path
        while not self.tree.complete(path):
            await self._advance(path)
        return sorted(directory.visible_children(), key=lambda node: node.name)

    async def find(self, path: bytes) -> Node | None:
        """The node at a relative path, symlinks not followed."""
        node = self.tree.root
        for name in path.split(b"/") if path else ():
            if node.inode is None or not node.inode.is_dir:
                return None
            child = await self.lookup(node, name)
            if child is None:
                return None
            node = child
        return node

    async def _advance(self, path: bytes) -> None:
        """Wait until more is known of `path`; start what has to run for that."""
        for prefix in [p for p in self._dormant if path == p or path.startswith(p + b"/")]:
            self._dormant.pop(prefix)()
        for rank, scan in self._scans.items():
            if not scan.complete:
                if rank in self._broken:
                    raise self._broken[rank]
                scan.run_on()
        await self._progress.wait()

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def open(self, inode: Inode, path: bytes = b"") -> Handle:
        return Handle(inode, path)

    async def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """File bytes; short only at the end of the file."""
        data = self.reader.cached(inode, offset, size)
        return bytes(data if data is not None else await self.reader.read(inode, offset, size))

    # -- tars inside, as directories -----------------------------------------------------------------------------------

    def _derive(self) -> None:
        """Give the tars of a checkpoint that have become visible their directories."""
        if self.options.view != "checkpoint":
            return
        for path, inode in self._tars():
            directory = path.removesuffix(b".tar")
            if self.tree.find(directory) is None:
                self._derive_one(directory, inode)

    def _tars(self) -> Iterator[tuple[bytes, Inode]]:
        for name in _KNOWN_TARS:
            node = self.tree.root.children.get(name)
            if node is not None and node.inode is not None and node.inode.is_file:
                yield name, node.inode
        volumes = self.tree.find(b"volumes")
        for node in list(volumes.visible_children()) if volumes is not None else ():
            if node.inode is not None and node.inode.is_file and node.name.endswith(b".tar"):
                yield _VOLUMES + node.name, node.inode

    def _derive_one(self, directory: bytes, inode: Inode) -> None:
        rank = _DERIVED + len(self._scans)
        blob = InodeBlob(self.reader, inode, "application/vnd.oci.image.layer.v1.tar")
        layer = TarFormat().open(blob, self.fetcher.next_layer)
        scan = LayerScan(
            layer,
            self.fetcher,
            lambda batch: self._arrived([within(entry, inode, directory) for entry in batch], rank),
            lambda error: self._ended(rank, error),
        )
        self._scans[rank] = scan
        self.tree.add([Entry(directory, Inode(0o040755, mtime_ns=inode.mtime_ns))], rank)
        self.tree.begin(rank, directory)
        self._dormant[directory] = lambda: self._nursery.start_soon(scan.run)

    # -- facts ---------------------------------------------------------------------------------------------------------

    @property
    def image_bytes(self) -> int:
        return sum(layer.size for layer in self.resolved.manifest.layers)

    def chunks(self) -> dict[bytes, Chunk]:
        """Every chunk that the view's files need, by key."""
        found: dict[bytes, Chunk] = {}
        for inode in self.tree.inodes.values():
            for extent in inode.extents:
                found[extent.chunk.key] = extent.chunk
        return found

    def cached_bytes(self) -> int:
        """How many of `image_bytes` this node has."""
        chunks = self.chunks()
        missing = [
            chunk for key, chunk in chunks.items() if not self.cache.contains(key) and key not in self.fetcher.memory
        ]
        scanned = all(scan.complete for rank, scan in self._scans.items() if rank < _DERIVED)
        if scanned and not missing:
            return self.image_bytes
        total = sum(chunk.size for chunk in chunks.values()) or 1
        here = total - sum(chunk.size for chunk in missing)
        return min(int(self.image_bytes * here / total), self.image_bytes - 1)

    @property
    def verification(self) -> str:
        """What vouches for the bytes: a digest for every chunk, or for some layers only the transport."""
        return "chunk" if all(layer.verification == "chunk" for layer in self._layers) else "transport"


@asynccontextmanager
async def open_image(
    source: Source, cache: ChunkCache, options: ImageOptions, counters: NetworkCounters
) -> AsyncIterator[OpenImage]:
    """Resolve and open; inside the block the image can be asked at once, see `OpenImage.ready`."""
    began = time.monotonic()
    resolved = await trio.to_thread.run_sync(
        lambda: resolve(source, cache, options.settings.limits, offline=options.offline), abandon_on_cancel=True
    )
    log.debug("resolved %s in %.0f ms", resolved.reference, (time.monotonic() - began) * 1000)
    async with trio.open_nursery() as nursery:
        image = OpenImage(source, resolved, cache, options, counters, nursery)
        try:
            image.start()
            yield image
        finally:
            for scan in image._scans.values():
                scan.stop()
            nursery.cancel_scope.cancel()
