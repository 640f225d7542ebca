"""Pages files in their smallest pieces: what two dumps of a process share, and all that has to be fetched to compare.

An image that `ckptfs push` made says for its pages files how each chunk is made of cells, frames of their own. Taken
apart, a file reads as before, cell by cell; chunks that the node has are still used. Called by image_diff.
"""

import os
from collections.abc import Iterator, Sequence

import trio

from ckptfs.engine.shared_cells import Place
from ckptfs.image.kept import kept_cells
from ckptfs.inspection.image_files import ImageFiles
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.toc import Extent


def take_apart(files: ImageFiles) -> None:
    """Give the image's pages files their cells as extents. Fetches the tables of the cells."""
    image = files.image
    for file, blob, layer in image.tables.with_cells:
        inode = file.entry.inode
        shown = files.inode(os.fsdecode(file.entry.path))
        if inode is None or file.cells is None or (shown is not inode and not image.tables.is_source(inode)):
            continue  # a file of another layer has taken its place
        trio.from_thread.run(image.tables.load, inode)
        cells = kept_cells(image.cache, file, blob, layer, image.options.settings.limits)
        here = [chunk for chunk in inode.extents if image.cells.contains(chunk.chunk.key)]
        digest = image.chunk_digests[layer]
        image.cells.add({cell.chunk.key: place for cell, place in _inside(here, cells, digest)})
        inode.extents = cells
    image.tables.derive_again()


def _inside(chunks: Sequence[Extent], cells: Sequence[Extent], digest: ChunkDigest) -> Iterator[tuple[Extent, Place]]:
    """The cells that lie in one of the chunks, with where they lie; both ascend."""
    pending = iter(chunks)
    chunk = next(pending, None)
    for cell in cells:
        while chunk is not None and chunk.start + chunk.length <= cell.start:
            chunk = next(pending, None)
        if chunk is not None and chunk.start <= cell.start and cell.chunk.key != chunk.chunk.key:
            yield cell, Place(chunk.chunk.key, cell.start - chunk.start, cell.length, digest)
