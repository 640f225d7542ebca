"""What two files have in common, as far as their chunks tell it: nothing is read.

The same chunk at the same place means the same bytes, and so does the same digest; another digest of a whole chunk
means others, if both are of one kind. Another key does not: that of a chunk which a stream was cut into is its place in
its layer, whether or not this node has learnt its digest since. Called by image_diff.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ckptfs.model.toc import Chunk, Inode, overlapping


class _Piece(NamedTuple):
    """Bytes [start, start + length) of what is compared are chunk bytes from `skip` on; no chunk: zeros."""

    start: int
    length: int
    chunk: Chunk | None
    skip: int


def unknown_parts(
    first: Inode,
    offset: int,
    second: Inode,
    other_offset: int,
    length: int,
    comparable: Callable[[Chunk, Chunk], bool],
) -> list[tuple[int, int]] | None:
    """The parts (start, length), from the offsets on, that have to be read to know whether both hold the same.

    None where they are known to differ; [] where they are known to be equal. `comparable`: whether the digests of two
    chunks, of the first and of the second, are of one kind.
    """
    out: list[tuple[int, int]] = []
    for a, b in _paired(_pieces(first, offset, length), _pieces(second, other_offset, length)):
        low, high = max(a.start, b.start), min(a.start + a.length, b.start + b.length)
        if a.chunk is None and b.chunk is None:
            continue
        if a.chunk is not None and b.chunk is not None:
            told = a.chunk.digest is not None and b.chunk.digest is not None and comparable(a.chunk, b.chunk)
            same = a.chunk.key == b.chunk.key or (told and a.chunk.digest == b.chunk.digest)
            if same and a.skip - a.start == b.skip - b.start:
                continue
            aligned = (a.start, a.length) == (b.start, b.length) and _is_whole(a) and _is_whole(b)
            if aligned and told:
                return None
        if out and sum(out[-1]) == low:
            low = out.pop()[0]
        out.append((low, high - low))
    return out


def _is_whole(piece: _Piece) -> bool:
    chunk = piece.chunk
    return chunk is not None and piece.skip == 0 and piece.length == chunk.length


def _pieces(inode: Inode, offset: int, length: int) -> Iterator[_Piece]:
    at, end = offset, offset + length
    for extent in overlapping(inode.extents, offset, length):
        low, high = max(extent.start, at), min(extent.start + extent.length, end)
        if low > at:
            yield _Piece(at - offset, low - at, None, 0)
        yield _Piece(low - offset, high - low, extent.chunk, extent.skip + low - extent.start)
        at = high
    if at < end:
        yield _Piece(at - offset, end - at, None, 0)


def _paired(first: Iterable[_Piece], second: Iterable[_Piece]) -> Iterator[tuple[_Piece, _Piece]]:
    """Every two that overlap; both cover the same bytes without a gap."""
    others = iter(second)
    other = next(others, None)
    for piece in first:
        end = piece.start + piece.length
        while other is not None and other.start < end:
            yield piece, other
            if other.start + other.length > end:
                break
            other = next(others, None)
