"""`push --parent`: a whole checkpoint as an increment of the one before, in the form that criu itself writes.

    checkpoint/pagemap-7.img, pages-3.img         what changed; all else is PARENT in the pagemap
    checkpoint/parent/pagemap-7.img               the earlier pagemap, as it was
    checkpoint/parent/pages-1.img -> ../pages-1.img
    checkpoint/pages-1.img                        from the earlier image's layer, which is used again
    checkpoint/whole/pagemap-7.img                as it was dumped: for who joins them again (criu/increments.py)

`parent` is a directory inside checkpoint/, because engines copy that and nothing else (podman, CRI-O), and its pages
files are links, because a layer puts its files where it did before (criu opens both through links: criu/image.c). New
pages files have numbers that no earlier one has. Decides and describes; nothing is published here.
"""

import stat
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from typing import NamedTuple

from ckptfs.criu.images import parse_name
from ckptfs.criu.increments import encode_pagemap, left_to_parent, renumbered, stretches
from ckptfs.criu.mm import AIO_RING, MAP_HUGETLB, PLUGIN, parse_mm
from ckptfs.criu.pagemap import PARENT, Pagemap, parse_pagemap
from ckptfs.errors import FormatError
from ckptfs.layers.zstd_chunked_writer import Payload, read_exactly
from ckptfs.model.index import IndexedLayer
from ckptfs.model.oci import Descriptor, Digest
from ckptfs.model.toc import Inode
from ckptfs.push.checkpoint_files import Checkpoint, CheckpointFile
from ckptfs.push.compare import Comparison
from ckptfs.push.pages import PagesFile
from ckptfs.push.parent import ParentImage
from ckptfs.push.spool import PiecesPayload
from ckptfs.settings import Limits, MiB

_WORTH = 2  # one page in so many of those that come along has to be alive, or the memory is stored whole
_MOST_LAYERS = 100  # overlay takes 128; some are left for the new ones


class ReusedLayer(NamedTuple):
    """A layer of the parent's, as it is there, and what the index says of it."""

    descriptor: Descriptor
    diff_id: Digest
    indexed: IndexedLayer


@dataclass(frozen=True, slots=True)
class Increment:
    """What is pushed in place of a checkpoint.

    layers    of the parent, used again, in its order; none when nothing is shared.
    shared    bytes of memory that those have; `changed`: those that are stored anew.
    reason    why nothing is shared.
    """

    checkpoint: Checkpoint
    parent: ParentImage
    layers: Sequence[ReusedLayer] = ()
    shared: int = 0
    changed: int = 0
    reason: str = ""

    @property
    def digest(self) -> Digest:
        return self.parent.manifest.digest


class _Memory(NamedTuple):
    """A pages file that leaves `shared` pages to the chain of earlier pagemaps: their bytes, nearest first."""

    pages: PagesFile
    pagemap: Pagemap
    page_size: int
    shared: bytearray
    chain: Sequence[bytes]


def make_increment(
    checkpoint: Checkpoint,
    pages: Mapping[bytes, PagesFile],
    parent: ParentImage,
    limits: Limits,
    compared: Callable[[int], None],
) -> Increment:
    """`pages`: the checkpoint's own, as `find_pages` has them. `compared` is told of bytes of them."""
    if reason := _unfit(checkpoint, pages, parent, limits):
        return Increment(checkpoint, parent, reason=reason)
    one = partial(_compared, checkpoint, parent, limits, compared)
    found = [memory for described in pages.values() if (memory := one(described))]
    if not found:
        return Increment(checkpoint, parent, reason="the processes have no memory in common with it, or too little")
    return _Builder(checkpoint, pages, parent, found, limits).build()


def _unfit(checkpoint: Checkpoint, pages: Container[bytes], parent: ParentImage, limits: Limits) -> str:
    if not parent.layers:
        return "it has no index, so ckptfs did not push it, or the index did not fit"
    if any(file.link in pages for file in checkpoint.files):
        return "the checkpoint has hard links to its pages files"
    if odd := [file.path for file in checkpoint.files if _is_pages(file) and file.path not in pages]:
        return f"{odd[0].decode('utf-8', 'replace')} has no pagemap, or several"
    known = {file.path for file in checkpoint.files}
    tops = [file.directory for file in checkpoint.files if file.name == b"inventory.img"]
    for top in tops:
        if top + b"/parent" in known or top + b"/whole" in known:
            return "the checkpoint is an increment already"
        depth = parent.depth(top)
        if depth >= limits.increments:
            return f"it stands on {depth - 1} others already, and {limits.increments} in a row are the most"
    if not any(parent.depth(top) for top in tops):
        return "it holds no checkpoint in the same place"
    return ""


