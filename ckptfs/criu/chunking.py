"""Where a pages file is cut: where the process would cut it, at fixed virtual addresses.

CRIU writes the dumped pages of a process one after the other. Between two dumps pages come and go, and whatever comes
after them in the file moves; their addresses do not. So a chunk holds the pages of one aligned span of the address
space, and its cells those of smaller ones: the next dump has the same cells wherever the process did not write. Numbers
in, numbers out; the pagemap is read by criu/pagemap.py, the chunks are made by the layer writer. The measurements are
in docs/adr/0004-page-chunks.md.
"""

from collections.abc import Iterable, Iterator

from ckptfs.settings import GiB, KiB

SPAN = 256 * KiB  # of the address space: a chunk, what is verified and kept as one
CELL = 16 * KiB  # of the address space: what two dumps share; 32 KiB misses 1.5 x the changed bytes (ADR 0004)

# Larger files have larger cells: a cell takes 40 bytes of memory while it is written. The sizes are far apart: a
# process that crosses one shares only whole chunks with its last dump, once.
_CELLS = ((16 * GiB, CELL), (64 * GiB, 64 * KiB))


def cell_for(size: int) -> int:
    """The cell for a pages file of `size` bytes."""
    return next((cell for limit, cell in _CELLS if size <= limit), SPAN)


def page_cuts(runs: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, ...]]:
    """The chunks of a pages file of `size` bytes, each as the lengths of its cells; they sum up to the runs' bytes.

    runs: (virtual address, bytes) of what the file holds, in the order of the file, as the pagemap lists it.
    A cell ends where the next page is of another cell of the address space. A chunk no larger than a cell is not cut.
    """
    for span in _pieces(runs, SPAN):
        yield tuple(map(_length, _cells(span, cell_for(size))))


def placed_cells(runs: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int, int]]:
    """(virtual address, offset in the file, bytes) of the cells that `page_cuts` makes."""
    offset = 0
    for span in _pieces(runs, SPAN):
        for cell in _cells(span, cell_for(size)):
            yield cell[0][0], offset, _length(cell)
            offset += _length(cell)


def _cells(span: list[tuple[int, int]], cell: int) -> Iterable[list[tuple[int, int]]]:
    return [span] if _length(span) <= cell else _pieces(span, cell)


def _length(piece: list[tuple[int, int]]) -> int:
    return sum(length for _, length in piece)


def _pieces(runs: Iterable[tuple[int, int]], unit: int) -> Iterator[list[tuple[int, int]]]:
    """The runs, cut at every multiple of `unit` and gathered by unit, in file order."""
    current = -1
    piece: list[tuple[int, int]] = []
    for run_address, run_length in runs:
        address, end = run_address, run_address + run_length
        while address < end:
            number = address // unit
            stop = min((number + 1) * unit, end)
            if number != current:
                if piece:
                    yield piece
                current, piece = number, []
            piece.append((address, stop - address))
            address = stop
    if piece:
        yield piece
