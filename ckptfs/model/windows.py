"""Extents of a file that is put together from many small windows into others: columns, objects made when asked for.

The memory of an increment is such a file: single pages of the latest checkpoint between those of the ones before. A
process of 4 GiB in which every second page has changed is a million windows: 20 MB as columns, 200 MB as objects.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from ckptfs.model.toc import Extent, MadeExtents, index_at


class WindowExtents(MadeExtents):
    """The parts `places` of the files that `sources` are the extents of, one after another: (source, offset, length).

    The sources must not change any more.
    """

    __slots__ = ("_numbers", "_skips", "_sources", "_starts", "_which")

    def __init__(self, sources: Sequence[Sequence[Extent]], places: Iterable[tuple[int, int, int]]) -> None:
        self._sources = sources
        self._which = array("H")
        self._numbers = array("I")
        self._skips = array("I")
        self._starts = array("Q")  # each followed by the end of its window
        position = 0
        for which, offset, length in places:
            source, end = sources[which], offset + length
            for number in range(max(index_at(source, offset), 0), len(source)):
                extent = source[number]
                low, high = max(extent.start, offset), min(extent.start + extent.length, end)
                if extent.start >= end:
                    break
                if low < high:
                    self._which.append(which)
                    self._numbers.append(number)
                    self._skips.append(low - extent.start)
                    self._starts.append(position + low - offset)
                    self._starts.append(position + high - offset)
            position += length

    def __len__(self) -> int:
        return len(self._numbers)

    def index_at(self, offset: int) -> int:
        return (bisect_right(self._starts, offset) + 1) // 2 - 1

    def __iter__(self) -> Iterator[Extent]:
        return map(self.at, range(len(self)))

    def at(self, index: int) -> Extent:
        start, end = self._starts[2 * index], self._starts[2 * index + 1]
        extent = self._sources[self._which[index]][self._numbers[index]]
        return Extent(start, end - start, extent.chunk, extent.skip + self._skips[index])
