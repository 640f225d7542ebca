"""Tables of chunks in parts: what one part says without the others, and what hostile ones are refused for."""

import base64
import copy
import hashlib
import random
import stat
from collections.abc import Callable
from typing import Any

import pytest
import zstandard

from ckptfs.errors import CkptfsError, FormatError, IntegrityError
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.index import IndexedFile, IndexedLayer, decode_index, encode_index, load_table
from ckptfs.model.index_columns import Row
from ckptfs.model.index_table import PART_ROWS, PartedExtents, Table, encode_parts
from ckptfs.model.oci import Digest
from ckptfs.model.toc import UNKNOWN, Entry, Inode, overlapping
from ckptfs.settings import Limits

BLOB = 100_000_000
OFFSET, PLACE = 5000, 90_000_000


def rows_of(count: int, zeros: Callable[[int], bool] = lambda n: n % 7 == 3) -> list[Row]:
    rows: list[Row] = []
    start, at = 0, OFFSET
    for n in range(count):
        length, size = 4096 * (1 + n % 5), 100 + n % 50
        rows.append((start, length, at, size, b"" if zeros(n) else hashlib.sha256(b"%d" % n).digest()))
        start, at = start + length, at + size
    return rows


def indexed(rows: list[Row]) -> tuple[IndexedFile, bytes]:
    data, parts = encode_parts(rows)
    table = Table(PLACE, len(data), Digest.of(data), len(rows), parts)
    inode = Inode(stat.S_IFREG | 0o600, size=sum(row[1] for row in rows))
    return IndexedFile(Entry(b"pages-1.img", inode), OFFSET, table=table, eager=()), data


def read_back(file: IndexedFile) -> IndexedFile:
    index = decode_index(encode_index([IndexedLayer(Digest.of(b"x"), BLOB, [file])]))
    (found,) = index.layers[0].files
    return found


def described(extents: Any) -> list[tuple[int, int, int, int, bytes]]:
    return [(e.start, e.length, e.chunk.offset, e.chunk.size, e.chunk.key) for e in extents]


@pytest.mark.parametrize("count", [1, PART_ROWS, PART_ROWS + 1, 3 * PART_ROWS + 5])
def test_all_parts_together_are_the_table(count: int) -> None:
    rows = rows_of(count)
    file, data = indexed(rows)
    found = read_back(file)
    assert found.table == file.table
    load_table(found, data, 0, BLOB)
    assert found.entry.inode is not None
    assert described(found.entry.inode.extents) == [row for row in rows if row[4]]


def test_a_part_is_known_without_the_others() -> None:
    rows = rows_of(5 * PART_ROWS)
    file, data = indexed(rows)
    assert file.table is not None
    size = sum(row[1] for row in rows)
    extents = PartedExtents(file.table, 3, OFFSET)
    assert [e.chunk.layer for e in overlapping(extents, 0, size)] == [UNKNOWN] * 5
    assert sum(e.length for e in extents) == size
    at = [sum(part.size for part in file.table.parts[:n]) for n in range(6)]
    wanted = [row for row in rows if row[4]]
    known: set[int] = set()
    for number in (3, 0, 4, 1, 2):
        extents.learn(number, data[at[number] : at[number + 1]], BLOB, Limits())
        known.add(number)
        for n in range(5):
            first, last = rows[n * PART_ROWS], rows[(n + 1) * PART_ROWS - 1]
            low, high = first[0], last[0] + last[1]
            found = list(overlapping(extents, low, high - low))
            if n in known:
                assert described(found) == [row for row in wanted if low <= row[0] < high]
            else:
                assert [(e.start, e.length, e.chunk.layer) for e in found] == [(low, high - low, UNKNOWN)]
    assert described(extents) == wanted


def test_any_read_finds_what_the_whole_table_says() -> None:
    rows = rows_of(4 * PART_ROWS, zeros=lambda n: n % 300 < 280)
    file, data = indexed(rows)
    assert file.table is not None
    extents = PartedExtents(file.table, 0, OFFSET)
    at = 0
    for number, part in enumerate(file.table.parts):
        extents.learn(number, data[at : at + part.size], BLOB, Limits())
        at += part.size
    size = sum(row[1] for row in rows)
    chance = random.Random(7)
    for _ in range(300):
        offset = chance.randrange(size)
        length = chance.randrange(1, 1 << chance.randrange(1, 22))
        expected = [row for row in rows if row[4] and row[0] < offset + length and row[0] + row[1] > offset]
        assert described(overlapping(extents, offset, length)) == expected


