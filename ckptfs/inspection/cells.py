"""Pages files in their smallest pieces: what two dumps of a process share, and all that has to be fetched to compare.

An image that `ckptfs push` made says for its pages files how each chunk is made of cells, frames of their own. Taken
apart, a file reads as before, cell by cell; chunks that the node has are still used. Called by image_diff.
"""

import os
from collections.abc import Iterator, Sequence

from ckptfs.engine.shared_cells import Place
from ckptfs.image.indexed import inline_index
from ckptfs.inspection.image_files import ImageFiles
from ckptfs.model.blob import Blob
from ckptfs.model.index import IndexedFile, read_cells
from ckptfs.model.toc import Extent


def take_apart(files: ImageFiles) -> None:
    """Give the image's pages files their cells as extents. Fetches the tables of the cells."""
    image = files.image
    manifest, limits = image.resolved.manifest, image.options.settings.limits
    index = inline_index(manifest, 0, limits)
    if index is None:
        return
    for number, (descriptor, layer) in enumerate(zip(manifest.layers, index.layers, strict=True)):
        for file in layer.files:
            if file.cells is not None:
                _take_apart(files, file, image.source.blob(descriptor), number)


def _take_apart(files: ImageFiles, file: IndexedFile, blob: Blob, layer: int) -> None:
    path, table, limits = os.fsdecode(file.entry.path), file.cells, files.image.options.settings.limits
    inode = files.inode(path)
    if inode is None or table is None:
        return
    files.load(path)
    if not inode.extents or inode.extents[0].chunk.layer != layer:  # a file of another layer has taken its place
        return
    cells = read_cells(file, blob.read_at(table.offset, table.size), layer, blob.size, limits)
    here = [chunk for chunk in inode.extents if files.image.cells.contains(chunk.chunk.key)]
    files.image.cells.add({cell.chunk.key: place for cell, place in _inside(here, cells)})
    inode.extents = cells


def _inside(chunks: Sequence[Extent], cells: Sequence[Extent]) -> Iterator[tuple[Extent, Place]]:
    """The cells that lie in one of the chunks, with where they lie; both ascend."""
    pending = iter(chunks)
    chunk = next(pending, None)
    for cell in cells:
        while chunk is not None and chunk.start + chunk.length <= cell.start:
            chunk = next(pending, None)
        if chunk is not None and chunk.start <= cell.start and cell.chunk.key != chunk.chunk.key:
            yield cell, Place(chunk.chunk.key, cell.start - chunk.start, cell.length)
