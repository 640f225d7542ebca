"""Increments: a checkpoint that leaves to its parent the pages that have not changed, and how it becomes whole again.

criu writes them after `criu pre-dump`; `ckptfs push --parent` makes them of two whole dumps. A page in the parent is
PARENT in the pagemap and nothing else: criu 4.2's lazy-pages daemon never hands out a page that is LAZY and PARENT
(criu/uffd.c sets io_complete for the checkpoint's own file only), so the mark of laziness is the parent's. Numbers in,
numbers out. Called by push/ and image/.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ckptfs.criu.images import header
from ckptfs.criu.memory import Memory, Place
from ckptfs.criu.pagemap import LAZY, PARENT, PRESENT, Pagemap, Run
from ckptfs.criu.wire import encoded
from ckptfs.errors import FormatError

_MANY = (1 << 32) - 1  # what compat_nr_pages, a uint32, can say


def encode_pagemap(like: bytes, name: str, pages_id: int, runs: Iterable[Run]) -> bytes:
    """A pagemap image with the header of the one in `like`, for a pages file of this number.

    images/pagemap.proto: old readers know the number of pages by field 2 only, and PARENT by field 3.
    """
    kind = "pagemap-shmem" if name.startswith("pagemap-shmem") else "pagemap"
    out = bytearray(like[: header(like, kind, name)])
    _record(out, b"\x08" + encoded(pages_id))
    for vaddr, pages, flags in runs:
        entry = b"\x08" + encoded(vaddr) + b"\x10" + encoded(min(pages, _MANY))
        if flags & PARENT:
            entry += b"\x18\x01"
        _record(out, entry + b"\x20" + encoded(flags) + b"\x28" + encoded(pages))
    return bytes(out)


def renumbered(image: bytes, name: str, pages_id: int) -> bytes:
    """The same pagemap for a pages file of another number; whatever it says of its pages stays as it is."""
    kind = "pagemap-shmem" if name.startswith("pagemap-shmem") else "pagemap"
    start = header(image, kind, name)
    out = bytearray(image[:start])
    _record(out, b"\x08" + encoded(pages_id))
    return bytes(out + image[start + 4 + int.from_bytes(image[start : start + 4], "little") :])


def left_to_parent(pagemap: Pagemap, shared: bytes | bytearray, page_size: int) -> Iterator[Run]:
    """The runs of `pagemap` when its parent has the pages that are 1 in `shared`, a byte for each present page."""
    last: Run | None = None
    for run in _marked(pagemap, shared, page_size):
        if last is not None and last.flags == run.flags == PARENT and last.vaddr + last.pages * page_size == run.vaddr:
            last = Run(last.vaddr, last.pages + run.pages, PARENT)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def _marked(pagemap: Pagemap, shared: bytes | bytearray, page_size: int) -> Iterator[Run]:
    position = 0
    for vaddr, pages, flags in pagemap.runs:
        if not flags & PRESENT:
            yield Run(vaddr, pages, flags)
            continue
        done = 0
        for count, is_shared in stretches(shared, position, position + pages):
            yield Run(vaddr + done * page_size, count, PARENT if is_shared else flags)
            done += count
        position += pages


def stretches(marks: bytes | bytearray, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bool]]:
    """(how many, whether marked) of neighbours in marks[start:end] that are all 0 or all 1."""
    end = len(marks) if end is None else end
    while start < end:
        value = marks[start]
        stop = marks.find(1 - value, start, end)
        stop = end if stop < 0 else stop
        yield stop - start, bool(value)
        start = stop


class Joined:
    """The memory of one task, or shared object, that lies in several checkpoints, as one pages file would have it.

    levels: its pagemap, then those of its parents, nearest first, all in one directory's names: files are found by
    `pages-N.img` alone. sizes: of these files. FormatError when a page is in none of them. Reads nothing, but goes
    through all runs, 300 000 in a second: where nobody should wait, make it in a thread.

    size   bytes of the joined pages file.
    """

    def __init__(self, levels: Sequence[Pagemap], sizes: Mapping[str, int]) -> None:
        memory = Memory(levels, sizes)
        page_size = memory.page_size
        self.size = 0
        self._runs: list[Run] = []
        self._page_size = page_size
        self._levels = array("B")
        self._offsets = array("Q")
        self._lengths = array("Q")
        for vaddr, pages, flags in levels[0].runs:
            if not flags & (PRESENT | PARENT):
                continue
            end, at = vaddr + pages * page_size, vaddr
            for place in memory.find(vaddr, pages * page_size):
                if place.vaddr != at:
                    break
                self._add(place, page_size)
                at += place.length
            if at != end:
                raise FormatError(f"{levels[0].name}: the page at {at:#x} is in no parent", hint="the image is damaged")

    def __len__(self) -> int:
        """How many places there are."""
        return len(self._offsets)

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(level, offset, length): where the pages lie, in the order of the joined file."""
        return zip(self._levels, self._offsets, self._lengths, strict=True)

    def check(self, whole: Pagemap) -> None:
        """FormatError unless `whole` is the pagemap of the joined file: the same pages, as lazy as they are here."""
        runs: list[Run] = []
        for run in whole.runs:
            if run.flags & PRESENT:
                _append(runs, run, self._page_size)
        if runs != self._runs:
            raise FormatError(f"{whole.name} lists other pages than its increments", hint="the image is damaged")

    def _add(self, place: Place, page_size: int) -> None:
        self.size += place.length
        self._levels.append(place.level)
        self._offsets.append(place.offset)
        self._lengths.append(place.length)
        flags = PRESENT | LAZY if place.lazy else PRESENT
        _append(self._runs, Run(place.vaddr, place.length // page_size, flags), page_size)


def _append(runs: list[Run], run: Run, page_size: int) -> None:
    """Add a run behind the last one, or to it."""
    last = runs[-1] if runs else None
    if last is not None and last.flags == run.flags and last.vaddr + last.pages * page_size == run.vaddr:
        runs[-1] = Run(last.vaddr, last.pages + run.pages, run.flags)
    else:
        runs.append(run)


def _record(out: bytearray, message: bytes) -> None:
    out += len(message).to_bytes(4, "little")
    out += message
