"""Earlier images of the same repository, for what they share with this one.

A node that has run one checkpoint of a process and mounts the next fetches the pages that changed, not the chunks that
they lie in. Remembers, for each repository, the last images that were opened; where a pages file of this image has the
name of one of theirs, and chunks that this node lacks, those chunks are taken apart into cells, of which most are in
the earlier image's chunks (engine/shared_cells.py): at the same virtual addresses, which both images' pagemaps tell, or
anywhere, if the table of the earlier image's cells is here. Costs the table of this image's cells, and nothing when no
earlier image is here. A failure costs the saving, never the read. Blocking calls, made from worker threads by
indexed.py.
"""

import json
import logging
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ckptfs.criu.chunking import placed_cells
from ckptfs.criu.pagemap import DEFAULT_PAGE_SIZE, Pagemap, parse_pagemap
from ckptfs.engine.shared_cells import Place, SharedCells
from ckptfs.errors import CkptfsError, FormatError
from ckptfs.image.kept import kept_cells, load_kept_table, table_bytes
from ckptfs.image.resolve import DocumentStore
from ckptfs.model.blob import Blob
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.index import ImageIndex, IndexedFile
from ckptfs.model.oci import Digest, Manifest, Reference, parse_document
from ckptfs.model.packed import PackedExtents
from ckptfs.model.toc import Extent, overlapping
from ckptfs.settings import Limits
from ckptfs.sources import Source

log = logging.getLogger(__name__)

_REMEMBERED = 3  # images of one repository: a rollback and a pair that alternates still find each other


class _Pagemap(NamedTuple):
    """As it is in an index: parsed when it is needed."""

    name: str
    data: bytes

    def parse(self, limits: Limits) -> Pagemap:
        return parse_pagemap(self.data, self.name, limits)


class _Pages(NamedTuple):
    """A pages file of an earlier image, its layer, and its pagemap, where that is in the index."""

    file: IndexedFile
    blob: Blob
    pagemap: _Pagemap | None


