"""An image that brings its index along: opened from the manifest alone, without asking any layer.

The index is covered by the manifest's digest, so its contents need no further check. The chunk tables of very large
files stay in their layers: they are read in parts where bytes are asked for (parts.py), or loaded when such a file is
first opened, and then it is seen what an earlier image shares with it.
"""

import logging
from collections.abc import Callable, Sequence

import trio

from ckptfs.engine.threads import in_thread
from ckptfs.errors import FormatError
from ckptfs.image.earlier import EarlierImages
from ckptfs.image.kept import kept_cells, load_kept_table
from ckptfs.image.parts import TableParts
from ckptfs.image.resolve import DocumentStore
from ckptfs.layers import may_be_indexed
from ckptfs.model.blob import Blob
from ckptfs.model.index import ImageIndex, IndexedFile, manifest_index
from ckptfs.model.oci import Manifest
from ckptfs.model.toc import Extent, Inode
from ckptfs.settings import Limits

log = logging.getLogger(__name__)


def inline_index(manifest: Manifest, first_layer: int, limits: Limits) -> ImageIndex | None:
    """The manifest's own index; None when it has none, or one that does not fit its layers (each has its own TOC)."""
    try:
        index = manifest_index(manifest, first_layer=first_layer, limits=limits)
    except FormatError as error:
        log.warning("the index in the manifest is not used: %s", error)
        return None
    if index is not None and not all(map(may_be_indexed, manifest.layers)):
        log.warning("the index in the manifest is not used: it tells chunks of layers that have none")
        return None
    return index


class ChunkTables:
    """Tables that have not been needed yet, by inode. `with_cells`: (file, its blob, number of the layer)."""

    def __init__(self, documents: DocumentStore, limits: Limits) -> None:
        self._documents = documents
        self._limits = limits
        self._pending: dict[Inode, tuple[IndexedFile, Blob, int]] = {}
        self._derived: dict[Inode, tuple[Sequence[Inode], Callable[[], Sequence[Extent]]]] = {}
        self._made: list[tuple[Inode, Sequence[Inode], Callable[[], Sequence[Extent]]]] = []
        self._locks: dict[Inode, trio.Lock] = {}  # one each: tables of several files are fetched at the same time
        self.parts = TableParts(documents, limits, lambda inode: self._pending.pop(inode, None))
        self.earlier: EarlierImages | None = None
        self.with_cells: list[tuple[IndexedFile, Blob, int]] = []

    def add(self, file: IndexedFile, blob: Blob, layer: int) -> None:
        if file.cells is not None:
            self.with_cells.append((file, blob, layer))
        shared = self.earlier is not None and self.earlier.share(file)
        if (file.table is not None or shared) and file.entry.inode is not None:
            self._pending[file.entry.inode] = (file, blob, layer)
            if not shared:
                self.parts.add(file, blob, layer)

    def derive(
        self, inode: Inode, sources: Sequence[Inode], extents: Callable[[], Sequence[Extent]], *, quick: bool
    ) -> None:
        """Give `inode` the extents that `extents` makes of those of `sources`, when it is opened.

        At once where that is `quick` and no source is waited for.
        """
        self._made.append((inode, sources, extents))
        if quick and not any(source in self._pending for source in sources):
            inode.extents = extents()
        else:
            self._derived[inode] = (sources, extents)

    def is_source(self, inode: Inode) -> bool:
        """Whether a file of the view has been derived from this one."""
        return any(inode in sources for _, sources, _ in self._made)

    def derive_again(self) -> None:
        """After sources have been given other extents of the same bytes."""
        for inode, _, extents in self._made:
            inode.extents = extents()

    def __bool__(self) -> bool:
        return bool(self._pending or self._derived)

    async def load(self, inode: Inode) -> None:
        """Give the inode its extents if they are still in the layer. A failed load can be repeated."""
        if inode not in self._pending and inode not in self._derived:
            return
        async with self._locks.setdefault(inode, trio.Lock()):
            if inode in self._pending:
                file, blob, layer = self._pending[inode]
                await in_thread(self._load, file, blob, layer)
                self._pending.pop(inode, None)
                del self._locks[inode]
            elif inode in self._derived:
                sources, extents = self._derived[inode]
                for source in sources:
                    await self.load(source)
                inode.extents = await in_thread(extents, finish=True)
                del self._derived[inode], self._locks[inode]

    async def open(self, inode: Inode) -> None:
        """Make reads of the file possible: like `load` where the table has no parts."""
        if not self.parts.readable(inode):
            await self.load(inode)

    async def open_all(self) -> None:
        """So for all files."""
        for inode in [*self._pending, *self._derived]:
            await self.open(inode)

    async def load_all(self) -> None:
        for inode in [*self._pending, *self._derived]:
            await self.load(inode)

    def cells_size(self, inode: Inode) -> int | None:
        """Bytes of the table of the file's cells; None where there is none."""
        found = (file.cells for file, _, _ in self.with_cells if file.entry.inode is inode)
        return next((cells.size for cells in found if cells is not None), None)

    async def cells(self, inode: Inode) -> Sequence[Extent]:
        """The file's cells; nothing where it has none."""
        for file, blob, layer in self.with_cells:
            if file.entry.inode is inode:
                return await in_thread(kept_cells, self._documents, file, blob, layer, self._limits)
        return ()

    async def keep_cells(self) -> None:
        """Fetch what later images of the repository will need to know of this one."""
        if self.earlier is not None:
            for file, blob, _ in self.with_cells:
                await in_thread(self.earlier.keep, file, blob)

    def _load(self, file: IndexedFile, blob: Blob, layer: int) -> None:
        load_kept_table(self._documents, file, blob, layer, self._limits)
        if self.earlier is not None and self.earlier.share(file):
            self.earlier.refine(file, blob, layer)
