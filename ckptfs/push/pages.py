"""What the pagemaps say about pages files: where to cut them, and which parts no lazy restore can do without.

Pairs pagemap-*.img with the pages-N.img that they name. Holds one pagemap at a time: a process with a million separate
runs has a pagemap that takes 100 MB in memory.
"""

import posixpath
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptfs.criu.chunking import page_cuts
from ckptfs.criu.images import parse_name
from ckptfs.criu.pagemap import DEFAULT_PAGE_SIZE, PARENT, Pagemap, PlacedRun, parse_pagemap
from ckptfs.errors import FormatError
from ckptfs.push.checkpoint_files import CheckpointFile
from ckptfs.settings import Limits

_MAX_EAGER = 4096  # ranges that the index lists; more say that prefetching by range is no use


@dataclass(frozen=True, slots=True)
class PagesFile:
    """A pages file and the pagemap that describes it.

    `scattered`: it has what changed since the parent, single pages from anywhere. Cut by address those would make
    thousands of frames of a page or two, which compress badly and which no other checkpoint has: it is cut as any file.
    """

    file: CheckpointFile
    pagemap: CheckpointFile
    limits: Limits
    scattered: bool = False

    def cuts(self) -> Iterator[tuple[int, ...]]:
        """Chunks as the lengths of their cells; none where the pagemap does not fit: the file is cut as any other."""
        size = self.file.inode.size
        placed = self._placed() if not self.scattered else None
        return page_cuts(((run.vaddr, run.length) for run in placed), size) if placed is not None else iter(())

    def eager(self) -> list[tuple[int, int]] | None:
        """(start, length) of the pages that are not lazy, in file order; None when that cannot be told or is no use."""
        placed = self._placed()
        if placed is None:
            return None
        ranges: list[tuple[int, int]] = []
        for run in placed:
            if run.lazy:
                continue
            if ranges and sum(ranges[-1]) == run.offset:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + run.length)
            elif len(ranges) == _MAX_EAGER:
                return None
            else:
                ranges.append((run.offset, run.length))
        return ranges

    def _placed(self) -> Iterable[PlacedRun] | None:
        try:
            pagemap = _parse(self.pagemap, self.limits)
            return pagemap.placed(pagemap.page_size(self.file.inode.size) or DEFAULT_PAGE_SIZE)
        except FormatError:  # compressed by CRIU itself, or cut short: stored as it is
            return None


def find_pages(files: Iterable[CheckpointFile], limits: Limits) -> Mapping[bytes, PagesFile]:
    """Pages files by path. One that several pagemaps name, or none, is not among them."""
    every, directories = {}, set()
    for file in files:
        if file.is_regular:
            every[file.path] = file
        elif file.inode.is_dir:
            directories.add(file.path)
    found: dict[bytes, PagesFile] = {}
    twice: set[bytes] = set()
    for file in every.values():
        name = parse_name(file.name.decode("utf-8", "replace"))
        if name is None or name.kind not in ("pagemap", "pagemap-shmem"):
            continue
        try:
            pages_id = _parse(file, limits).pages_id
        except FormatError:
            continue
        path = (file.directory + b"/" if file.directory else b"") + b"pages-%d.img" % pages_id
        if path in found:
            twice.add(path)
        elif path in every:
            found[path] = PagesFile(every[path], file, limits, file.directory + b"/parent" in directories)
    return {path: pages for path, pages in found.items() if path not in twice}


def require_parents(files: Sequence[CheckpointFile], limits: Limits) -> None:
    """FormatError where pages were left to a checkpoint before that is not among the files: nobody could restore them.

    podman exports each checkpoint of a chain by itself, and criu's are directories beside one another.
    """
    known = {file.directory for file in files} | {file.path for file in files if file.inode.is_dir}
    lost = {}
    for file in files:
        if file.name == b"parent" and stat.S_ISLNK(file.inode.mode):
            target = file.inode.target
            if posixpath.normpath(posixpath.join(file.directory, target)) not in known:
                lost[file.directory] = target.decode("utf-8", "replace")
    for file in files:
        if file.directory not in lost or not file.is_regular or not file.name.startswith(b"pagemap-"):
            continue
        if any(run.flags & PARENT for run in _parse(file, limits).runs):
            what = f"memory is in the checkpoint before, {lost[file.directory]!r}, which the source has not"
            raise FormatError(what, hint="push the directory that has both, side by side (docs/pushing.md)")


def _parse(file: CheckpointFile, limits: Limits) -> Pagemap:
    return parse_pagemap(file.read(limits.criu_image_bytes), file.name.decode("utf-8", "replace"), limits)
