"""Which memory a pages-N.img holds: pagemap-PID.img and pagemap-shmem-ID.img.

A pagemap names one pages file and lists runs of pages by virtual address. The pages that are PRESENT lie in the pages
file one after another, in that order, so an offset is a sum.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ckptfs.criu.images import DEFAULT_LIMITS, header
from ckptfs.criu.wire import Message, varint
from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.settings import Limits

PARENT = 1  # the pages are in the parent checkpoint
LAZY = 2  # `criu lazy-pages` may bring them later
PRESENT = 4  # the pages are in the pages file
DEFAULT_PAGE_SIZE = 4096  # for what has no pages
_KNOWN_FLAGS = PARENT | LAZY | PRESENT
_ADDRESS_END = 1 << 64


class Run(NamedTuple):
    """`pages` consecutive pages at `vaddr`."""

    vaddr: int
    pages: int
    flags: int


class PlacedRun(NamedTuple):
    """Bytes [offset, offset + length) of the pages file are memory at `vaddr`."""

    vaddr: int
    offset: int
    length: int
    lazy: bool


class Pagemap(NamedTuple):
    """`pages_id` is the N of pages-N.img. Runs ascend by address and do not overlap."""

    name: str
    pages_id: int
    runs: tuple[Run, ...]

    @property
    def opaque(self) -> bool:
        """Flags that nobody here knows: pages may be compressed, and offsets cannot be told."""
        return any(run.flags & ~_KNOWN_FLAGS for run in self.runs)

    @property
    def present_pages(self) -> int:
        return sum(run.pages for run in self.runs if run.flags & PRESENT)

    @property
    def file(self) -> str:
        """The pages file, named as the pagemap is: with its directory where that has one."""
        directory, slash, _ = self.name.rpartition("/")
        return f"{directory}{slash}pages-{self.pages_id}.img"

    def page_size(self, file_size: int) -> int | None:
        """Bytes per page, from the size of the pages file (no image says it); FormatError where none fits.

        None where no page is present: then nothing tells, and a parent's pages may be of any size.
        """
        pages = self.present_pages
        if self.opaque:
            raise FormatError(f"{self.name} has flags of a newer CRIU", hint="its pages may be compressed")
        if pages == 0:
            return None
        size, rest = divmod(file_size, pages)
        if rest or size not in (4096, 16384, 65536):  # the page sizes of the machines that CRIU runs on
            raise FormatError(
                f"{self.name} lists {pages} pages, but {self.file} has {file_size} bytes",
                hint="the checkpoint is cut short, or its pages are compressed",
            )
        return size

    def placed(self, page_size: int) -> Iterator[PlacedRun]:
        """The present runs with their place in the pages file."""
        offset = 0
        for vaddr, pages, flags in self.runs:
            if flags & PRESENT:
                yield PlacedRun(vaddr, offset, pages * page_size, bool(flags & LAZY))
                offset += pages * page_size


def parse_pagemap(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> Pagemap:
    """A pagemap of a task or of shared memory. FormatError for overlapping or descending runs."""
    kind = "pagemap-shmem" if name.rpartition("/")[2].startswith("pagemap-shmem") else "pagemap"
    position = header(data, kind, name, limits)
    runs: list[Run] = []
    try:
        size = int.from_bytes(data[position : position + 4], "little")
        start, position = position + 4, position + 4 + size
        if size == 0 or position > len(data):
            raise FormatError(f"{name} has no head")
        pages_id = Message(data[start:position], f"{name}, record 1").uint(1)
        end, floor = len(data), 0
        while position < end:
            size = int.from_bytes(data[position : position + 4], "little")
            start, position = position + 4, position + 4 + size
            if position > end:
                raise IndexError
            run = _run(data, start, position)
            if run.vaddr < floor:
                raise FormatError(f"{name}: the run at {run.vaddr:#x} overlaps the one before it")
            floor = run.vaddr + run.pages * DEFAULT_PAGE_SIZE
            if floor > _ADDRESS_END:
                raise FormatError(f"{name}: the run at {run.vaddr:#x} ends past the address space")
            if run.pages:
                runs.append(run)
            if len(runs) > limits.criu_records:
                raise LimitExceeded(f"{name} has more than {limits.criu_records} runs")
    except IndexError:
        raise FormatError(f"{name} ends in the middle of a record") from None
    except ValueError as error:
        raise FormatError(f"{name} has {error}") from None
    return Pagemap(name, pages_id, tuple(runs))


def _run(data: bytes, start: int, end: int) -> Run:
    """One pagemap entry: five numbers, decoded in place because there are so many."""
    position = start
    vaddr = compat_pages = flags = pages = in_parent = -1
    while position < end:
        tag = data[position]
        value, position = varint(data, position + 1)
        if tag == 0x08:
            vaddr = value
        elif tag == 0x10:
            compat_pages = value
        elif tag == 0x18:
            in_parent = value
        elif tag == 0x20:
            flags = value
        elif tag == 0x28:
            pages = value
        elif tag & 7 or tag > 0x7F:  # of a CRIU newer than this module
            return _newer_run(data[start:end])
    if vaddr < 0 or compat_pages < 0 or position != end:
        raise IndexError
    return _meant(vaddr, compat_pages if pages < 0 else pages, flags, in_parent > 0)


def _newer_run(data: bytes) -> Run:
    m = Message(data, "a pagemap entry")
    return _meant(m.uint(1), m.uint(5, m.uint(2)), m.uint(4, -1), m.flag(3))


def _meant(vaddr: int, pages: int, flags: int, in_parent: bool) -> Run:
    """Images older than the flags have only `in_parent`."""
    if flags < 0:
        flags = 0 if in_parent else PRESENT
    return Run(vaddr, pages, flags | PARENT if in_parent else flags)
