"""Small ranges of blobs that have a digest of their own, tables of chunks and parts of them: fetched once, then kept.

The next mount needs no network for them. Blocks; called in threads by indexed.py, parts.py and earlier.py.
"""

from collections.abc import Callable

from ckptfs.errors import IntegrityError
from ckptfs.image.resolve import DocumentStore
from ckptfs.model.blob import Blob
from ckptfs.model.index_table import Table


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
        documents.put_document(name, data)
    return data


def table_bytes(documents: DocumentStore, table: Table, blob: Blob) -> bytes:
    """A whole table."""

    def check(data: bytes) -> None:
        table.digest.check(data, "a table of chunks")

    return kept_range(documents, table_name(table), blob, table.offset, table.size, check)


def table_name(table: Table) -> str:
    """Of the document that is a whole table."""
    return f"table/{table.digest}"


def _read(blob: Blob, offset: int, size: int, check: Callable[[bytes], None], attempt: int) -> bytes:
    data = bytes(blob.read_at(offset, size, attempt=attempt))
    check(data)
    return data
