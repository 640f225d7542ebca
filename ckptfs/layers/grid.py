"""The grid: chunks for layers that have none of their own.

Chunk i of a grid is the decoded tar's bytes [i * unit, (i + 1) * unit). A file's extents are worked out when they are
asked for and not kept: a header that claims 4 EiB costs as much as one that claims four bytes. `Cuts` is the same for
streams that somebody else has cut, at any places. Not for layers with a TOC, whose chunks come from it.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from ckptfs.model.toc import Chunk, Extent, MadeExtents, derived_key, slice_extents
from ckptfs.settings import Sizes

KIND = "grid"
_STREAM_CHUNKS = 512  # of compressed bytes at most, roughly; a gzip index has a window for each
_REMEMBERED = 4096  # chunks of 270 bytes; to make one takes 2 us


def stream_unit(blob_size: int, sizes: Sizes) -> int:
    """The grid's unit of a gzip layer: a window of its index takes 32 KiB, so large layers have larger chunks."""
    unit = sizes.gzip_grid
    while blob_size // unit > _STREAM_CHUNKS and unit < sizes.sequential_extent:
        unit *= 2
    return unit


class Partition(Protocol):
    """A decoded stream cut into chunks."""

    def index(self, position: int) -> int:
        """Which chunk holds the byte at `position`."""

    def start(self, index: int) -> int:
        """Where a chunk begins; of the last one's successor, where the stream ends."""

    def chunk(self, index: int) -> Chunk: ...


class Grid:
    """Makes the chunks of one layer, and remembers the last ones, so that files share them.

    `end` is the stream's length where it is known (plain tar): the last chunk is shortened to it.
    """

    def __init__(
        self, layer_digest: str, layer: int, unit: int, end: int | None = None, *, compression: str = "none"
    ) -> None:
        self.unit = unit
        self._kind = f"{KIND}{unit}" if compression == "gzip" else KIND  # units differ: so must keys
        self._digest = layer_digest
        self._layer = layer
        self._end = end
        self._chunks: dict[int, Chunk] = {}

    def index(self, position: int) -> int:
        return position // self.unit

    def start(self, index: int) -> int:
        return index * self.unit

    def chunk(self, index: int) -> Chunk:
        return _remembered(self._chunks, index, self._made)

    def _made(self, index: int) -> Chunk:
        offset = index * self.unit
        length = self.unit if self._end is None else min(self.unit, self._end - offset)
        return Chunk(self.key(index), self._layer, offset, length, length)

    def key(self, index: int) -> bytes:
        """What the node's cache calls a chunk, however it came."""
        return derived_key(self._digest, index * self.unit, kind=self._kind)

    def extents(self, segments: Sequence[tuple[int, int, int]]) -> Sequence[Extent]:
        """See `tar_scanner.Placement`."""
        return placed(self, segments)


def _remembered(chunks: dict[int, Chunk], index: int, make: Callable[[int], Chunk]) -> Chunk:
    """Two threads that meet here get the same object."""
    found = chunks.get(index)
    if found is None:
        if len(chunks) >= _REMEMBERED:
            chunks.clear()
        found = chunks.setdefault(index, make(index))
    return found


class Cuts:
    """A stream cut at `starts` (ascending, the first is 0, the last one is the stream's end)."""

    def __init__(self, starts: Sequence[int], make: Callable[[int], Chunk]) -> None:
        self._starts = starts
        self._make = make
        self._chunks: dict[int, Chunk] = {}

    def index(self, position: int) -> int:
        return bisect_right(self._starts, position) - 1

    def start(self, index: int) -> int:
        return self._starts[index]

    def chunk(self, index: int) -> Chunk:
        return _remembered(self._chunks, index, self._make)

    def extents(self, segments: Sequence[tuple[int, int, int]]) -> Sequence[Extent]:
        """See `tar_scanner.Placement`."""
        return placed(self, segments)


