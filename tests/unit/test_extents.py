"""Parts of chunks and files by offset: what an extent names is there in full, or it is an error."""

import pytest

from ckptfs.errors import IntegrityError
from ckptfs.model.toc import Chunk, Extent, piece_of
from ckptfs.model.windows import WindowExtents


@pytest.mark.parametrize("data", [b"0123456789", bytearray(b"0123456789"), memoryview(b"0123456789")])
def test_the_piece_that_an_extent_names(data: bytes | bytearray | memoryview) -> None:
    assert piece_of(data, 7, 3) == b"789" and piece_of(data, 0, 10) == data


@pytest.mark.parametrize(("skip", "length", "lacking"), [(0, 11, 1), (7, 4, 1), (10, 1, 1), (12, 5, 5)])
def test_a_chunk_that_is_too_short(skip: int, length: int, lacking: int) -> None:
    with pytest.raises(IntegrityError, match=f"a chunk is {lacking} bytes shorter"):
        piece_of(b"0123456789", skip, length)


def test_windows_are_a_sequence() -> None:
    chunks = [Chunk(bytes([number]) * 32, 0, 10 * number, 10, 10) for number in range(3)]
    source = [Extent(10 * number, 10, chunk) for number, chunk in enumerate(chunks)]
    windows = WindowExtents([source], [(0, 5, 10), (0, 25, 5)])
    expected = [Extent(0, 5, chunks[0], 5), Extent(5, 5, chunks[1]), Extent(10, 5, chunks[2], 5)]
    assert list(windows) == expected and [windows[index] for index in range(3)] == expected
    assert windows[-1] == expected[2] and windows[1:] == expected[1:]
    with pytest.raises(IndexError):
        windows[3]
