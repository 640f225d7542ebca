"""Small ranges of blobs that have a digest of their own, tables of chunks and parts of them: fetched once, then kept.

The next mount needs no network for them. Blocks; called in threads by indexed.py, parts.py and earlier.py.
"""

from collections.abc import Callable, Sequence

from ckptfs.errors import IntegrityError
from ckptfs.image.resolve import DocumentStore
from ckptfs.model.blob import Blob
from ckptfs.model.index import IndexedFile, load_table, read_cells
from ckptfs.model.index_table import Table
from ckptfs.model.toc import Extent
from ckptfs.settings import Limits


def kept_range(
    documents: DocumentStore, name: str, blob: Blob, offset: int, size: int, check: Callable[[bytes], None]
) -> bytes:
    """The bytes [offset, offset + size), which are the document `name`; `check` raises IntegrityError unless they are.

    After a flipped bit on the way they are asked for once more, elsewhere if there is another place.
    """
    data = documents.get_document(name)
    if data is None:
        try:
            data = _read(blob, offset, size, check, 0)
        except IntegrityError:
            data = _read(blob, offset, size, check, 1)
        documents.put_document_soon(name, data)  # a read waits for what it says
    return data


def table_bytes(documents: DocumentStore, table: Table, blob: Blob) -> bytes:
    """A whole table."""

    def check(data: bytes) -> None:
        table.digest.check(data, "a table of chunks")

    return kept_range(documents, table_name(table), blob, table.offset, table.size, check)


def load_kept_table(documents: DocumentStore, file: IndexedFile, blob: Blob, layer: int, limits: Limits) -> None:
    """Give `file` the extents that its table of chunks describes, if it has one. IntegrityError, FormatError."""
    if file.table is not None:
        load_table(file, table_bytes(documents, file.table, blob), layer, blob.size, limits)


def kept_cells(documents: DocumentStore, file: IndexedFile, blob: Blob, layer: int, limits: Limits) -> Sequence[Extent]:
    """The cells of `file` as extents; nothing where it has none. IntegrityError, FormatError."""
    if file.cells is None:
        return ()
    return read_cells(file, table_bytes(documents, file.cells, blob), layer, blob.size, limits)


def table_name(table: Table) -> str:
    """Of the document that is a whole table."""
    return f"table/{table.digest}"


def _read(blob: Blob, offset: int, size: int, check: Callable[[bytes], None], attempt: int) -> bytes:
    data = bytes(blob.read_at(offset, size, attempt=attempt))
    check(data)
    return data
