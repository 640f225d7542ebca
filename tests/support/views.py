"""What a view shows, as a golden listing, without a mount: every name, every attribute and every byte."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.image import ImageOptions, OpenImage, View, open_image
from ckptfs.model.oci import Reference
from ckptfs.model.toc import Entry, Inode
from ckptfs.settings import Settings
from ckptfs.sources import Source, open_source
from ckptfs.telemetry import NetworkCounters
from tests.support import golden

Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Shown:
    """`listing` with whole seconds, as golden files have them; hard links are in its entries' nlink and apart."""

    listing: golden.Listing
    layout: str
    verification: str
    errors: list[str]

    @property
    def entries(self) -> Entries:
        return dict(self.listing["entries"])

    def under(self, directory: str) -> Entries:
        return under(self.entries, directory)


def show(
    reference: object, cache: Path, view: View = "checkpoint", *, base: str = "", exact: bool = False, **options: Any
) -> Shown:
    """Open the image, look at everything, read everything."""
    counters, settings = NetworkCounters(), Settings()

    def reach(wanted: Reference) -> Source:
        return open_source(wanted, settings=settings, counters=counters, plain_http=True)

    async def run() -> Shown:
        with ChunkCache.open(cache) as chunks:
            wanted = ImageOptions(
                view=view, base=Reference.parse(base) if base else None, prefetch=False, background=False, **options
            )
            async with open_image(reach(Reference.parse(str(reference))), chunks, wanted, counters, reach) as image:
                names = await _names(image)
                contents = {id(inode): await image.read(inode, 0, inode.size) for _, inode in names if inode.is_file}
                listing = golden.listing(
                    [Entry(path, inode) for path, inode in names], lambda inode: contents[id(inode)], exact=exact
                )
                return Shown(listing, str(image.layout), image.verification, image.errors)

    return trio.run(run)


async def _names(image: OpenImage) -> list[tuple[bytes, Inode]]:
    """As a walk through a mount finds them: attributes when they are asked for, not when everything is over."""
    found: list[tuple[bytes, Inode]] = []
    pending = [image.tree.root]
    while pending:
        directory = pending.pop()
        for child in await image.listing(directory):
            node = await image.lookup(directory, child.name)
            assert node is child and node.inode is not None
            if node.inode.is_dir:
                await image.describe(node)
                await image.mark(node)
                pending.append(node)
            found.append((node.path, node.inode))
    return found


def under(entries: Entries, directory: str) -> Entries:
    """The entries below a directory, by their paths inside it."""
    return {path[len(directory) + 1 :]: entry for path, entry in entries.items() if path.startswith(f"{directory}/")}


def without(entries: Entries, *directories: str) -> Entries:
    """All entries but these directories and what is below them."""
    return {
        path: entry
        for path, entry in entries.items()
        if not any(path == top or path.startswith(f"{top}/") for top in directories)
    }
