"""What an open image fetches before it is asked: metadata, the pages no restore can do without, then all the rest.

The order comes from prefetch/, the doing is the engine's; here is only when. Errors are left to whoever reads the file.
What knows the order is imported while the metadata is on its way (4 ms).
"""

import time
from contextlib import suppress
from importlib import import_module
from itertools import chain, islice
from typing import TYPE_CHECKING

import trio

from ckptfs.engine.owed import longer
from ckptfs.engine.schedule import Priority
from ckptfs.engine.threads import in_thread
from ckptfs.errors import CkptfsError, UnavailableError
from ckptfs.image.opened import OpenImage
from ckptfs.model.profile import Profile
from ckptfs.model.toc import UNKNOWN, Chunk, Inode
from ckptfs.prefetch.background import Background, Metadata

if TYPE_CHECKING:
    from ckptfs.prefetch.restore_order import RestoreOrder

_WORTH = 2  # times its own size that a table of cells must save, before it is fetched
_BATCH = 512  # chunks of a profile between two looks at what else there is to do
_BACKGROUND_DELAY = 1.0  # seconds; a restore with lazy pages has its first tick before the rest is fetched


async def fetch_ahead(image: OpenImage) -> None:
    """Runs for a moment after the tree is arranged; the engine works on when it has returned."""
    async with trio.open_nursery() as nursery:
        if image.options.prefetch:
            image.fetcher.want(Metadata().plan(image.tree), Priority.PREFETCH)
            nursery.start_soon(_eager_pages, image)
            nursery.start_soon(_recorded, image)
        if image.options.background:
            nursery.start_soon(fetch_rest, image)


async def fetch_all(image: OpenImage, *, metadata_only: bool = False) -> int:
    """Until the node has the whole image, or CRIU's metadata and the dumps; raises what keeps it from that.

    What the cache evicts meanwhile, or has no room for, is not fetched again: returns how many chunks that are. Nothing
    is left in memory, so that `cached_bytes` tells what the next mount will find.
    """
    image.run_on()
    await image.all_known()
    await image.tables.load_all()
    plan = Metadata() if metadata_only else Background()
    chunks = list({chunk.key: chunk for chunk in plan.plan(image.tree)}.values())
    image.fetcher.fill(iter(chunks))
    for chunk in chunks:
        if not image.fetcher.has(chunk):
            await image.fetcher.get(chunk, Priority.BACKGROUND)
    await image.fetcher.settled()
    for chunk in chunks:
        image.fetcher.memory.drop(chunk.key)
    return sum(not image.fetcher.has(chunk) for chunk in chunks)


async def _eager_pages(image: OpenImage) -> None:
    """The pages that a restore needs at once, with lazy pages too; known when the metadata is here."""
    await in_thread(import_module, "ckptfs.prefetch.restore_order", finish=True)  # while the metadata is on its way
    with suppress(CkptfsError):
        for chunk in Metadata().plan(image.tree):
            await image.fetcher.get(chunk, Priority.PREFETCH)
        image.metadata_at = time.monotonic()
        await image.tables.open_all()
        chunks = list(_order(image, eager_only=True).plan(image.tree))
        if await image.tables.parts.learn_for(chunks):
            chunks = list(_order(image, eager_only=True).plan(image.tree))
        image.fetcher.want((chunk for chunk in chunks if chunk.layer != UNKNOWN), Priority.PREFETCH)


async def _recorded(image: OpenImage) -> None:
    """What other restores of this image have read, if anybody has recorded one: before all that is only likely."""
    with suppress(CkptfsError):
        profile = await in_thread(_find_profile, image)
        if profile is None:
            return
        from ckptfs.prefetch.profile import Recorded

        image.profile = profile
        policy = Recorded(profile, image.tree)
        cells = {}
        for inode in policy.files:
            await image.tables.load(inode)
            table = image.tables.cells_size(inode)
            if table is not None and policy.spare(inode) > _WORTH * table:
                cells[inode] = await image.tables.cells(inode)
        image.reader.take_apart(policy.take_apart(cells))
        plan = policy.plan()
        while batch := list(islice(plan, _BATCH)):
            image.fetcher.want(batch, Priority.PREFETCH)
            await trio.lowlevel.checkpoint()


def _find_profile(image: OpenImage) -> Profile | None:
    from ckptfs.image import profiles

    digest, limits = image.resolved.manifest.digest, image.options.settings.limits
    profile = profiles.remembered(digest, image.cache, limits)
    if profile is not None or image.options.offline or image.resolved.from_cache:
        return profile
    with image.counters.aside():
        return profiles.find(image.source, digest, image.cache, limits)


async def fetch_rest(image: OpenImage) -> None:
    """The rest, a little later or as soon as somebody reads pages from front to back."""
    with trio.move_on_after(_BACKGROUND_DELAY):
        await image.reader.sequential.wait()
    pause = 0.0
    while True:
        image.run_on()
        try:
            await _fetch_rest(image)
            return
        except CkptfsError as error:
            if not error.retryable:
                return
        pause = longer(pause, image.options.settings.timeouts.retry_cap)
        await trio.sleep(pause)


async def _fetch_rest(image: OpenImage) -> None:
    await image.all_known()
    await image.tables.load_all()
    pages = _order(image, eager_only=False).plan(image.tree)
    image.fetcher.fill(chain(pages, Background().plan(image.tree)))
    await _run_known_streams(image)
    await image.tables.keep_cells()
    await image.fetcher.settled()
    await image.verify_whole_layers()


async def _run_known_streams(image: OpenImage) -> None:
    """A stream whose entries are known runs only as far as somebody waits: here for the last chunk that is missing."""
    streams = {number for number, (_, layer) in image.layers.items() if layer.sequential}
    last: dict[int, Chunk] = {}
    for chunk in Background().plan(image.tree) if streams else ():
        if chunk.layer in streams and not image.fetcher.has(chunk):
            known = last.get(chunk.layer)
            if known is None or chunk.offset > known.offset:
                last[chunk.layer] = chunk
    for chunk in last.values():
        with suppress(UnavailableError):  # it takes longer than a read may; it runs on
            await image.fetcher.get(chunk, Priority.BACKGROUND)


def _order(image: OpenImage, *, eager_only: bool) -> "RestoreOrder":
    from ckptfs.prefetch.restore_order import RestoreOrder

    def read_now(inode: Inode) -> bytes | None:
        data = image.reader.cached(inode, 0, inode.size)
        return bytes(data) if data is not None else None

    return RestoreOrder(read_now, image.options.settings.limits, eager_only=eager_only)
