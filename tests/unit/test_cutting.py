"""Chunks out of pieces: every way to cut a body gives the same bytes."""

from hypothesis import given
from hypothesis import strategies as st

from ckptfs.engine.cutting import Cutter
from ckptfs.model.toc import Chunk

BODY = bytes(range(256)) * 4
START = 1000


def _chunk(offset: int, size: int) -> Chunk:
    return Chunk(offset.to_bytes(4, "big") + size.to_bytes(28, "big"), 0, START + offset, size, size)


places = st.tuples(st.integers(0, len(BODY) - 1), st.integers(1, 300)).map(
    lambda place: _chunk(place[0], min(place[1], len(BODY) - place[0]))
)


@given(st.lists(places, min_size=1, max_size=12), st.lists(st.integers(1, 400), max_size=20))
def test_any_pieces_give_every_chunk_once(chunks: list[Chunk], cuts: list[int]) -> None:
    """Gaps, overlaps and chunks inside others, as eStargz and gzip have them, and pieces of any size."""
    chunks.sort(key=lambda chunk: chunk.offset)
    cutter = Cutter(chunks)
    found, at = [], 0
    for size in [*cuts, len(BODY)]:
        piece = BODY[at : at + size]
        at += len(piece)
        for chunk, encoded in cutter.feed(START + at - len(piece), piece):
            lo = chunk.offset - START
            assert lo + chunk.size <= at
            assert bytes(encoded) == BODY[lo : lo + chunk.size]
            found.append(chunk)
        assert [*found, *cutter.missing] == chunks
    assert found == chunks


def test_a_chunk_that_lies_whole_in_a_piece_is_not_copied() -> None:
    cutter = Cutter([_chunk(10, 20), _chunk(90, 20)])
    ((_, first),) = cutter.feed(START, BODY[:100])
    assert first.obj is not None
    assert len(first.obj) == 100
    ((_, second),) = cutter.feed(START + 100, BODY[100:200])
    assert bytes(second) == BODY[90:110]


def test_pieces_that_nobody_needs_any_more_are_let_go() -> None:
    cutter = Cutter([_chunk(0, 10), _chunk(500, 10)])
    for at in range(0, 500, 50):
        list(cutter.feed(START + at, BODY[at : at + 50]))
        assert len(cutter._pieces) <= 1


def test_what_nobody_needs_need_not_come() -> None:
    first, second = _chunk(10, 20), _chunk(90, 20)
    cutter = Cutter([first, second])
    assert list(cutter.feed(START + 10, BODY[10:25])) == []
    ((chunk, encoded),) = cutter.feed(START + 25, BODY[25:30])
    assert (chunk, bytes(encoded)) == (first, BODY[10:30])
    ((chunk, encoded),) = cutter.feed(START + 90, BODY[90:110])
    assert (chunk, bytes(encoded)) == (second, BODY[90:110])