def _compared(
    checkpoint: Checkpoint, parent: ParentImage, limits: Limits, progress: Callable[[int], None], described: PagesFile
) -> _Memory | None:
    """None where the memory is to be stored whole: it is not in the parent, or too little of it is."""
    name, directory = described.pagemap.name.decode("utf-8", "replace"), described.file.directory
    chain = _chain(parent, directory, described.pagemap.name)
    size = described.file.inode.size
    if not chain or not size:
        return None
    pagemap = parse_pagemap(described.pagemap.read(limits.criu_image_bytes), name, limits)
    if any(run.flags & PARENT for run in pagemap.runs):  # what it leaves to a parent is not in the one that is named
        return None
    try:
        levels = [parse_pagemap(raw, name, limits) for raw in chain]
    except FormatError:
        return None
    sizes: dict[str, int] = {}
    for level in levels:
        path = directory + b"/" + level.file.encode()
        file = parent.find(path)
        if parent.layer_of(path) is None or file is None or file.entry.inode is None:
            return None
        sizes[level.file] = file.entry.inode.size
    try:
        page_size = pagemap.page_size(size)
        if page_size is None:
            return None
        comparison = Comparison(parent, directory, levels, sizes, page_size)
        marks = comparison.shared(pagemap, described.file, progress)
    except FormatError:  # of another page size, or compressed by CRIU: stored as it is
        return None
    for start, end in _never_shared(checkpoint, directory, name, limits):
        _clear(marks, pagemap, page_size, start, end)
    if not any(marks) or sum(marks) * page_size * _WORTH < sum(sizes.values()):
        return None
    return _Memory(described, pagemap, page_size, marks, chain)


def _chain(parent: ParentImage, directory: bytes, name: bytes) -> list[bytes]:
    """The pagemaps called `name` in the parent, in its own parent, and so on."""
    found = []
    while (raw := parent.read(directory + b"/" + name)) is not None:
        found.append(raw)
        directory += b"/parent"
    return found


def _never_shared(checkpoint: Checkpoint, directory: bytes, name: str, limits: Limits) -> Iterator[tuple[int, int]]:
    """Mappings that criu fills from the checkpoint's own pages file only (criu/mem.c, "not premapped")."""
    kind = parse_name(name)
    mm = checkpoint.find(directory + b"/mm-%d.img" % (kind.number or 0)) if kind and kind.kind == "pagemap" else None
    if mm is None:
        return
    for vma in parse_mm(mm.read(limits.criu_image_bytes), mm.name.decode("utf-8", "replace"), limits).vmas:
        if vma.flags & MAP_HUGETLB or vma.status & (AIO_RING | PLUGIN):
            yield vma.start, vma.end


