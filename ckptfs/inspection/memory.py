"""The memory of checkpointed processes: reading it by address, and searching it.

Pages that were never dumped read as zeros; only the pages asked for are fetched. Owns the way from an address to bytes;
where pages lie is criu/memory's.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ckptfs.criu.memory import Memory, Place
from ckptfs.criu.pagemap import PRESENT, Pagemap, parse_pagemap
from ckptfs.errors import NotFoundError, UsageError
from ckptfs.inspection.source import Images, Range, announced, read_whole
from ckptfs.settings import KiB, MiB

_WINDOW = 4 * MiB  # read at once when searching: an extent of a sequential fetch
_LONGEST = 64 * KiB  # longest match that is found whole where it lies across two windows


class ProcessMemory:
    """The private memory of one process. FormatError where its pages cannot be told apart (compressed ones)."""

    def __init__(self, images: Images, pid: int) -> None:
        name = f"pagemap-{pid}.img"
        data = images.read(name)
        if data is None:
            raise NotFoundError(f"the checkpoint has no memory of process {pid}", hint="`inspect` lists the processes")
        self.pid = pid
        self._images = images
        pagemaps = [parse_pagemap(data, name, images.limits), *_parents(images, name)]
        sizes = {}
        for pagemap in pagemaps:
            if (size := images.files.size(images.path(pagemap.file))) is not None:
                sizes[pagemap.file] = size
        self._runs = pagemaps[0].runs
        self._memory = Memory(pagemaps, sizes)
        self.page_size = self._memory.page_size

    @property
    def size(self) -> int:
        """Bytes that were dumped, here or in a parent."""
        return sum(length for _, length in self.areas())

    def places(self, vaddr: int, length: int) -> Iterator[Place]:
        """Where the bytes of [vaddr, vaddr + length) are, ascending; gaps are zeros."""
        return self._memory.find(vaddr, length)

    def ranges(self, vaddr: int, length: int) -> list[Range]:
        """The file ranges that `read` will read, for CheckpointFiles.expect."""
        return [self._range(place) for place in self.places(vaddr, length)]

    def expect(self, areas: Iterable[tuple[int, int]]) -> None:
        """These areas (vaddr, length) will be read next."""
        self._images.files.expect([wanted for area in areas for wanted in self.ranges(*area)])

    def read(self, vaddr: int, length: int) -> bytes:
        out = bytearray(length)
        for place in self._memory.find(vaddr, length):
            start = place.vaddr - vaddr
            out[start : start + place.length] = self._images.files.read(*self._range(place))
        return bytes(out)

    def areas(self) -> Iterator[tuple[int, int]]:
        """(vaddr, length) of everything that was dumped, touching runs as one, ascending."""
        start = end = 0
        for vaddr, length in self._dumped():
            if vaddr != end:
                if end > start:
                    yield start, end - start
                start = vaddr
            end = vaddr + length
        if end > start:
            yield start, end - start

    def _dumped(self) -> Iterator[tuple[int, int]]:
        """Run by run; what a run promises of a parent counts where the parent has it."""
        for vaddr, pages, flags in self._runs:
            if flags & PRESENT:
                yield vaddr, pages * self.page_size
            else:
                yield from ((place.vaddr, place.length) for place in self.places(vaddr, pages * self.page_size))

    def windows(self, overlap: int = 0) -> Iterator[tuple[int, bytes, bool]]:
        """(vaddr, bytes, whether its area ends here) of all dumped memory, in pieces.

        A piece that goes on where the one before it ended begins with the last `overlap` bytes of that one.
        """
        tail, end = b"", 0
        for vaddr, length, last in announced(self._pieces(), lambda piece: piece[1], self._expect_pieces, _WINDOW):
            tail = tail if vaddr == end else b""
            data = tail + self.read(vaddr, length)
            yield vaddr - len(tail), data, last
            tail, end = data[len(data) - overlap :] if overlap else b"", vaddr + length

    def _pieces(self) -> Iterator[tuple[int, int, bool]]:
        """(vaddr, length, whether its area ends with it), at most _WINDOW bytes each."""
        for start, length in self.areas():
            for offset in range(0, length, _WINDOW):
                size = min(_WINDOW, length - offset)
                yield start + offset, size, offset + size == length

    def _expect_pieces(self, pieces: Sequence[tuple[int, int, bool]]) -> None:
        self.expect((vaddr, length) for vaddr, length, _ in pieces)

    def _range(self, place: Place) -> Range:
        return self._images.path(place.file), place.offset, place.length


def _parents(images: Images, name: str) -> Iterator[Pagemap]:
    """The pagemaps of the parent checkpoints, through the `parent` links."""
    for level in range(1, images.limits.pre_dumps + 1):
        inherited = "parent/" * level + name
        data = read_whole(images.files, images.path(inherited), images.limits.criu_image_bytes)
        if data is None:
            return
        yield parse_pagemap(data, inherited, images.limits)


@dataclass(frozen=True, slots=True)
class Match:
    """`data` is what matched, `before` and `after` the bytes around it, as many as were asked for and are there."""

    pid: int
    vaddr: int
    data: bytes
    before: bytes = b""
    after: bytes = b""

    def to_json(self) -> dict[str, Any]:
        text = (self.before + self.data + self.after).decode("ascii", "replace").replace("\ufffd", ".")
        printable = "".join(letter if letter.isprintable() else "." for letter in text)
        return {
            "pid": self.pid,
            "address": f"{self.vaddr:#018x}",
            "length": len(self.data),
            "hex": self.data.hex(),
            "text": printable,
        }


def text_pattern(text: str) -> re.Pattern[bytes]:
    """Search for a string: the bytes that it has on the command line."""
    if not text:
        raise UsageError("nothing to search for")
    return re.compile(re.escape(os.fsencode(text)))


def regex_pattern(expression: str) -> re.Pattern[bytes]:
    """Search for a regular expression over bytes. UsageError where it is none, or matches nothing at all."""
    try:
        pattern = re.compile(os.fsencode(expression))
    except re.error as error:
        raise UsageError(f"{expression!r} is not a regular expression: {error}") from None
    if pattern.match(b""):
        raise UsageError(f"{expression!r} matches the empty string", hint="it would match everywhere")
    return pattern


def hex_pattern(digits: str) -> re.Pattern[bytes]:
    """Search for bytes given in hexadecimal, spaces allowed."""
    try:
        data = bytes.fromhex(digits)
    except ValueError:
        raise UsageError(f"{digits!r} is not hexadecimal", hint="write pairs of digits: 'de ad be ef'") from None
    if not data:
        raise UsageError("nothing to search for")
    return re.compile(re.escape(data))


def search(memory: ProcessMemory, pattern: re.Pattern[bytes], context: int = 0) -> Iterator[Match]:
    """Every match in the dumped memory, ascending, with up to `context` bytes on either side. Reads as it goes.

    Matches do not overlap, and none lies across a gap between two areas.
    """
    floor = 0
    for vaddr, data, last in memory.windows(_LONGEST + context):
        # a match that begins in the last _LONGEST bytes may go on: the next window begins before it
        stop = vaddr + len(data) - (0 if last else _LONGEST)
        for found in pattern.finditer(data, max(floor - vaddr, 0)):
            start, end = found.span()
            if vaddr + start >= stop:
                break
            floor = vaddr + end
            if end > start:
                before, after = data[max(start - context, 0) : start], data[end : end + context]
                yield Match(memory.pid, vaddr + start, data[start:end], before, after)
        floor = max(floor, stop)
