"""Ranges with a digest of their own: asked for once more when they are wrong, and kept when they are right."""

from random import Random

import pytest

from ckptfs.errors import IntegrityError
from ckptfs.image.kept import table_bytes
from ckptfs.model.index_table import Table
from ckptfs.model.oci import Descriptor, Digest
from tests.support.blobs import BytesBlob

DATA = Random(3).randbytes(1000)
TABLE = Table(100, 200, Digest.of(DATA[100:300]), 5)


class Flipping(BytesBlob):
    """The first `lies` answers have a wrong byte."""

    def __init__(self, lies: int) -> None:
        super().__init__(DATA, Descriptor("application/octet-stream", Digest.of(DATA), len(DATA)))
        self.lies = lies
        self.attempts: list[int] = []

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        self.attempts.append(attempt)
        data = super().read_at(offset, length, attempt=attempt)
        if len(self.attempts) <= self.lies:
            return bytes([data[0] ^ 1]) + data[1:]
        return data


class Shelf(dict[str, bytes]):
    def get_document(self, key: str) -> bytes | None:
        return self.get(key)

    def put_document(self, key: str, data: bytes) -> None:
        self[key] = data

    put_document_soon = put_document


@pytest.mark.parametrize("lies", [0, 1])
def test_a_table_is_asked_for_once_more_and_then_kept(lies: int) -> None:
    blob, shelf = Flipping(lies), Shelf()
    for _ in range(2):
        assert table_bytes(shelf, TABLE, blob) == DATA[100:300]
    assert blob.attempts == list(range(lies + 1))


def test_a_table_that_stays_wrong_is_not_kept() -> None:
    blob, shelf = Flipping(2), Shelf()
    with pytest.raises(IntegrityError, match="a table of chunks"):
        table_bytes(shelf, TABLE, blob)
    assert blob.attempts == [0, 1]
    assert not shelf
