"""Rows N9, N12 and C5: what goes on by itself once a registry, or another process of the node, is well again."""

import gzip
import os
import stat
import time
from pathlib import Path
from random import Random

import pytest
import trio

import ckptfs.image.opened
from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.disk import Buffer
from ckptfs.engine.owed import Owed
from ckptfs.engine.regions import RegionClaims
from ckptfs.errors import CkptfsError, UnavailableError
from ckptfs.image import OpenImage
from ckptfs.model.toc import Chunk
from ckptfs.settings import KiB, MiB, Timeouts
from tests.support.chunked import PAGES, add_chunked, read_file, with_image
from tests.support.command import mounted
from tests.support.fake_registry import FakeRegistry, Silent, Status
from tests.support.faulty import BLOB, TAR, Record
from tests.support.sources import client
from tests.support.tars import tar_of
from tests.support.tools import require, wait_for

CHUNK = 64 * KiB
DATA = Random(41).randbytes(4 * MiB)
FILES = {f"f{n:02d}": Random(n).randbytes(MiB) for n in range(12)}
FAST = Timeouts(read_deadline=5.0, first_byte=0.5, stall_window=0.5, retry_first=0.01, retry_cap=0.2)


@pytest.mark.row("N9")
def test_a_layer_is_scanned_again_after_an_outage(tmp_path: Path, record_property: Record) -> None:
    """Names that were not known when the registry failed are found when it is well again."""
    with FakeRegistry() as registry, client(registry, timeouts=FAST) as c:
        registry.add_image("repo", "latest", [(TAR, tar_of(FILES))])

        async def work(image: OpenImage) -> float:
            with pytest.raises(UnavailableError):
                await read_file(image, b"f11", 0, MiB)
            registry.script.clear()
            began = time.monotonic()
            while True:
                try:
                    assert await read_file(image, b"f11", 0, MiB) == FILES["f11"]
                    break
                except UnavailableError:
                    await trio.sleep(0.02)
            assert await image.find(b"absent") is None
            assert len(image.errors) == 1
            return time.monotonic() - began

        for number in range(2, 400):
            registry.script[BLOB, number] = Status(503)
        seconds = with_image(c, tmp_path / "cache", work)
    record_property("figure", f"names known {seconds:.1f} s after the registry was well")
    assert seconds < 3


@pytest.mark.fuse
@pytest.mark.row("N9")
def test_a_tar_inside_is_read_again_after_an_outage(tmp_path: Path) -> None:
    require("fusermount3")
    inner = tar_of({"etc/x": b"x" * 1000})
    filler = {f"volumes/{n}": Random(n).randbytes(MiB) for n in range(3)}  # or the first request brings it all
    files = {
        "checkpoint/inventory.img": b"i",
        "config.dump": b"{}",
        **filler,
        "rootfs-diff.tar": inner,
        "last": b"l" * MiB,
    }
    with FakeRegistry() as registry:
        add_chunked(registry, {name.encode(): data for name, data in files.items()}, CHUNK)
        lazily = ("--prefetch", "none", "--no-background-fetch")
        with mounted(registry.reference("repo:latest"), tmp_path, *lazily) as mount:
            registry.script[BLOB, None] = Status(503)
            for _ in range(2):
                with pytest.raises(OSError, match="Input/output error"):
                    os.listdir(mount.path / "rootfs-diff")
                time.sleep(3.2)  # longer than an error is kept
            registry.script.clear()
            wait_for("names", lambda: listed(mount.path / "rootfs-diff") == ["etc"])
            assert (mount.path / "rootfs-diff" / "etc" / "x").read_bytes() == b"x" * 1000


@pytest.mark.fuse
@pytest.mark.row("N9")
def test_what_a_delta_has_deleted_is_asked_for_again_after_an_outage(tmp_path: Path) -> None:
    """The tar was read, and then the registry failed: its list of deleted files comes when it is well again."""
    require("fusermount3")
    filler = {f"volumes/{n}": Random(n).randbytes(MiB) for n in range(3)}
    files = {
        "checkpoint/inventory.img": b"i",
        "config.dump": b"{}",
        "volumes/0": filler["volumes/0"],
        "rootfs-diff.tar": tar_of({"etc/x": b"x" * 1000}),
        "volumes/1": filler["volumes/1"],
        "deleted.files": b'["/etc/gone"]',
        "volumes/2": filler["volumes/2"],
    }
    with FakeRegistry() as registry:
        add_chunked(registry, {name.encode(): data for name, data in files.items()}, CHUNK)
        lazily = ("--prefetch", "none", "--no-background-fetch")
        with mounted(registry.reference("repo:latest"), tmp_path, *lazily) as mount:
            registry.script |= {(BLOB, number): Status(503) for number in range(2, 400)}
            with pytest.raises(OSError, match="Input/output error"):
                os.listdir(mount.path / "rootfs-diff")
            registry.script.clear()
            time.sleep(3.2)  # longer than an error is kept
            wait_for("names", lambda: listed(mount.path / "rootfs-diff") == ["etc"])
            gone = os.stat(mount.path / "rootfs-diff" / "etc" / "gone")
            assert stat.S_ISCHR(gone.st_mode) and gone.st_rdev == 0


