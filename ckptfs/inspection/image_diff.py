"""Two open images compared: what `ckptfs diff` tells.

Files whose chunks tell whether they are equal are not read, nor is the file system delta looked into where its tar is
the same in both; the rest is read from both images in step, until it is known. Called by the command line.
"""

import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence

import trio

from ckptfs.criu.memory import Place
from ckptfs.errors import FormatError, NotFoundError
from ckptfs.image import OpenImage
from ckptfs.inspection.cells import take_apart
from ckptfs.inspection.diff import (
    ContainerChange,
    Difference,
    FileChange,
    FileFacts,
    MemoryChange,
    diff_files,
    diff_memory,
    diff_processes,
    fetch_bytes,
)
from ckptfs.inspection.equality import unknown_parts
from ckptfs.inspection.image_files import ImageFiles, in_thread
from ckptfs.inspection.overview import Overview, containers, inspect, open_images
from ckptfs.inspection.parts import Part
from ckptfs.inspection.source import Range, announced
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.toc import Chunk, Inode
from ckptfs.settings import MiB

log = logging.getLogger(__name__)

_PIECE = 1 * MiB  # of a file that is compared at once


async def diff_images(before: OpenImage, after: OpenImage, *, memory: bool = True) -> Difference:
    """What changed from one image to the other. Without `memory` no page of a process is fetched for comparison."""
    old, new = _Look(), _Look()
    async with trio.open_nursery() as nursery:  # both at the same time: half the round trips
        nursery.start_soon(in_thread, before, old.take)
        nursery.start_soon(in_thread, after, new.take)
    return await trio.to_thread.run_sync(_compare, old, new, memory, abandon_on_cancel=True)


class _Look:
    """One image after the first look: its files in their smallest pieces, and its containers by name."""

    files: ImageFiles
    containers: dict[str, Overview]

    def take(self, files: ImageFiles) -> None:
        self.files = files
        limits = files.image.options.settings.limits
        self.containers = {
            prefix.rstrip("/"): inspect(files, prefix, limits, parts=Part.OF_PROCESSES) for prefix in containers(files)
        }
        take_apart(files)


def _compare(old: _Look, new: _Look, memory: bool) -> Difference:
    changes = []
    for name in sorted(old.containers.keys() | new.containers.keys()):
        a, b = old.containers.get(name), new.containers.get(name)
        processes = diff_processes(a.processes if a else (), b.processes if b else ())
        pages: tuple[MemoryChange, ...] = ()
        if memory and a and b:
            pages = tuple(_memory(old.files, new.files, name and f"{name}/", a, b))
        changes.append(ContainerChange(name, processes, pages))
    files = diff_trees(old.files, new.files)
    return Difference(tuple(changes), files, second_pull(old.files.image, new.files.image))


def _memory(before: ImageFiles, after: ImageFiles, prefix: str, old: Overview, new: Overview) -> Iterator[MemoryChange]:
    """Of every process that both have."""
    limits = before.image.options.settings.limits
    a, b = open_images(before, prefix, limits), open_images(after, prefix, limits)
    comparable = _comparable(before, after)

    def unknown(first: Place, second: Place) -> Iterable[tuple[int, int]]:
        one, other = before.inode(a.path(first.file)), after.inode(b.path(second.file))
        if one is None or other is None:
            return [(0, first.length)]
        parts = unknown_parts(one, first.offset, other, second.offset, first.length, comparable)
        return [(0, first.length)] if parts is None else parts

    pids = {process.pid for process in old.processes if process.memory}
    for pid in (process.pid for process in new.processes if process.memory and process.pid in pids):
        try:
            yield diff_memory(a, b, pid, unknown)
        except (FormatError, NotFoundError) as error:
            log.warning("the memory of process %d is not compared: %s", pid, error)


def diff_trees(before: ImageFiles, after: ImageFiles) -> tuple[FileChange, ...]:
    """Every file of the images, and of the tars in them that are not the same in both."""
    tars, other_tars = before.tars(), after.tars()
    comparable = _comparable(before, after)

    def enter(path: str) -> bool:
        a, b = tars.get(f"{path}.tar"), other_tars.get(f"{path}.tar")
        return a is None or b is None or a.size != b.size or unknown_parts(a, 0, b, 0, a.size, comparable) != []

    old, new = dict(before.walk(enter)), dict(after.walk(enter))
    different: set[str] = set()
    undecided: dict[str, list[tuple[int, int]]] = {}
    for path in old.keys() & new.keys():
        a, b = old[path], new[path]
        if a.is_file and b.is_file and a.size == b.size:
            parts = unknown_parts(a, 0, b, 0, a.size, comparable)
            if parts is None:
                different.add(path)
            elif parts:
                undecided[path] = parts
    _read_and_compare(before, after, undecided, different)
    return diff_files(
        {path: _facts(inode) for path, inode in old.items()},
        {path: _facts(inode, path in different) for path, inode in new.items()},
    )


def _comparable(before: ImageFiles, after: ImageFiles) -> Callable[[Chunk, Chunk], bool]:
    """Whether the digest of a chunk of one image says something about that of the other."""
    old, new = before.image.chunk_digests, after.image.chunk_digests
    return lambda a, b: old.get(a.layer, ChunkDigest.SHA256) is new.get(b.layer, ChunkDigest.SHA256)


def _read_and_compare(
    before: ImageFiles, after: ImageFiles, undecided: dict[str, list[tuple[int, int]]], different: set[str]
) -> None:
    """Add to `different` what is. First the beginning of every file, together; then what is still equal, to its end."""

    def expect(ranges: Sequence[Range]) -> None:
        before.expect(ranges)
        after.expect(ranges)

    def pieces(first: bool) -> Iterator[Range]:
        for path in sorted(undecided):
            for number, piece in enumerate(_cut(path, undecided[path])):
                if path in different or (first and number):
                    break
                if first or number:
                    yield piece

    for first in (True, False):
        for path, offset, length in announced(pieces(first), lambda piece: piece[2], expect):
            if path not in different and before.read(path, offset, length) != after.read(path, offset, length):
                different.add(path)


def _cut(path: str, parts: Iterable[tuple[int, int]]) -> Iterator[Range]:
    for start, length in parts:
        for offset in range(start, start + length, _PIECE):
            yield path, offset, min(_PIECE, start + length - offset)


def _facts(inode: Inode, other_content: bool = False) -> FileFacts:
    target = os.fsdecode(inode.target)
    if inode.rdev:
        target = f"{os.major(inode.rdev)}:{os.minor(inode.rdev)}"
    size = 0 if inode.is_dir else inode.size
    mode = stat.S_IMODE(inode.mode)
    return FileFacts(inode.type_name, mode, inode.uid, inode.gid, size, other_content, target, inode.xattrs)


def second_pull(before: OpenImage, after: OpenImage) -> int:
    """Compressed bytes that fetching `after` takes on a node that has all of `before`.

    Layers without random access come whole or not at all; of the others, only chunks that `before` has not.
    """
    have = {descriptor.digest for descriptor in before.resolved.manifest.layers}
    sequential = {descriptor.digest for descriptor, layer in after.layers.values() if layer.sequential}
    whole = {d.digest: d.size for d in after.resolved.manifest.layers if d.digest in sequential - have}
    return sum(whole.values()) + fetch_bytes(_chunks(before), _chunks(after))


def _chunks(image: OpenImage) -> list[Chunk]:
    """Those that can be fetched one by one."""
    single = {number for number, (_, layer) in image.layers.items() if not layer.sequential}
    return [chunk for chunk in image.chunks().values() if chunk.layer in single]
