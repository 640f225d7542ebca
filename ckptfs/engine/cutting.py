"""Encoded chunks out of a body that arrives in pieces, without copying what lies whole in one of them.

Pure: no I/O, no decoding. Used by extents.py.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from ckptfs.model.toc import Chunk

Piece: TypeAlias = bytes | memoryview


class Cutter:
    """`chunks`, sorted by offset, may overlap and leave gaps. Of the gaps no piece has to come."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks
        self._at = 0
        self._filled = 0
        self._pieces: deque[tuple[int, Piece]] = deque()  # what chunks that are not whole yet may need, by offset

    @property
    def missing(self) -> Sequence[Chunk]:
        """The chunks that have not been whole so far."""
        return self._chunks[self._at :]

    def feed(self, at: int, piece: Piece) -> Iterator[tuple[Chunk, memoryview]]:
        """Each chunk that this piece, of the blob's byte `at`, makes whole, with its encoded bytes.

        To be exhausted before the next piece. Pieces ascend.
        """
        self._pieces.append((at, piece))
        self._filled = at + len(piece)
        while self._at < len(self._chunks):
            chunk = self._chunks[self._at]
            while self._pieces and self._pieces[0][0] + len(self._pieces[0][1]) <= chunk.offset:
                self._pieces.popleft()
            if chunk.offset + chunk.size > self._filled:
                return
            self._at += 1
            yield chunk, self._between(chunk.offset, chunk.offset + chunk.size)

    def _between(self, low: int, high: int) -> memoryview:
        parts = []
        for start, piece in self._pieces:
            if start >= high:
                break
            parts.append(memoryview(piece)[max(low - start, 0) : high - start])
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
