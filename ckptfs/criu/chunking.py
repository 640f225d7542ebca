"""Where a pages file is cut into chunks: where the process would cut it, at fixed virtual addresses.

CRIU writes the dumped pages of a process one after the other. Between two dumps pages come and go, and whatever comes
after them in the file moves; their addresses do not. So a chunk holds the pages of one aligned cell of the address
space, and the next dump has the same chunks wherever the process did not write. Numbers in, numbers out; the pagemap is
read by criu/pagemap.py, the chunks are made by the layer writer. docs/adr/0004-page-chunks.md has the measurements.
"""

from collections.abc import Iterable, Iterator

from ckptfs.settings import GiB, KiB

STEP = 16 * KiB  # cell of the address space that is one chunk: 32 KiB misses 1.5 x the changed bytes (ADR 0004)
SPAN = 256 * KiB  # cells around it, which is one chunk when hardly any of its pages are there

# Larger files take larger cells: containers/storage reads tables of contents of up to 150 MiB only, and a chunk takes
# 230 bytes of it. The sizes are far apart: a process that crosses one shares nothing with its last dump, once.
_STEPS = ((8 * GiB, STEP), (32 * GiB, 64 * KiB))


def step_for(size: int) -> int:
    """The cell for a pages file of `size` bytes."""
    return next((step for limit, step in _STEPS if size <= limit), SPAN)


def page_cuts(runs: Iterable[tuple[int, int]], size: int) -> Iterator[int]:
    """Lengths of the chunks of a pages file of `size` bytes; they sum up to the runs' bytes.

    runs: (virtual address, bytes) of what the file holds, in the order of the file, as the pagemap lists it.
    A chunk ends where the next page is of another cell. A span of 256 KiB with no more pages than fill one cell is one
    chunk, so that a process that touches a page here and there does not become a heap of tiny chunks.
    """
    step = step_for(size)
    for span in _spans(runs):
        total = sum(length for _, length in span)
        if total <= step:
            yield total
        else:
            yield from _cells(span, step)


def _spans(runs: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The runs, cut at every 256 KiB of address space and gathered by span, in file order."""
    current = -1
    span: list[tuple[int, int]] = []
    for run_address, run_length in runs:
        address, end = run_address, run_address + run_length
        while address < end:
            number = address // SPAN
            stop = min((number + 1) * SPAN, end)
            if number != current:
                if span:
                    yield span
                current, span = number, []
            span.append((address, stop - address))
            address = stop
    if span:
        yield span


def _cells(span: list[tuple[int, int]], step: int) -> Iterator[int]:
    """Lengths of the chunks of one span, a chunk for each cell that has pages."""
    current, length = -1, 0
    for run_address, run_length in span:
        address, end = run_address, run_address + run_length
        while address < end:
            number = address // step
            stop = min((number + 1) * step, end)
            if number != current:
                if length:
                    yield length
                current, length = number, 0
            length += stop - address
            address = stop
    if length:
        yield length
