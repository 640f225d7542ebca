"""An open image: the tree that a view shows, the reader of its files, and the tasks that keep both going.

The composition root below the commands: here sources, layers, cache, engine and prefetch meet. Everything that is asked
of an image goes through `OpenImage`; who asks (FUSE, ls, cat, inspect) makes no difference.
"""

import logging
import stat
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Literal, NamedTuple

import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.memory import MemoryCache
from ckptfs.engine.reader import Handle, Reader
from ckptfs.engine.scan import LayerScan
from ckptfs.engine.shared_cells import SharedCells
from ckptfs.errors import CkptfsError, IntegrityError, UnavailableError
from ckptfs.image.broken import Again, Broken
from ckptfs.image.indexed import ChunkTables
from ckptfs.image.inner import InodeBlob
from ckptfs.image.remembered import LayerMemory
from ckptfs.image.resolve import Resolved, resolve_in_thread
from ckptfs.layers import Layer, open_indexed, select_format
from ckptfs.layers.grid import Grid
from ckptfs.layers.protocols import LayerFormat, OtherFormat, SideDocument
from ckptfs.model.blob import Blob
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.index import IndexedLayer
from ckptfs.model.node import Node
from ckptfs.model.oci import Descriptor, Digest, Manifest, Reference
from ckptfs.model.profile import Profile
from ckptfs.model.toc import Chunk, Entry, Inode, prefixed
from ckptfs.model.tree import Tree, Whiteouts
from ckptfs.settings import Settings
from ckptfs.sources import OpenSource, Source
from ckptfs.telemetry import NetworkCounters

if TYPE_CHECKING:
    from ckptfs.image.side import Found

log = logging.getLogger(__name__)

View = Literal["checkpoint", "raw", "rootfs", "layers"]

_MAX_WAITING = 1024  # reads that wait for the network at the same time


