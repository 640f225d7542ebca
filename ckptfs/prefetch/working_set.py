"""From what a mount has recorded of a restore to a profile: the working set, without CRIU's transfer of all the rest.

`criu lazy-pages` reads every page in the end, ascending, in pieces that grow from 64 KiB; what processes waited for are
the single pages between them. A plain restore reads pages files from front to back. Neither says what is needed first,
and running ahead is the engine's own business: of pages files only what is out of sequence counts. Of all other files
every read counts. Bytes in, values out; called by `ckptfs profile`.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator

from ckptfs.engine.reader import Handle
from ckptfs.errors import FormatError
from ckptfs.model.profile import LATEST, Profile, Run, joined
from ckptfs.model.toc import Inode
from ckptfs.settings import KiB, Limits

PAGES = re.compile(rb"pages-[^/]*\.img\Z")
_PIECE = 64 * KiB  # the smallest that the lazy-pages daemon transfers unasked (criu/uffd.c DEFAULT_XFER_LEN)


def profile_of(lines: Iterable[str], limits: Limits) -> Profile:
    """The profile of one restore out of what `mount --record` has written. FormatError for lines that are not that."""
    return Profile(joined(_wanted(_reads(lines)), limits))


def _reads(lines: Iterable[str]) -> Iterator[Run]:
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            path, at = os.fsencode(value["path"]), int(value["t_ms"])
            run = Run(path, int(value["offset"]), int(value["length"]), min(max(0, at), LATEST))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise FormatError(f"line {number} is no recorded read", hint="use `mount --record`") from None
        if run.offset < 0 or run.length < 0:
            raise FormatError(f"line {number} is a read of no place in a file")
        if run.path and run.length:
            yield run


def _wanted(reads: Iterable[Run]) -> Iterator[Run]:
    positions: dict[bytes, Handle] = {}
    for run in reads:
        if PAGES.search(run.path):
            handle = positions.setdefault(run.path, Handle(Inode(0)))
            sequential = handle.observe(run.offset, run.length)
            if sequential or (run.length >= _PIECE and handle.expected == run.offset + run.length):
                continue
        yield run