def placed(partition: Partition, segments: Sequence[tuple[int, int, int]]) -> "Sequence[Extent]":
    """The extents of a file whose bytes [start, start + length) lie at `position` of the stream, for each segment."""
    runs = [_Run(partition, start, length, position) for start, length, position in segments]
    if not runs:
        return ()
    return runs[0] if len(runs) == 1 else _Runs(runs)


def windows(extents: Sequence[Extent], segments: Iterable[tuple[int, int, int]]) -> "Sequence[Extent]":
    """The extents of a file whose bytes [start, start + length) are those at `position` of another, that of `extents`.

    In a file of a partition they are not made either: a tar inside may claim as much as the one around it.
    """
    runs = _runs_of(extents)
    if not runs:
        return tuple(
            Extent(start + piece.start, piece.length, piece.chunk, piece.skip)
            for start, length, position in segments
            for piece in slice_extents(extents, position, length)
        )
    found = []
    for start, length, position in segments:
        end = position + length
        for number in range(max(bisect_right(runs, position, key=_start) - 1, 0), len(runs)):
            at, size, there = runs[number].segment
            if at >= end:
                break
            low, high = max(at, position), min(at + size, end)
            if low < high:
                found.append((start + low - position, high - low, there + low - at))
    return placed(runs[0].partition, found)


def segments_of(extents: Sequence[Extent]) -> Sequence[tuple[int, int, int]]:
    """What `placed` made the extents from."""
    return [run.segment for run in _runs_of(extents)]


def _runs_of(extents: Sequence[Extent]) -> "Sequence[_Run]":
    if isinstance(extents, _Run):
        return (extents,)
    return extents.runs if isinstance(extents, _Runs) else ()


class _Run(MadeExtents):
    """File bytes [start, start + length) lie at `position` of the stream; length > 0."""

    __slots__ = ("_length", "_position", "_start", "partition")

    def __init__(self, partition: Partition, start: int, length: int, position: int) -> None:
        self.partition = partition
        self._start = start
        self._length = length
        self._position = position

    @property
    def segment(self) -> tuple[int, int, int]:
        return self._start, self._length, self._position

    def __len__(self) -> int:
        # Python's len() has to fit ssize_t; a file of 2**62 bytes is 2**44 chunks.
        return self.partition.index(self._position + self._length - 1) - self.partition.index(self._position) + 1

    def index_at(self, offset: int) -> int:
        if offset < self._start:
            return -1
        first = self.partition.index(self._position)
        return min(self.partition.index(self._position + offset - self._start) - first, len(self) - 1)

    def at(self, index: int) -> Extent:
        cuts, position = self.partition, self._position
        number = cuts.index(position) + index
        chunk, start = cuts.chunk(number), cuts.start(number)
        low = max(position, start)
        high = min(position + self._length, cuts.start(number + 1))
        return Extent(self._start + low - position, high - low, chunk, low - start)

    def stored(self) -> Iterator[tuple[bytes, int, int]]:
        first = self.partition.index(self._position)
        for number in range(first, first + len(self)):
            chunk = self.partition.chunk(number)
            yield chunk.key, chunk.layer, chunk.size


class _Runs(MadeExtents):
    """The runs of a sparse file, one after another; what is between them is a hole."""

    __slots__ = ("_ends", "runs")

    def __init__(self, runs: list[_Run]) -> None:
        self.runs = runs
        self._ends: list[int] = []  # number of extents up to and with run i
        total = 0
        for run in runs:
            total += len(run)
            self._ends.append(total)

    def __len__(self) -> int:
        return self._ends[-1]

    def index_at(self, offset: int) -> int:
        run = bisect_right(self.runs, offset, key=_start) - 1
        if run < 0:
            return -1
        return self.runs[run].index_at(offset) + (self._ends[run - 1] if run else 0)

    def at(self, index: int) -> Extent:
        run = bisect_right(self._ends, index)
        return self.runs[run].at(index - (self._ends[run - 1] if run else 0))


def _start(run: _Run) -> int:
    return run._start