def listed(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


@pytest.mark.row("N12")
def test_the_background_makes_up_for_an_outage(tmp_path: Path, record_property: Record) -> None:
    with FakeRegistry() as registry, client(registry, timeouts=FAST) as c:
        add_chunked(registry, {PAGES: DATA}, CHUNK)

        async def work(image: OpenImage) -> int:
            with trio.fail_after(20):
                while not image.fetcher._owed:
                    await trio.lowlevel.checkpoint()
            await trio.sleep(1)
            asked = len(registry.requests(BLOB))
            assert image.fetcher.prefetched_bytes == 0
            registry.script.clear()
            await image.fetcher.settled()
            assert image.fetcher.prefetched_bytes == sum(chunk.size for chunk in image.chunks().values())
            assert all(image.fetcher.has(chunk) for chunk in image.chunks().values())
            return asked

        for number in range(2, 400):
            registry.script[BLOB, number] = Status(503)
        asked = with_image(c, tmp_path / "cache", work, background=True)
    record_property("figure", f"{asked} requests in an outage of 1 s, then all of the image")


def test_a_dead_registry_is_asked_for_little_and_a_living_one_for_all() -> None:
    chunks = [Chunk(bytes([n]), 0, n, 1, 1, b"") for n in range(100)]
    owed, now, asked = Owed(3.0), 100.0, []
    owed.add(chunks, now)
    owed.add(chunks[:1], now)  # the failure of another request of the same moment
    while now < 3700:
        now = owed.until
        asked.append(now)
        few = owed.take(now)
        assert 0 < len(few) <= 8
        owed.add(few, now + 4)
    assert asked[0] == 103 and len(asked) < 65
    few = owed.take(owed.until)
    owed.arrived()
    assert sorted(few + owed.take(now), key=lambda chunk: chunk.key) == chunks
    assert not owed and owed.until < now


@pytest.mark.row("C5")
def test_claims_of_a_process_that_is_stopped(tmp_path: Path, record_property: Record) -> None:
    """It holds them, and fetches nothing: others wait for a while, and then, for a minute, hardly."""
    with FakeRegistry() as registry, client(registry, timeouts=FAST) as c, ChunkCache.open(tmp_path) as other:
        add_chunked(registry, {PAGES: DATA}, CHUNK)

        async def work(image: OpenImage) -> list[float]:
            await read_file(image, PAGES, 0, 1)
            await image.fetcher.settled()  # its own claim is given back
            chunks = list(image.chunks().values())
            blob, _ = image.fetcher.layer(chunks[0].layer)
            mine, others, _ = RegionClaims(other).take(blob.descriptor.digest.raw, chunks)
            assert mine and not others
            seconds = []
            for at in (MiB, 2 * MiB):
                began = time.monotonic()
                assert await read_file(image, PAGES, at, CHUNK) == DATA[at : at + CHUNK]
                seconds.append(time.monotonic() - began)
            return seconds

        first, second = with_image(c, tmp_path, work)
    record_property("figure", f"stopped holder: fetched after {first:.1f} s, then after {second:.2f} s")
    assert 0.9 <= first < 2.5 and second < 0.8


@pytest.mark.row("N1")
def test_the_deadline_holds_for_reads_that_wait_for_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    monkeypatch.setattr(ckptfs.image.opened, "_MAX_WAITING", 4)
    timeouts = FAST._replace(read_deadline=1.0, first_byte=5.0)
    with FakeRegistry() as registry, client(registry, timeouts=timeouts) as c:
        add_chunked(registry, {PAGES: DATA}, CHUNK)

        async def work(image: OpenImage) -> list[float]:
            await read_file(image, PAGES, 0, 1)
            registry.script[BLOB, None] = Silent()
            took: list[float] = []

            async def one(number: int) -> None:
                began = time.monotonic()
                with pytest.raises(UnavailableError, match="no answer within 1 s"):
                    await read_file(image, PAGES, number * CHUNK, 100)
                took.append(time.monotonic() - began)

            async with trio.open_nursery() as nursery:
                for number in range(1, 40):
                    nursery.start_soon(one, number)
            return took

        took = with_image(c, tmp_path, work)
    record_property("figure", f"39 reads, 4 at a time: the last ends after {max(took):.2f} s of 1")
    assert max(took) < 1.6


def test_an_error_that_is_kept_does_not_grow(tmp_path: Path) -> None:
    """Readers of what is known to be wrong get it again and again."""

    def length(error: BaseException) -> int:
        trace, count = error.__traceback__, 0
        while trace is not None:
            trace, count = trace.tb_next, count + 1
        return count

    with FakeRegistry() as registry, client(registry, timeouts=FAST) as c:
        add_chunked(registry, {PAGES: DATA}, CHUNK)

        async def work(image: OpenImage) -> list[int]:
            await read_file(image, PAGES, 0, 1)
            registry.script[BLOB, None] = Status(404)
            lengths = []
            for _ in range(5):
                with pytest.raises(CkptfsError) as caught:
                    await read_file(image, PAGES, MiB, 100)
                lengths.append(length(caught.value))
            return lengths

        lengths = with_image(c, tmp_path, work)
    assert len(set(lengths)) == 1


def test_what_a_stream_has_handed_out_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cache warm` counts what it has when the last chunk has come; here over a slow disk."""
    put = ChunkCache.put_many

    def slowly(cache: ChunkCache, chunks: list[tuple[bytes, Buffer]]) -> None:
        time.sleep(0.05)
        put(cache, chunks)

    monkeypatch.setattr(ChunkCache, "put_many", slowly)
    with FakeRegistry() as registry, client(registry, timeouts=FAST) as c:
        registry.add_image("repo", "latest", [(TAR + "+gzip", gzip.compress(tar_of({"f": DATA}), 1))])

        async def work(image: OpenImage) -> bool:
            assert await read_file(image, b"f", len(DATA) - 1, 1) == DATA[-1:]
            node = await image.find(b"f")
            assert node is not None and node.inode is not None
            *_, last = node.inode.extents
            image.fetcher.memory.drop(last.chunk.key)
            return image.fetcher.has(last.chunk)

        assert with_image(c, tmp_path, work)
