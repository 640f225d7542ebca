"""Where the bytes of an address space lie: in a checkpoint's pages file, or in a parent's.

A checkpoint made after a pre-dump holds only the pages that changed; the others are PARENT in its pagemap and are
looked up in the parent's pagemap of the same name, and so on. Numbers in, numbers out: nothing is read.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ckptfs.criu.pagemap import DEFAULT_PAGE_SIZE, LAZY, PARENT, PRESENT, Pagemap
from ckptfs.errors import FormatError


class Place(NamedTuple):
    """Memory [vaddr, vaddr + length) is bytes [offset, offset + length) of `file`.

    file   name relative to the checkpoint directory.
    level  0 for the checkpoint itself, 1 for its parent, and so on.
    lazy   whether that level says that the lazy-pages daemon may bring it.
    """

    file: str
    level: int
    vaddr: int
    offset: int
    length: int
    lazy: bool = False


class Memory:
    """The memory of one task, or one shared object.

    pagemaps: its own, then its parents', nearest first. sizes: of the pages files, by name.
    FormatError when a pages file cannot be told into pages (Pagemap.page_size), the levels do not agree on the size of
    a page, or a file or a parent is not there.
    """

    def __init__(self, pagemaps: Sequence[Pagemap], sizes: Mapping[str, int]) -> None:
        self.page_size = _page_size(pagemaps, sizes)
        self._levels = [_Level(pagemap, self.page_size) for pagemap in pagemaps]
        if any(run.flags & PARENT and not run.flags & PRESENT for run in pagemaps[-1].runs):
            raise FormatError(f"{pagemaps[-1].name} needs a parent checkpoint, which is not there")

    def find(self, vaddr: int, length: int) -> Iterator[Place]:
        """The places of [vaddr, vaddr + length), by address. What no file has was never written: it reads as zeros."""
        return self._find(0, vaddr, length)

    def _find(self, number: int, vaddr: int, length: int) -> Iterator[Place]:
        if number == len(self._levels):
            return
        level, end = self._levels[number], vaddr + length
        for index in range(level.first(vaddr), len(level.runs)):
            start, pages, flags = level.runs[index]
            if start >= end:
                return
            low, high = max(start, vaddr), min(start + pages * self.page_size, end)
            if low >= high:
                continue
            if flags & PRESENT:
                offset = level.offsets[index] + low - start
                yield Place(level.file, number, low, offset, high - low, bool(flags & LAZY))
            elif flags & PARENT:
                yield from self._find(number + 1, low, high - low)


class _Level:
    """One pagemap with the offset of each of its runs."""

    def __init__(self, pagemap: Pagemap, page_size: int) -> None:
        self.file = pagemap.file
        self.runs = pagemap.runs
        self.offsets: list[int] = []
        self._starts = [run.vaddr for run in pagemap.runs]
        offset = 0
        for run in pagemap.runs:
            self.offsets.append(offset)
            if run.flags & PRESENT:
                offset += run.pages * page_size

    def first(self, vaddr: int) -> int:
        """The index of the first run that may hold `vaddr`."""
        return max(bisect_right(self._starts, vaddr) - 1, 0)


def _page_size(pagemaps: Sequence[Pagemap], sizes: Mapping[str, int]) -> int:
    """Of all levels: one that leaves every page to its parents has no file of which it could be told."""
    told: set[int] = set()
    for pagemap in pagemaps:
        if pagemap.file not in sizes and pagemap.present_pages:
            raise FormatError(f"{pagemap.name} needs {pagemap.file}, which is not there")
        size = pagemap.page_size(sizes.get(pagemap.file, 0))
        if size is not None:
            told.add(size)
    if len(told) > 1:
        raise FormatError(f"{pagemaps[0].name} and its parents have pages of different sizes: {sorted(told)}")
    return told.pop() if told else DEFAULT_PAGE_SIZE
