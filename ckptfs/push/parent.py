"""The image of the checkpoint before: what `push --parent` compares with, and whose layers of pages it uses again.

Everything is read through its index: pagemaps out of the manifest, digests of chunks and cells, and of the pages only
those that a comparison asks for. Only images that `ckptfs push` made have such an index. Calls block.
"""

from collections.abc import Sequence

from ckptfs.criu.images import parse_name
from ckptfs.errors import FormatError, IntegrityError
from ckptfs.layers import Layer, open_indexed
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.index import IndexedFile, IndexedLayer, Table, load_table, manifest_index, read_cells
from ckptfs.model.oci import Digest, Manifest, parse_diff_ids
from ckptfs.model.toc import Extent
from ckptfs.settings import KiB, MiB, Settings
from ckptfs.sources import Source

_GAP = 64 * KiB  # of pages that nobody asked for, rather than one more request
_REQUEST = 4 * MiB


class ParentImage:
    """Not for several threads."""

    def __init__(self, source: Source, manifest: Manifest, settings: Settings) -> None:
        """FormatError when the manifest has an index that is none."""
        self.source = source
        self.manifest = manifest
        self._settings = settings
        self.layers: Sequence[IndexedLayer] = ()
        self._files: dict[bytes, tuple[IndexedFile, int]] = {}
        self._opened: dict[int, Layer] = {}
        try:
            index = manifest_index(manifest, limits=settings.limits, with_rows=True)
        except FormatError as error:
            raise FormatError(
                f"the parent {source.reference} cannot be used: {error.message}", hint=error.hint
            ) from None
        if index is None:
            return
        self.layers = index.layers
        self._files = {file.entry.path: (file, n) for n, layer in enumerate(index.layers) for file in layer.files}

    def find(self, path: bytes) -> IndexedFile | None:
        """What the image shows at `path`; None for nothing."""
        found = self._files.get(path)
        return found[0] if found is not None else None

    def names(self, directory: bytes) -> list[bytes]:
        """The names in a directory, sorted."""
        head = directory + b"/" if directory else b""
        inside = (path[len(head) :] for path in self._files if path.startswith(head) and path != directory)
        return sorted(name for name in inside if name and b"/" not in name)

    def depth(self, directory: bytes) -> int:
        """How many checkpoints in a row `directory` needs, itself included."""
        levels = 0
        while self.find(directory + b"/inventory.img") is not None:
            levels, directory = levels + 1, directory + b"/parent"
        return levels

    def layer_of(self, path: bytes) -> int | None:
        """The number of the layer that brings the pages file `path` and, besides, nothing but pages; None without."""
        found = self._files.get(path)
        if found is None or found[0].entry.inode is None or not found[0].entry.inode.is_file:
            return None
        return found[1] if all(map(_may_be_reused, self.layers[found[1]].files)) else None

    def read(self, path: bytes) -> bytes | None:
        """A small file whole; None where there is none."""
        found = self._files.get(path)
        if found is None or found[0].entry.inode is None or not found[0].entry.inode.is_file:
            return None
        file, inode = found[0], found[0].entry.inode
        if inode.size > self._settings.limits.criu_image_bytes:
            raise FormatError(f"{path.decode('utf-8', 'replace')!r} of the parent has {inode.size} bytes")
        if file.content is not None:
            return file.content
        data = bytearray(inode.size)
        extents = self._extents(file, found[1])
        for extent, piece in zip(extents, self.fetch(found[1], extents), strict=True):
            data[extent.start : extent.start + extent.length] = piece
        return bytes(data)

    def pieces(self, path: bytes) -> Sequence[Extent]:
        """The smallest parts of a pages file that have a digest each, in file order; gaps are zeros."""
        file, layer = self._files[path]
        if file.cells is None:
            return self._extents(file, layer)
        blob = self.source.blob(self.manifest.layers[layer])
        return read_cells(file, self._table(file.cells, layer), layer, blob.size, self._settings.limits)

    def chunk_digest(self, path: bytes) -> ChunkDigest:
        """What the digests of `pieces` are."""
        return self.layers[self._files[path][1]].chunk_digest

    def fetch(self, layer: int, extents: Sequence[Extent]) -> list[bytes]:
        """The decoded chunks of extents of one layer that ascend; neighbours come with one request."""
        out: list[bytes] = []
        together: list[Extent] = []
        for extent in extents:
            chunk = extent.chunk
            if together:
                first, last = together[0].chunk, together[-1].chunk
                end = last.offset + last.size
                if not end <= chunk.offset <= end + _GAP or chunk.offset + chunk.size - first.offset > _REQUEST:
                    out += self._range(layer, together)
                    together = []
            together.append(extent)
        return out + self._range(layer, together)

    def diff_ids(self) -> list[Digest]:
        """Of all layers, from the image's config."""
        return parse_diff_ids(self.source.fetch(self.manifest.config), self.manifest)

    def _range(self, layer: int, extents: Sequence[Extent]) -> list[bytes]:
        if not extents:
            return []
        try:
            return self._decoded(layer, extents, 0)
        except IntegrityError:  # a flipped bit on the way: once more, elsewhere if there is another place
            return self._decoded(layer, extents, 1)

    def _decoded(self, layer: int, extents: Sequence[Extent], attempt: int) -> list[bytes]:
        blob = self.source.blob(self.manifest.layers[layer])
        start, last = extents[0].chunk.offset, extents[-1].chunk
        data = memoryview(blob.read_at(start, last.offset + last.size - start, attempt=attempt))
        opened = self._opened.get(layer)
        if opened is None:
            opened = self._opened[layer] = open_indexed(blob, layer, self._settings, self.layers[layer].chunk_digest)
        chunks = (extent.chunk for extent in extents)
        return [bytes(opened.decode(c, data[c.offset - start : c.offset - start + c.size])) for c in chunks]

    def _extents(self, file: IndexedFile, layer: int) -> Sequence[Extent]:
        inode = file.entry.inode
        if inode is not None and file.table is not None and not inode.extents:
            size = self.manifest.layers[layer].size
            load_table(file, self._table(file.table, layer), layer, size, self._settings.limits)
        return inode.extents if inode is not None else ()

    def _table(self, table: Table, layer: int) -> bytes:
        return self.source.blob(self.manifest.layers[layer]).read_at(table.offset, table.size)


def _may_be_reused(file: IndexedFile) -> bool:
    entry = file.entry
    if entry.inode is None or file.content is not None:
        return False
    if entry.inode.is_dir:
        return True
    name = parse_name(entry.path.rpartition(b"/")[2].decode("utf-8", "replace"))
    return entry.inode.is_file and name is not None and name.kind == "pages"