class ImageOptions(NamedTuple):
    view: View = "checkpoint"
    offline: bool = False
    strict: bool = False
    prefetch: bool = True
    background: bool = True
    base: Reference | None = None
    only_checkpoints: bool = False  # FormatError for any other image, which would be shown as it is
    increments: bool = True  # fetch of a pages file only what an earlier image of the repository has not
    remember: bool = True  # keep what scans learn of layers for the next mount
    settings: Settings = Settings()
    memory: MemoryCache | None = None  # shared by several images, in place of one that `settings` sizes


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
        self.nursery = nursery
        self.cells = SharedCells(cache)
        self.chunk_digests: dict[int, ChunkDigest] = {}  # of layers whose chunks the image's index tells, by number
        memory = options.memory or MemoryCache(sizes.memory_cache)
        self.fetcher = Fetcher(self.cells, memory, options.settings, counters)
        self.tables = ChunkTables(cache, options.settings.limits)
        self.reader = Reader(self.fetcher, _MAX_WAITING, self.tables.parts.learn)
        self.memory = LayerMemory(cache, options.settings, learning=options.remember)
        self._earlier: list[Tree] = []
        self.tree = Tree(limits=self.options.settings.limits)
        self.layout = ""
        self.errors: list[str] = []
        self.profile: Profile | None = None  # what recorded restores have read, once it has been found
        self.metadata_at: float | None = None  # monotonic: when all of CRIU's metadata had been fetched
        self.distrusted: Callable[[int], None] | None = None  # told of layers that have served bytes which may be wrong
        self.arrived: Callable[[], None] | None = None  # told when entries have come, to derive more from them
        self.dormant: dict[bytes, Callable[[], None]] = {}  # directory -> what starts to fill it once it is looked into
        self.progress = trio.Event()  # replaced and set whenever more is known
        self._scans: dict[int, LayerScan] = {}  # rank -> scan
        self._broken = Broken(options.settings.timeouts.retry_cap)
        self._layers: dict[int, tuple[Descriptor, Layer]] = {}  # by the fetcher's number
        self._whole: set[Digest] = set()  # plain tars that have been hashed from end to end

    def show_new_tree(self) -> Tree:
        """Start the view's tree anew; what was built so far stays readable, see `find_in_checkpoint`."""
        self._earlier.append(self.tree)
        self.tree = Tree(limits=self.options.settings.limits)
        return self.tree

    # -- layers --------------------------------------------------------------------------------------------------------

    @property
    def next_rank(self) -> int:
        """A rank above all that are used."""
        return max(self._scans, default=0) + 1

    async def find_side_documents(self, source: Source, manifest: Manifest) -> "Found":
        """What is known of an image's layers outside of them; see side.py."""
        from ckptfs.image.side import find_side_documents  # not for images that bring their index along

        how = {"offline": self.options.offline, "strict": self.options.strict}
        return await find_side_documents(source, manifest, self.cache, self.memory, self.options.settings, **how)

    def add_layer(
        self,
        blob: Blob,
        rank: int,
        *,
        prefix: bytes = b"",
        tree: Tree | None = None,
        whiteouts: Whiteouts = "merge",
        indexed: IndexedLayer | None = None,
        side: SideDocument | None = None,
        instead: tuple[int, LayerFormat] | None = None,
    ) -> None:
        """Show a layer's entries under `prefix`; what the node remembers of it is shown at once, the rest as it comes.

        `indexed` is what the image's own index says of the layer, `side` what was found elsewhere (side.py).
        `instead`: the number that the layer has, and the format that it has turned out to be of.
        IntegrityError when strict and the layer cannot be verified.
        """
        descriptor, settings = blob.descriptor, self.options.settings
        index, format_ = instead or (self.fetcher.next_layer, None)
        layer: Layer
        known: Sequence[Entry] | None
        if indexed is not None:
            layer, known = open_indexed(blob, index, settings, indexed.chunk_digest), indexed.entries
            self.chunk_digests[index] = indexed.chunk_digest
            for file in indexed.files:
                self.tables.add(file, blob, index)
        elif (side := self.memory.index(descriptor) or side) is not None:
            layer = beside = side.open(blob, index)
            known = beside.entries if beside.entries is not None else self.memory.entries(layer, index, descriptor)
        else:
            layer = (format_ or select_format(descriptor)).open(blob, index, settings)
            known = self.memory.entries(layer, index, descriptor)
        if self.options.strict and layer.verification != "chunk":
            raise IntegrityError(
                f"layer {descriptor.digest} ({layer.format}) cannot be verified chunk by chunk",
                hint="give --verify auto, or push the image with `ckptfs push`",
            )
        self.memory.prepare(layer)
        tree = self.tree if tree is None else tree
        tree.begin(rank, prefix)
        entries: list[Entry] = []

        def arrived(batch: list[Entry]) -> None:
            entries.extend(batch)
            self.add_entries(tree, prefixed(batch, prefix), rank, whiteouts)

        def ended(error: CkptfsError | None) -> None:
            if isinstance(error, OtherFormat) and not self.options.strict:
                log.warning("%s", error.message)
                self.add_layer(blob, rank, prefix=prefix, tree=tree, whiteouts=whiteouts, instead=(index, error.format))
                self.notify()
                return
            if error is None:
                self.nursery.start_soon(self.memory.keep, entries, layer, descriptor)
            self.finish(tree, rank, error, scan.run_on)

        # With the background switched off, a stream runs only as far as somebody waits for it.
        eager = self.options.background or not layer.sequential
        scan = LayerScan(layer, self.fetcher, arrived, ended, number=index, known=known is not None, eager=eager)
        inside, sequence = isinstance(blob, InodeBlob), scan if layer.sequential else None
        self.fetcher.add_layer(blob, layer, sequence, inside=inside, number=index)
        self._scans[rank] = scan
        self._layers[index] = (descriptor, layer)
        if known is not None:
            self.add_entries(tree, prefixed(known, prefix), rank, whiteouts)
            self.finish(tree, rank, None)
        if known is None or layer.sequential:
            self.nursery.start_soon(scan.run)

    def raw_file(self, blob: Blob) -> Inode:
        """A file whose bytes are those of a blob, as they are. Nothing vouches for them but the transport."""
        from ckptfs.layers.tar import TarFormat

        descriptor, number = blob.descriptor, self.fetcher.next_layer
        layer = TarFormat().open(blob, number, self.options.settings)
        self.fetcher.add_layer(blob, layer)
        self._layers[number] = (descriptor, layer)
        # A grid of its own: the chunks of a compressed layer are cut from the decoded stream and have the digest's.
        grid = Grid(f"{descriptor.digest}/raw", number, self.options.settings.sizes.grid, descriptor.size)
        extents = grid.extents(((0, descriptor.size, 0),)) if descriptor.size else ()
        return Inode(stat.S_IFREG | 0o444, size=descriptor.size, extents=extents)

    def add_scan(self, rank: int, scan: LayerScan) -> None:
        """A scan that somebody else started the layer of."""
        self._scans[rank] = scan

    def add_entries(self, tree: Tree, entries: Sequence[Entry], rank: int, whiteouts: Whiteouts) -> None:
        try:
            tree.add(entries, rank, whiteouts=whiteouts)
        except CkptfsError as error:
            self._fail(rank, error)
        self.notify()

    def finish(self, tree: Tree, rank: int, error: CkptfsError | None, again: Again | None = None) -> None:
        """The layer is complete, or is not; `again` begins another try, for an error that another try can help."""
        if error is None:
            try:
                tree.finish(rank)
            except CkptfsError as bad:
                error = bad
        if error is not None:
            self._fail(rank, error, again)
        else:
            self._broken.mended(rank)
        self.notify()

    def _fail(self, rank: int, error: CkptfsError, again: Again | None = None) -> None:
        if rank not in self._broken:
            log.error("layer %d: %s", rank, error)
            self.errors.append(str(error))
        self._broken.add(rank, error, again)
        scan = self._scans.get(rank)
        if isinstance(error, IntegrityError) and self.distrusted is not None and scan and scan.number is not None:
            self.distrusted(scan.number)

    def notify(self) -> None:
        if self.arrived is not None:
            self.arrived()
        self.progress.set()
        self.progress = trio.Event()

    # -- life ----------------------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Until a first read works: tables of contents that can be had at once are here, streams have started."""
        deadline = self.options.settings.timeouts.mount_ready
        with trio.move_on_after(deadline) as scope:
            while True:
                self.raise_broken()
                waiting = [scan for scan in self._scans.values() if not scan.complete]
                progressive = all(scan.layer.sequential or scan.layer.format == "tar" for scan in waiting)
                if not waiting or (progressive and self.tree.root.children):
                    break
                if not self.tree.root.children:
                    self.run_on()
                await self.progress.wait()
        if scope.cancelled_caught:
            raise UnavailableError(f"the image could not be opened within {deadline:g} s")

    def run_on(self, ranks: Collection[int] | None = None) -> None:
        """Let the streams, those of `ranks` if given, run to their ends."""
        for rank, scan in self._scans.items():
            if not scan.complete and not scan.dormant and (ranks is None or rank in ranks):
                scan.run_on()

    async def all_known(self) -> None:
        """Until every layer that somebody looked into has been scanned; raises what keeps one from it."""
        while not all(scan.complete for scan in self._scans.values() if not scan.dormant):
            self.raise_broken()
            await self.progress.wait()

    def raise_broken(self, ranks: Collection[int] | None = None) -> None:
        """Raise what is wrong with a layer, with one of `ranks` if given; what may be well again is tried again."""
        self._broken.require(ranks)

    def quiesce(self) -> None:
        """The mount is about to end: nothing new is fetched unless somebody waits for it."""
        self.fetcher.quiesce()

    def stop(self) -> None:
        for scan in self._scans.values():
            scan.stop()

    # -- names ---------------------------------------------------------------------------------------------------------

    async def lookup(self, parent: Node, name: bytes) -> Node | None:
        """The visible child; None only when the image truly has none. Waits while layers that could have it arrive."""
        node = parent.children.get(name)
        if not self.tree.closed:
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

    async def describe(self, directory: Node) -> None:
        """Wait until it is known what the tar that a directory stands for says of it; not if the tar is broken."""
        with suppress(CkptfsError):
            while not self.tree.described(directory):
                await self._advance(directory.path)

    async def mark(self, directory: Node) -> None:
        """Wait until it is known whether overlayfs is to take the directory for opaque."""
        while not self.tree.marked(directory):
            await self._advance(directory.path)

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

    async def find_in_checkpoint(self, path: bytes) -> Node | None:
        """A file of the checkpoint itself, whatever the view shows."""
        if not self._earlier:
            return await self.find(path)
        while True:
            for tree in reversed(self._earlier):
                node = tree.find(path)
                if node is not None:
                    return node
            # Not `find` in the view's tree: that would wait for the delta, which may be what is asking.
            if all(tree.closed for tree in self._earlier):
                return None
            self.raise_broken()
            self.run_on()
            await self.progress.wait()

    async def _advance(self, path: bytes) -> None:
        """Wait until more is known of `path`; start what has to run for that."""
        for prefix in [p for p in self.dormant if path == p or path.startswith(p + b"/")]:
            self.dormant.pop(prefix)()
        self.raise_broken(ranks := self.tree.open_ranks(path))
        self.run_on(ranks if self.options.view == "layers" else None)  # there each layer is by itself
        await self.progress.wait()

    # -- bytes ---------------------------------------------------------------------------------------------------------

    async def open(self, inode: Inode, path: bytes = b"") -> Handle:
        """A handle to read the file with; waits where the file's chunks have to be learnt first."""
        await self.tables.open(inode)
        return Handle(inode, path)

    async def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """File bytes; short only at the end of the file."""
        await self.tables.open(inode)
        data = self.reader.cached(inode, offset, size)
        return bytes(data if data is not None else await self.reader.read(inode, offset, size))

    # -- facts ---------------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> Mapping[int, tuple[Descriptor, Layer]]:
        """What was opened, by the number that chunks carry."""
        return self._layers

    @property
    def image_bytes(self) -> int:
        """Compressed bytes of the layers that the view shows."""
        return sum(descriptor.size for descriptor, _ in self._layers.values())

    @property
    def known(self) -> bool:
        """Whether every chunk of every file is known, as far as somebody looked into layers."""
        return not self.tables and all(scan.complete for scan in self._scans.values() if not scan.dormant)

    def chunks(self) -> dict[bytes, Chunk]:
        """Every chunk that the view's files need, by key; only of a complete tree."""
        return {extent.chunk.key: extent.chunk for inode in self.tree.inodes.values() for extent in inode.extents}

    @property
    def verification(self) -> str:
        """What vouches for the bytes: a digest for every chunk, or for some layers only the transport."""
        streams = {id(scan.layer) for scan in self._scans.values() if scan.passed and scan.layer.sequential}
        whole = {d.digest for d, layer in self._layers.values() if id(layer) in streams and not d.synthetic}
        whole |= self._whole
        checked = (layer.verification == "chunk" or d.digest in whole for d, layer in self._layers.values())
        return "chunk" if all(checked) else "transport"

    async def verify_whole_layers(self) -> None:
        """Hash plain tars once everything else has been fetched, none of them twice."""
        from ckptfs.image.whole import condemn_layer, hash_layer
        from ckptfs.layers.tar import TarLayer

        ranks = {id(scan.layer): rank for rank, scan in self._scans.items()}
        for number, (descriptor, layer) in list(self._layers.items()):
            if not isinstance(layer, TarLayer) or layer.digests:
                continue
            if id(layer) in ranks and not descriptor.synthetic:
                try:
                    await hash_layer(self.fetcher, descriptor, layer)
                except IntegrityError as error:
                    await condemn_layer(self.fetcher, number, layer, error)
                    self._fail(ranks[id(layer)], error)
                else:
                    self._whole.add(descriptor.digest)


@asynccontextmanager
async def open_image(
    source: Source,
    cache: ChunkCache,
    options: ImageOptions,
    counters: NetworkCounters,
    open_source: OpenSource | None = None,
) -> AsyncIterator[OpenImage]:
    """Resolve, open, arrange the view; inside the block names and bytes can be asked for.

    `open_source` reaches other images (the base of a root file system view).
    """
    from ckptfs.image.ahead import fetch_ahead
    from ckptfs.image.arrange import arrange

    began = time.monotonic()
    source, resolved = await resolve_in_thread(source, cache, options.settings.limits, offline=options.offline)
    log.debug("resolved %s in %.0f ms", resolved.reference, (time.monotonic() - began) * 1000)
    async with trio.open_nursery() as nursery:
        image = OpenImage(source, resolved, cache, options, counters, nursery)
        nursery.start_soon(image.fetcher.run)
        try:
            await arrange(image, open_source, options.base)
            log.debug("arranged after %.0f ms", (time.monotonic() - began) * 1000)
            nursery.start_soon(fetch_ahead, image)
            yield image
        finally:
            image.stop()
            nursery.cancel_scope.cancel()