class EarlierImages:
    """`chunk_digests`: of this image's layers, by number; its chunks are looked for by them."""

    def __init__(
        self,
        source: Source,
        documents: DocumentStore,
        cells: SharedCells,
        limits: Limits,
        chunk_digests: Mapping[int, ChunkDigest],
    ) -> None:
        self._source = source
        self._documents = documents
        self._cells = cells
        self._limits = limits
        self._chunk_digests = chunk_digests
        self._pages: dict[bytes, list[_Pages]] = {}
        self._pagemaps: dict[bytes, _Pagemap] = {}  # of this image, by the path of the pages file

    def find(
        self,
        reference: Reference,
        image: Manifest,
        index: ImageIndex,
        index_of: Callable[[Manifest], ImageIndex | None],
    ) -> None:
        """Look up the earlier images of `reference`'s repository, and remember `image` as the latest one."""
        self._pagemaps = self._find_pagemaps(index)
        key = f"earlier/{reference.kind}/{reference.host}/{reference.repository or reference.path}"
        known = [d for d in _digests(self._documents.get_document(key)) if d != image.digest]
        ours = {layer.digest for layer in image.layers}
        for earlier in known:
            manifest = self._manifest(earlier)
            theirs = index_of(manifest) if manifest is not None else None
            if manifest is None or theirs is None:
                continue
            pagemaps = self._find_pagemaps(theirs)
            for descriptor, layer in zip(manifest.layers, theirs.layers, strict=True):
                for file in layer.files:
                    if file.cells is not None and descriptor.digest not in ours:  # else its chunks are the same
                        path = file.entry.path
                        pages = _Pages(file, self._source.blob(descriptor), pagemaps.get(path))
                        self._pages.setdefault(path, []).append(pages)
        self._documents.put_document(f"earlier/{image.digest}", image.raw)
        names = [str(d) for d in (image.digest, *known)][:_REMEMBERED]
        self._documents.put_document(key, json.dumps(names).encode())

    def share(self, file: IndexedFile) -> bool:
        """Whether an earlier image has a file of this name, so that `refine` may save something."""
        return file.cells is not None and file.entry.path in self._pages

    def keep(self, file: IndexedFile, blob: Blob) -> None:
        """Fetch the table of cells for the images to come, where addresses do not tell what they share."""
        try:
            if file.cells is not None and file.entry.path not in self._pagemaps:
                table_bytes(self._documents, file.cells, blob)
        except CkptfsError as error:
            log.info("the cells of %s are not kept: %s", file.entry.path.decode("utf-8", "replace"), error)

    def refine(self, file: IndexedFile, blob: Blob, layer: int) -> None:
        """Replace the chunks of `file` that this node lacks by their cells, where some of those are here."""
        try:
            self._refine(file, blob, layer)
        except CkptfsError as error:
            log.info("%s is fetched whole: %s", file.entry.path.decode("utf-8", "replace"), error)

    def _refine(self, file: IndexedFile, blob: Blob, layer: int) -> None:
        inode = file.entry.inode
        if inode is None:
            return
        chunks = list(inode.extents)
        lacking = {chunk.start for chunk in chunks if not self._cells.contains(chunk.chunk.key)}
        if not lacking:
            return
        cells = kept_cells(self._documents, file, blob, layer, self._limits)
        missing = [cell for chunk, inside in _within(chunks, cells) if chunk.start in lacking for cell in inside]
        places: dict[bytes, Place] = {}
        digest = self._chunk_digests[layer]
        for earlier in self._pages[file.entry.path]:
            if not self._share_addresses(file, earlier, missing, digest):
                self._places(earlier, {cell.chunk.key for cell in missing}, digest, places)
        self._cells.add(places)
        refined = PackedExtents(layer)
        for chunk, inside in _within(chunks, cells):
            apart = chunk.start in lacking and any(self._cells.contains(cell.chunk.key) for cell in inside)
            for extent in inside if apart else [chunk]:
                known = extent.chunk
                refined.append(extent.start, extent.length, known.offset, known.size, known.key)
        inode.extents = refined

    def _share_addresses(
        self, file: IndexedFile, earlier: _Pages, cells: Sequence[Extent], digest: ChunkDigest
    ) -> bool:
        """Take cells from where the earlier file has the same memory; False when the memory's addresses are not known.

        That it has not changed is seen from its hash, which `SharedCells` checks before it hands anything out.
        """
        ours, theirs = self._pagemaps.get(file.entry.path), earlier.pagemap
        if ours is None or theirs is None:
            return False
        where = {(address, length): at for address, at, length in self._placed(theirs, earlier.file)}
        wanted = {(cell.start, cell.length): cell.chunk.key for cell in cells}
        extents = self._extents(earlier)
        for address, start, length in self._placed(ours, file):
            key, at = wanted.get((start, length)), where.get((address, length))
            if key is None or at is None or self._cells.contains(key):
                continue
            for chunk in overlapping(extents, at, length):
                if chunk.start <= at and at + length <= chunk.start + chunk.length:
                    self._cells.add({key: Place(chunk.chunk.key, at - chunk.start, length, digest)})
                    self._cells.get(key)  # forgets it where the memory has changed
        return True

    def _placed(self, described: _Pagemap, file: IndexedFile) -> Iterator[tuple[int, int, int]]:
        size = file.entry.inode.size if file.entry.inode is not None else 0
        pagemap = described.parse(self._limits)
        runs = pagemap.placed(pagemap.page_size(size) or DEFAULT_PAGE_SIZE)
        return placed_cells(((run.vaddr, run.length) for run in runs), size)

    def _find_pagemaps(self, index: ImageIndex) -> dict[bytes, _Pagemap]:
        """The pagemaps that an index has whole, by the path of the pages file that each describes.

        Those of an increment's parents describe pages files that links lead to.
        """
        found = {}
        links = _links(index)
        for file in (file for layer in index.layers for file in layer.files if file.content is not None):
            directory, _, name = file.entry.path.rpartition(b"/")
            if name.startswith(b"pagemap-") and file.content is not None:
                pagemap = _Pagemap(name.decode("utf-8", "replace"), file.content)
                try:
                    pages = pagemap.parse(self._limits).file.encode()
                except FormatError:
                    continue
                path = directory + b"/" + pages if directory else pages
                found[links.get(path, path)] = pagemap
        return found

    def _places(self, earlier: _Pages, wanted: set[bytes], digest: ChunkDigest, places: dict[bytes, Place]) -> None:
        """Add where the chunks of an earlier file, as far as they are here, have cells that are wanted."""
        extents = self._extents(earlier)
        here = [chunk for chunk in extents if self._cells.contains(chunk.chunk.key)]
        if not here:
            return
        cells = kept_cells(self._documents, earlier.file, earlier.blob, 0, self._limits)
        for chunk, inside in _within(here, cells):
            for cell in inside:
                if cell.chunk.key in wanted and cell.chunk.key != chunk.chunk.key:
                    places[cell.chunk.key] = Place(chunk.chunk.key, cell.start - chunk.start, cell.length, digest)

    def _manifest(self, digest: Digest) -> Manifest | None:
        raw = self._documents.get_document(f"earlier/{digest}")
        if raw is None or Digest.of(raw, digest.algorithm) != digest:
            return None
        document = parse_document(raw, digest=digest)
        return document if isinstance(document, Manifest) else None

    def _extents(self, earlier: _Pages) -> Sequence[Extent]:
        load_kept_table(self._documents, earlier.file, earlier.blob, 0, self._limits)
        inode = earlier.file.entry.inode
        return inode.extents if inode is not None else ()


def _within(chunks: Sequence[Extent], cells: Sequence[Extent]) -> Iterator[tuple[Extent, list[Extent]]]:
    """Each chunk with the cells that lie in it; both ascend."""
    pending = iter(cells)
    cell = next(pending, None)
    for chunk in chunks:
        end = chunk.start + chunk.length
        inside = []
        while cell is not None and cell.start < end:
            if cell.start >= chunk.start and cell.start + cell.length <= end:
                inside.append(cell)
            cell = next(pending, None)
        yield chunk, inside


def _links(index: ImageIndex) -> dict[bytes, bytes]:
    """Where the symbolic links of an image lead, by path."""
    entries = (entry for layer in index.layers for entry in layer.entries)
    targets = ((entry.path, entry.inode.target) for entry in entries if entry.inode is not None and entry.inode.target)
    return {path: posixpath.normpath(posixpath.join(path.rpartition(b"/")[0], target)) for path, target in targets}


def _digests(document: bytes | None) -> list[Digest]:
    """What `find` wrote; nothing where the document is of another make."""
    if document is None:
        return []
    try:
        return [Digest.parse(str(text)) for text in json.loads(document)]
    except (ValueError, TypeError, CkptfsError):
        return []
