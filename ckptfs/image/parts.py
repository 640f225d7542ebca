"""Tables of chunks that are read in parts: what a restore with lazy pages needs of a large image before its first tick.

A file whose table has parts can be read at once: each part is fetched when a byte of its pages is asked for, 9 KB for
64 MiB of them. Whatever needs all of a table (the background, `pull`, increments, earlier images) loads it whole, and
then this is over for that file. Owned by indexed.py; the reader calls `learn`.
"""

from collections.abc import Callable, Iterable
from functools import partial

import trio

from ckptfs.engine.threads import in_thread
from ckptfs.image.kept import kept_range, table_name
from ckptfs.image.resolve import DocumentStore
from ckptfs.model.blob import Blob
from ckptfs.model.index import IndexedFile
from ckptfs.model.index_table import PartedExtents, Table
from ckptfs.model.toc import UNKNOWN, Chunk, Inode
from ckptfs.settings import Limits

_AT_ONCE = 8  # parts that are fetched ahead for one plan: 70 KB
_THREADS = 40  # parts that are fetched at the same time, as many as trio would have for everything

_Place = tuple[Inode, int]


class TableParts:
    """Of all files of an image. Runs in the event loop, reads in threads."""

    def __init__(self, documents: DocumentStore, limits: Limits, whole: Callable[[Inode], object]) -> None:
        """`whole` is told of files of which all parts are known."""
        self._documents = documents
        self._limits = limits
        self._whole = whole
        self._files: dict[Inode, tuple[PartedExtents, Table, Blob]] = {}
        self._places: dict[bytes, _Place] = {}
        self._locks: dict[bytes, trio.Lock] = {}
        # Their own: what hangs here for a dead registry must not keep others, the end of the mount among them, waiting.
        self._threads = trio.CapacityLimiter(_THREADS)

    def add(self, file: IndexedFile, blob: Blob, layer: int) -> None:
        """Make a pages file readable of which nothing but the parts of its table is known.

        Of other large files, all of which are tars, all extents are wanted as soon as they are looked at.
        """
        inode, table = file.entry.inode, file.table
        if inode is None or table is None or not table.parts or (file.eager is None and file.cells is None):
            return
        extents = PartedExtents(table, layer, file.offset)
        inode.extents = extents
        self._files[inode] = (extents, table, blob)
        self._places |= {extent.chunk.key: (inode, number) for number, extent in enumerate(extents)}

    def readable(self, inode: Inode) -> bool:
        """Whether reads of the file find what they need by `learn`."""
        return inode in self._files and inode.extents is self._files[inode][0]

    async def learn(self, keys: Iterable[bytes]) -> None:
        """Read the parts that chunks of the layer UNKNOWN with these keys stand for."""
        for key in dict.fromkeys(keys):
            inode, number = self._places[key]
            extents, table, blob = self._files[inode]
            async with self._locks.setdefault(key, trio.Lock()):
                if not extents.known(number):
                    fetch = partial(self._fetch, table, number, blob)
                    data = await in_thread(fetch, limiter=self._threads)
                    extents.learn(number, data, blob.size, self._limits)
                    if extents.whole:
                        self._whole(inode)

    async def learn_for(self, chunks: Iterable[Chunk]) -> bool:
        """Read the first few parts that are lacking in a plan; whether there were any."""
        keys = dict.fromkeys(chunk.key for chunk in chunks if chunk.layer == UNKNOWN)
        await self.learn(list(keys)[:_AT_ONCE])
        return bool(keys)

    def _fetch(self, table: Table, number: int, blob: Blob) -> bytes:
        part, skipped = table.parts[number], sum(part.size for part in table.parts[:number])
        whole = self._documents.get_document(table_name(table))
        if whole is not None:
            return whole[skipped : skipped + part.size]
        name, offset = f"table/sha256:{part.digest.hex()}", table.offset + skipped
        return kept_range(self._documents, name, blob, offset, part.size, part.check)