def test_a_damaged_part_is_not_taken_in() -> None:
    file, data = indexed(rows_of(2 * PART_ROWS))
    assert file.table is not None
    extents = PartedExtents(file.table, 0, OFFSET)
    first = bytearray(data[: file.table.parts[0].size])
    first[len(first) // 2] ^= 1
    with pytest.raises(IntegrityError):
        extents.learn(0, bytes(first), BLOB, Limits())
    with pytest.raises(FormatError, match="outside"):
        extents.learn(0, data[: file.table.parts[0].size], OFFSET + 10, Limits())
    assert not extents.known(0)


def test_documents_of_earlier_versions_are_read() -> None:
    """Version 2 has parts, version 1 has none; both say nothing about the digest of their chunks, which is SHA-256."""
    file, _ = indexed(rows_of(300))
    plain = IndexedFile(file.entry, OFFSET, table=Table(PLACE, 10, Digest.of(b"t"), 300))
    for one, version in ((file, b"2"), (plain, b"1")):
        document = encode_index([IndexedLayer(Digest.of(b"x"), BLOB, [one])])
        assert encode_index(copy.deepcopy([IndexedLayer(Digest.of(b"x"), BLOB, [one])])) == document
        body = zstandard.ZstdDecompressor().decompress(document)
        assert body.startswith(b"CKPTIDX3")
        (layer,) = decode_index(zstandard.compress(body[:7] + version + body[8:])).layers
        assert layer.chunk_digest is ChunkDigest.SHA256
        assert [found.table for found in layer.files] == [one.table]


DIGESTS = base64.b64encode(bytes(64)).decode()


@pytest.mark.parametrize(
    "parts",
    [
        {},
        [],
        [DIGESTS],
        [DIGESTS, {}],
        [5, []],
        ["", []],
        ["no base64!", [50, 10, 500, 1] * 2],
        [DIGESTS[:-4], [50, 10, 500, 1] * 2],
        [DIGESTS, [50, 10, 500, 1]],
        [DIGESTS, [50, 10, 500]],
        [DIGESTS, [50, 10, 500, 1] * 3],
        [DIGESTS, [50, 10, 500, 1, 50, 10, 501, 1]],
        [DIGESTS, [50, 10, 500, 1, 51, 10, 500, 1]],
        [DIGESTS, [50, 20, 500, 1, 50, 0, 500, 1]],
        [DIGESTS, [50, 10, 1000, 1, 50, 10, 0, 1]],
        [DIGESTS, [-50, 10, 500, 1, 150, 10, 500, 1]],
        [DIGESTS, [50, 10, 500, -1, 50, 10, 500, 1]],
        [DIGESTS, [50, 10, 500, 1 << 63, 50, 10, 500, 1]],
        [DIGESTS, [50, 10, 500, True, 50, 10, 500, 1]],
        [DIGESTS, [50, 10, 500, 1.5, 50, 10, 500, 1]],
        [DIGESTS, ["50", 10, 500, 1, 50, 10, 500, 1]],
    ],
)
def test_parts_that_are_refused(parts: Any) -> None:
    place = [1000, 100, str(Digest.of(b"t")), 20]
    good = Table.from_json(place, [DIGESTS, [50, 10, 500, 1] * 2], 10_000, 1000, Limits())
    assert [part.rows for part in good.parts] == [10, 10]
    with pytest.raises(FormatError):
        Table.from_json(place, parts, 10_000, 1000, Limits())


def test_parts_of_chance_never_fail_otherwise() -> None:
    """Whatever is in the place of the numbers: refused, or read without a look outside of the data."""
    file, data = indexed(rows_of(2 * PART_ROWS))
    assert file.table is not None
    size = file.entry.inode.size if file.entry.inode is not None else 0
    chance = random.Random(11)
    for _ in range(300):
        digests, numbers = copy.deepcopy(file.table.parts_to_json())
        at, by = chance.randrange(8), chance.choice([1, -1, 4096, 1 << 40, -(1 << 40)])
        numbers[at] += by
        if chance.random() < 0.7:
            numbers[(at + 4) % 8] -= by
        try:
            table = Table.from_json(file.table.to_json(), [digests, numbers], BLOB, size, Limits())
            table.extents(data, size, 0, OFFSET, BLOB, Limits())
        except CkptfsError:
            continue
        assert at in (3, 7)  # where the frames of a part begin: their own digests catch that
