"""An increment that `ckptfs push --parent` made, shown as the whole checkpoint that it stands for.

criu reads an increment's pages at once, lazy pages or not (criu/increments.py), and from several files. In the view
checkpoint/ therefore has the pagemaps as they were dumped, and pages files whose bytes are windows into the chunks of
all the layers: nothing is copied, and a restore is what it is from any other image. `--view raw` shows the layers.
"""

import logging
import posixpath
import stat
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import takewhile

import trio

from ckptfs.criu.images import parse_name
from ckptfs.criu.increments import Joined
from ckptfs.criu.pagemap import Pagemap, parse_pagemap
from ckptfs.engine.threads import in_thread
from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.image.opened import OpenImage
from ckptfs.image.views import containers
from ckptfs.model.node import Node
from ckptfs.model.toc import Entry, Inode
from ckptfs.model.tree import WHITEOUT
from ckptfs.model.windows import WindowExtents
from ckptfs.settings import Limits

log = logging.getLogger(__name__)

_FEW = 10_000  # windows that are made at once, in 20 ms; more when the file is opened


async def join(image: OpenImage) -> None:
    """Before anybody has looked at the tree. What cannot be joined stays as it is, for criu to judge."""
    await image.listing(image.tree.root)  # all names are known
    for container in containers(image.tree):
        directory = container.children.get(b"checkpoint")
        whole = directory.children.get(b"whole") if directory is not None else None
        if directory is None or whole is None or whole.inode is None or not whole.inode.is_dir:
            continue
        try:
            await _join(image, directory)
        except FormatError as error:
            log.warning("the increments in %s are not joined: %s", directory.path.decode("utf-8", "replace"), error)


async def _join(image: OpenImage, directory: Node) -> None:
    levels = _levels(directory, image.options.settings.limits.increments)
    originals, *raw = await _pagemaps(image, [directory.children[b"whole"], *levels])
    limits = image.options.settings.limits
    entries: list[Entry] = []
    for name, data in originals.items():
        chain = await in_thread(partial(_parsed, raw, name, limits))
        files = [_pages_file(image, node, pagemap) for node, pagemap in zip(levels, chain, strict=False)]
        found = [inode for inode in files if inode is not None]
        if not chain or len(found) != len(chain):
            raise FormatError(f"{name.decode()} lacks the pages of an increment")
        whole, pages = parse_pagemap(data, name.decode(), limits), found[0]
        if chain[0].runs != whole.runs:  # some of its pages are the parent's
            sizes = {level.file: inode.size for level, inode in zip(chain, found, strict=True)}
            memory = await in_thread(partial(Joined, chain, sizes))
            await in_thread(memory.check, whole)
            pages = replace(pages, size=memory.size, extents=(), ino=0, nlink=1)
            image.tables.derive(pages, found, partial(_windows, memory, found), quick=len(memory) < _FEW)
        entries.append(Entry(directory.path + b"/" + name, directory.children[b"whole"].children[name].inode))
        entries.append(Entry(directory.path + b"/" + whole.file.encode(), pages))
    rank = image.next_rank
    image.tree.add([Entry(path, Inode(stat.S_IFREG)) for path in _obsolete(directory)], rank)
    image.tree.add(entries, rank)


def _levels(directory: Node, most: int) -> list[Node]:
    """The checkpoint's directory and those of its parents, nearest first."""
    levels = [directory]
    while (parent := levels[-1].children.get(b"parent")) is not None and parent.inode is not None:
        if not parent.inode.is_dir:
            break
        if len(levels) == most:
            raise LimitExceeded(f"the checkpoint stands on more than {most - 1} others")
        levels.append(parent)
    return levels


async def _pagemaps(image: OpenImage, levels: list[Node]) -> list[dict[bytes, bytes]]:
    """The pagemaps of each level by name. Mostly they came with the index; those that did not, all at once."""
    limit = image.options.settings.limits.increment_bytes
    raw: list[dict[bytes, bytes]] = [{} for _ in levels]
    wanted: list[tuple[dict[bytes, bytes], Node, Inode]] = []
    for level, found in zip(levels, raw, strict=True):
        for node in level.visible_children():
            kind = parse_name(node.name.decode("utf-8", "replace"))
            if kind is None or kind.kind not in ("pagemap", "pagemap-shmem") or node.inode is None:
                continue
            wanted.append((found, node, node.inode))
    total = sum(inode.size for _, _, inode in wanted)
    if total > limit:
        raise LimitExceeded(f"the pagemaps have {total} bytes, more than {limit}")

    async def read(into: dict[bytes, bytes], node: Node, inode: Inode) -> None:
        into[node.name] = await image.read(inode, 0, inode.size)

    async with trio.open_nursery() as nursery:
        for one in wanted:
            nursery.start_soon(read, *one)
    return raw


def _parsed(raw: list[dict[bytes, bytes]], name: bytes, limits: Limits) -> list[Pagemap]:
    """The pagemap called `name` of the checkpoint, of its parent, and so on."""
    levels = takewhile(lambda level: name in level, raw)
    return [parse_pagemap(level[name], name.decode(), limits) for level in levels]


def _pages_file(image: OpenImage, directory: Node, pagemap: Pagemap) -> Inode | None:
    """The pages file that a pagemap in `directory` names, through the link that is there in a parent."""
    node = directory.children.get(pagemap.file.encode())
    if node is not None and node.inode is not None and node.inode.target:
        node = image.tree.find(posixpath.normpath(posixpath.join(directory.path, node.inode.target)))
    return node.inode if node is not None and node.inode is not None and node.inode.is_file else None


def _windows(memory: Joined, files: list[Inode]) -> WindowExtents:
    return WindowExtents([file.extents for file in files], memory.places())


def _obsolete(directory: Node) -> Iterator[bytes]:
    """Whiteouts for all that increments are made of."""
    yield directory.path + b"/" + WHITEOUT + b"parent"
    yield directory.path + b"/" + WHITEOUT + b"whole"
    for node in list(directory.visible_children()):
        kind = parse_name(node.name.decode("utf-8", "replace"))
        if kind is not None and kind.kind == "pages":
            yield directory.path + b"/" + WHITEOUT + node.name