def _clear(marks: bytearray, pagemap: Pagemap, page_size: int, start: int, end: int) -> None:
    for run in pagemap.placed(page_size):
        low, high = max(run.vaddr, start), min(run.vaddr + run.length, end)
        if low < high:
            first = (run.offset + low - run.vaddr) // page_size
            marks[first : first + (high - low) // page_size] = bytes((high - low) // page_size)


class _Builder:
    def __init__(
        self,
        checkpoint: Checkpoint,
        pages: Mapping[bytes, PagesFile],
        parent: ParentImage,
        found: Sequence[_Memory],
        limits: Limits,
    ) -> None:
        self._checkpoint = checkpoint
        self._pages = pages
        self._parent = parent
        self._found = {memory.pages.file.path: memory for memory in found}
        self._limits = limits
        self._files = {file.path: file for file in checkpoint.files}
        self._layers: set[int] = set()
        self._next: dict[bytes, int] = {}

    def build(self) -> Increment:
        shared = changed = 0
        for path in self._pages:
            del self._files[path]  # all of them before the first new name, which may be one of these
        for path, described in self._pages.items():
            memory = self._found.get(path)
            self._renumber(described, memory)
            if memory is not None:
                count = sum(memory.shared)
                shared += count * memory.page_size
                self._bring(memory)
            changed += described.file.inode.size
        if len(self._layers) > _MOST_LAYERS:
            reason = f"{len(self._layers)} of its layers would have to be used again"
            return Increment(self._checkpoint, self._parent, reason=reason)
        files = [self._files[path] for path in sorted(self._files)]
        checkpoint = replace(self._checkpoint, files=files)
        diff_ids, image = self._parent.diff_ids(), self._parent.manifest
        layers = [ReusedLayer(image.layers[n], diff_ids[n], self._parent.layers[n]) for n in sorted(self._layers)]
        return Increment(checkpoint, self._parent, layers, shared, changed - shared)

    def _renumber(self, described: PagesFile, memory: _Memory | None) -> None:
        """Store a pages file under a number that the parent does not use; without the pages that it has."""
        file, pagemap = described.file, described.pagemap
        number = self._number(file.directory) + int(file.name[len(b"pages-") : -len(b".img")])
        raw = pagemap.read(self._limits.criu_image_bytes)
        whole = file.directory + b"/whole"
        directory = self._files.get(file.directory)
        self._directory(whole, directory.inode if directory is not None else None, pagemap.inode)
        self._add(whole + b"/" + pagemap.name, pagemap.inode, raw)
        if memory is None:
            self._add(pagemap.path, pagemap.inode, renumbered(raw, pagemap.name.decode(), number))
            new = replace(file, path=_sibling(file, number))
        else:
            runs = left_to_parent(memory.pagemap, memory.shared, memory.page_size)
            self._add(pagemap.path, pagemap.inode, encode_pagemap(raw, pagemap.name.decode(), number, runs))
            size = memory.shared.count(0) * memory.page_size
            inode = replace(file.inode, size=size, extents=())
            new = CheckpointFile(_sibling(file, number), inode, None, partial(_changed, memory))
        self._files[new.path] = new

    def _number(self, directory: bytes) -> int:
        """The highest number of the parent's pages files in a directory."""
        if directory not in self._next:
            names = (parse_name(name.decode("utf-8", "replace")) for name in self._parent.names(directory))
            numbers = [name.number or 0 for name in names if name is not None and name.kind == "pages"]
            self._next[directory] = max(numbers, default=0)
        return self._next[directory]

    def _bring(self, memory: _Memory) -> None:
        """The earlier pagemaps of this memory, each beside links to its pages."""
        top, name = memory.pages.file.directory, memory.pages.pagemap.name
        old, new = top, top + b"/parent"
        for depth, raw in enumerate(memory.chain, start=1):
            directory, described = self._parent.find(old), self._parent.find(old + b"/" + name)
            if described is None or described.entry.inode is None:
                raise FormatError(f"the parent has no {name.decode()}")
            self._directory(new, directory.entry.inode if directory is not None else None, described.entry.inode)
            number = parse_pagemap(raw, name.decode(), self._limits).pages_id
            pages = b"pages-%d.img" % number
            self._copy(old + b"/" + name, new + b"/" + name)
            self._copy(old + b"/inventory.img", new + b"/inventory.img")
            layer, file = self._parent.layer_of(top + b"/" + pages), self._parent.find(top + b"/" + pages)
            if layer is None or file is None or file.entry.inode is None:
                raise FormatError(f"the parent has no {pages.decode()}")
            self._layers.add(layer)
            target, inode = b"../" * depth + pages, file.entry.inode
            link = Inode(stat.S_IFLNK | 0o777, inode.uid, inode.gid, len(target), inode.mtime_ns, target=target)
            self._files[new + b"/" + pages] = CheckpointFile(new + b"/" + pages, link)
            old, new = old + b"/parent", new + b"/parent"

    def _directory(self, path: bytes, like: Inode | None, file: Inode) -> None:
        """A directory as `like`; archives that list no directories have none, then one as private as CRIU's."""
        if like is None:
            like = Inode(stat.S_IFDIR | 0o700, file.uid, file.gid, mtime_ns=file.mtime_ns)
        self._files.setdefault(path, CheckpointFile(path, replace(like, size=0, ino=0)))

    def _copy(self, old: bytes, new: bytes) -> None:
        found, data = self._parent.find(old), self._parent.read(old)
        if found is not None and found.entry.inode is not None and data is not None:
            self._add(new, found.entry.inode, data)

    def _add(self, path: bytes, like: Inode, data: bytes) -> None:
        inode = replace(like, size=len(data), extents=())
        self._files[path] = CheckpointFile(path, inode, None, partial(BytesIO, data))


def _sibling(file: CheckpointFile, number: int) -> bytes:
    name = b"pages-%d.img" % number
    return file.directory + b"/" + name if file.directory else name


def _is_pages(file: CheckpointFile) -> bool:
    name = parse_name(file.name.decode("utf-8", "replace"))
    return file.is_regular and name is not None and name.kind == "pages"


def _changed(memory: _Memory) -> Payload:
    """The pages that the parent has not, front to back."""
    return PiecesPayload(_unshared(memory))


def _unshared(memory: _Memory) -> Iterator[bytes]:
    if memory.pages.file.open is None:
        return
    source = memory.pages.file.open()
    buffer = bytearray(MiB)
    try:
        for count, is_shared in stretches(memory.shared):
            left = count * memory.page_size
            while left:
                step = min(left, MiB)
                read_exactly(source, memoryview(buffer)[:step], memory.pages.file.path)
                if not is_shared:
                    yield bytes(buffer[:step])
                left -= step
    finally:
        source.close()
