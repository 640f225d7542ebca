"""The grid: chunks for layers that have none of their own.

Chunk i of a grid is the decoded tar's bytes [i * unit, (i + 1) * unit). A file's extents are worked out when they are
asked for and not kept: a header that claims 4 EiB costs as much as one that claims four bytes. Not for layers with a
TOC, whose chunks come from it.
"""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import overload

from ckptfs.model.toc import Chunk, Extent, MadeExtents, derived_key

KIND = "grid"


class Grid:
    """Makes and remembers the chunks of one layer, so that files share them.

    `end` is the stream's length where it is known (plain tar): the last chunk is shortened to it.
    """

    def __init__(self, layer_digest: str, layer: int, unit: int, end: int | None = None) -> None:
        self.unit = unit
        self._digest = layer_digest
        self._layer = layer
        self._end = end
        self._chunks: dict[int, Chunk] = {}

    def chunk(self, index: int) -> Chunk:
        found = self._chunks.get(index)
        if found is None:
            offset = index * self.unit
            length = self.unit if self._end is None else min(self.unit, self._end - offset)
            key = derived_key(self._digest, offset, kind=KIND)
            # Two threads that meet here get the same object.
            found = self._chunks.setdefault(index, Chunk(key, self._layer, offset, length, length))
        return found

    def extents(self, segments: Sequence[tuple[int, int, int]]) -> Sequence[Extent]:
        """See `tar_scanner.Placement`."""
        runs = [_Run(self, start, length, position) for start, length, position in segments]
        if not runs:
            return ()
        return runs[0] if len(runs) == 1 else _Runs(runs)


class _Made(MadeExtents):
    """A sequence whose items are made when they are asked for."""

    __slots__ = ()

    @abstractmethod
    def _at(self, index: int) -> Extent: ...

    @overload
    def __getitem__(self, index: int) -> Extent: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Extent]: ...
    def __getitem__(self, index: int | slice) -> Extent | Sequence[Extent]:
        count = len(self)
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(count))]
        if index < 0:
            index += count
        if not 0 <= index < count:
            raise IndexError(index)
        return self._at(index)


class _Run(_Made):
    """File bytes [start, start + length) lie at `position` of the stream; length > 0."""

    __slots__ = ("_grid", "_length", "_position", "_start")

    def __init__(self, grid: Grid, start: int, length: int, position: int) -> None:
        self._grid = grid
        self._start = start
        self._length = length
        self._position = position

    def __len__(self) -> int:
        unit = self._grid.unit
        # Python's len() has to fit ssize_t; a file of 2**62 bytes is 2**44 chunks.
        return (self._position + self._length - 1) // unit - self._position // unit + 1

    def index_at(self, offset: int) -> int:
        if offset < self._start:
            return -1
        unit = self._grid.unit
        return min((self._position + offset - self._start) // unit - self._position // unit, len(self) - 1)

    def _at(self, index: int) -> Extent:
        grid, position = self._grid, self._position
        first = position // grid.unit
        low = max(position, (first + index) * grid.unit)
        high = min(position + self._length, (first + index + 1) * grid.unit)
        chunk = grid.chunk(first + index)
        return Extent(self._start + low - position, high - low, chunk, low - chunk.offset)


class _Runs(_Made):
    """The runs of a sparse file, one after another; what is between them is a hole."""

    __slots__ = ("_ends", "_runs")

    def __init__(self, runs: list[_Run]) -> None:
        self._runs = runs
        self._ends: list[int] = []  # number of extents up to and with run i
        total = 0
        for run in runs:
            total += len(run)
            self._ends.append(total)

    def __len__(self) -> int:
        return self._ends[-1]

    def index_at(self, offset: int) -> int:
        run = bisect_right(self._runs, offset, key=_start) - 1
        if run < 0:
            return -1
        return self._runs[run].index_at(offset) + (self._ends[run - 1] if run else 0)

    def _at(self, index: int) -> Extent:
        run = bisect_right(self._ends, index)
        return self._runs[run]._at(index - (self._ends[run - 1] if run else 0))


def _start(run: _Run) -> int:
    return run._start
