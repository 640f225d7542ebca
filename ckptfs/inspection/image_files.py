"""An open image as inspection reads it: blocking calls in a worker thread, names and bytes from the event loop.

Owns the crossing between the two, and the symlinks on the way to a file. Nothing is fetched that is not asked for:
listing waits for tables of contents only, and what `expect` announces goes out in one go, so that a round of reads is a
round trip. Called by the command line, through `in_thread`.
"""

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

import trio

from ckptfs.engine.reader import chunks_of
from ckptfs.engine.schedule import Priority
from ckptfs.errors import CkptfsError, FormatError, NotFoundError
from ckptfs.image import OpenImage
from ckptfs.image.views import inner_tars
from ckptfs.inspection.source import Range
from ckptfs.model.node import Node
from ckptfs.model.toc import Chunk, Inode

T = TypeVar("T")


async def in_thread(image: OpenImage, work: Callable[["ImageFiles"], T]) -> T:
    """`work` in a worker thread, with the files of `image`."""
    return await trio.to_thread.run_sync(work, ImageFiles(image), abandon_on_cancel=True)


class ImageFiles:
    """CheckpointFiles of an open image, see source.py. Only for a thread that trio started."""

    def __init__(self, image: OpenImage) -> None:
        self.image = image
        self._nodes: dict[str, Node | None] = {}

    def list(self, directory: str) -> Sequence[str]:
        return [_name(node) + ("/" if _inode(node).is_dir else "") for node in self._listing(directory)]

    def size(self, path: str) -> int | None:
        inode = self.inode(path)
        return inode.size if inode is not None and inode.is_file else None

    def read(self, path: str, offset: int, length: int) -> bytes:
        inode = self.inode(path)
        if inode is None or not inode.is_file:
            raise NotFoundError(f"{path} is not in the checkpoint")
        if offset + length > inode.size:
            raise FormatError(f"{path} ends before byte {offset + length}")
        return trio.from_thread.run(self.image.read, inode, offset, length)

    def expect(self, ranges: Sequence[Range]) -> None:
        wanted = [(inode, offset, length) for path, offset, length in ranges if (inode := self.inode(path)) is not None]
        trio.from_thread.run(self._request, wanted)

    def inode(self, path: str) -> Inode | None:
        """What is at `path`, symlinks followed; None where there is nothing, or a link leads out of the image."""
        if path not in self._nodes:
            self._nodes[path] = trio.from_thread.run(self._follow, path)
        node = self._nodes[path]
        return node.inode if node is not None else None

    def walk(self, enter: Callable[[str], bool] = lambda path: True) -> Iterator[tuple[str, Inode]]:
        """Everything in the image, by path; symlinks as they are. A directory's content comes if `enter` wants it."""
        pending = [""]
        while pending:
            directory = pending.pop()
            for node in self._listing(directory):
                path = f"{directory}/{_name(node)}" if directory else _name(node)
                yield path, _inode(node)
                if _inode(node).is_dir and enter(path):
                    pending.append(path)

    def tars(self) -> dict[str, Inode]:
        """The tars in the image that are also shown as directories, by path."""
        self._listing("")
        return {os.fsdecode(path): inode for path, inode in inner_tars(self.image.tree, complete=False)}

    def load(self, path: str) -> None:
        """Have the extents of a file complete: those of very large files are fetched when they are first needed."""
        if (inode := self.inode(path)) is not None:
            trio.from_thread.run(self.image.tables.load, inode)

    def _listing(self, directory: str) -> Sequence[Node]:
        found = trio.from_thread.run(self._list, directory)
        for node in found:
            if not stat.S_ISLNK(_inode(node).mode):
                self._nodes[f"{directory}/{_name(node)}" if directory else _name(node)] = node
        return found

    # -- in the event loop ---------------------------------------------------------------------------------------------

    async def _list(self, directory: str) -> Sequence[Node]:
        node = await self._follow(directory)
        return await self.image.listing(node) if node is not None and _inode(node).is_dir else ()

    async def _follow(self, path: str) -> Node | None:
        node, links = self.image.tree.root, 0
        names = deque(os.fsencode(path).split(b"/"))
        while names:
            name = names.popleft()
            if name in (b"", b"."):
                continue
            if name == b"..":
                if node.parent is None:
                    return None
                node = node.parent
                continue
            child = await self.image.lookup(node, name) if _inode(node).is_dir else None
            if child is None:
                return None
            if not stat.S_ISLNK(_inode(child).mode):
                node = child
                continue
            target, links = _inode(child).target, links + 1
            if links > self.image.options.settings.limits.path_links or target.startswith(b"/"):
                return None
            names.extendleft(reversed(target.split(b"/")))
        return node

    async def _request(self, ranges: Sequence[tuple[Inode, int, int]]) -> None:
        """Chunks that are not here go out together; who reads them waits for them, or gets the error."""
        async with trio.open_nursery() as nursery:
            for inode in {inode for inode, _, _ in ranges}:
                nursery.start_soon(self._load, inode)
        missing: dict[bytes, Chunk] = {}
        for inode, offset, length in ranges:
            for chunk in chunks_of(inode, offset, length):
                if chunk.key not in missing and not self.image.fetcher.has(chunk):
                    missing[chunk.key] = chunk
        self.image.fetcher.want(missing.values(), Priority.DEMAND)

    async def _load(self, inode: Inode) -> None:
        with suppress(CkptfsError):
            await self.image.tables.load(inode)


def _name(node: Node) -> str:
    return os.fsdecode(node.name)


def _inode(node: Node) -> Inode:
    """Nodes that an image hands out are visible ones."""
    assert node.inode is not None
    return node.inode
