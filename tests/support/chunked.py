"""Images whose chunks have digests, with chunks of any size, and opened in this process over a registry of the test's.

Owns no server: `add_chunked` puts the image into a FakeRegistry, `with_image` opens it through a Client's transport.
"""

import io
from collections.abc import Awaitable, Callable, Mapping
from itertools import repeat
from pathlib import Path
from typing import TypeVar

import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.image import ImageOptions, OpenImage, open_image
from ckptfs.layers.zstd_chunked_writer import Member, write_layer
from ckptfs.model.oci import Reference
from ckptfs.model.toc import Inode
from tests.support.fake_registry import FakeRegistry
from tests.support.sources import Client
from tests.support.tools import wait_for

T = TypeVar("T")

PAGES = b"checkpoint/pages-1.img"


def chunked_layer(files: Mapping[bytes, bytes], chunk: int) -> tuple[str, bytes, dict[str, str]]:
    """(media type, bytes, annotations) of a layer in the zstd:chunked format."""
    out = io.BytesIO()
    folders = sorted({path.rpartition(b"/")[0] for path in files} - {b""})
    members = [Member(folder, Inode(0o040755)) for folder in folders]
    for path, data in files.items():
        inode = Inode(0o100644, size=len(data))
        members.append(Member(path, inode, payload=lambda data=data: io.BytesIO(data), cuts=lambda: repeat((chunk,))))  # type: ignore[misc]
    written = write_layer(members, out.write)
    return written.descriptor.media_type, out.getvalue(), dict(written.descriptor.annotations)


def add_chunked(registry: FakeRegistry, files: Mapping[bytes, bytes], chunk: int) -> None:
    """As repo:latest."""
    media_type, data, notes = chunked_layer(files, chunk)
    registry.add_image("repo", "latest", [(media_type, data)], layer_annotations=[notes])


def with_image(
    c: Client,
    folder: Path,
    work: Callable[[OpenImage], Awaitable[T]],
    *,
    name: str = "repo:latest",
    prefetch: bool = False,
    background: bool = False,
    strict: bool = False,
    offline: bool = False,
) -> T:
    """Open the image with a cache in `folder`, run `work` in the event loop, return what it returns."""
    options = ImageOptions(
        view="raw", prefetch=prefetch, background=background, strict=strict, offline=offline, settings=c.settings
    )

    async def run() -> T:
        def reach(reference: Reference) -> object:
            raise AssertionError(f"{reference} is not needed")

        async with open_image(c.source(name), cache, options, c.counters, reach) as image:  # type: ignore[arg-type]
            await image.ready()
            return await work(image)

    with ChunkCache.open(folder) as cache:
        try:
            found = trio.run(run)
            wait_for("abandoned threads", lambda: c.counters.in_flight == 0)
            return found
        except BaseExceptionGroup as group:
            while isinstance(group, BaseExceptionGroup) and len(group.exceptions) == 1:
                (group,) = group.exceptions
            raise group from None


async def read_file(image: OpenImage, path: bytes, offset: int = 0, size: int = -1) -> bytes:
    """File bytes, or the error that a reader of the mount would see."""
    node = await image.find(path)
    assert node is not None and node.inode is not None, path
    return await image.read(node.inode, offset, node.inode.size - offset if size < 0 else size)
