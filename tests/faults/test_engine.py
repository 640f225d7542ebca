"""Rows N2, N6, N14, N15 and F5: what the engine asks for again, what it does not, and how little it asks for at all."""

import errno
import json
import os
import time
from pathlib import Path
from random import Random

import pytest
import trio

from ckptfs.control.client import MountFiles
from ckptfs.errors import CkptfsError
from ckptfs.image import OpenImage
from ckptfs.model.oci import OCI_MANIFEST, Digest
from ckptfs.settings import KiB, MiB, Timeouts
from tests.support.chunked import PAGES, add_chunked, read_file, with_image
from tests.support.command import mounted
from tests.support.fake_registry import CONFIG, Access, FakeRegistry, Status, Trickle
from tests.support.faulty import BLOB, TAR, Record
from tests.support.hanging import LAZY, errno_of
from tests.support.sources import client
from tests.support.tars import END, header, member
from tests.support.tools import require

CHUNK = 64 * KiB
DATA = Random(21).randbytes(4 * MiB)
OTHER = b"checkpoint/core-1.img"


@pytest.fixture
def fuse() -> None:
    require("fusermount3")


def within(access: Access, offset: int) -> bool:
    return access.range is not None and access.range[0] <= offset <= access.range[1]


# -- N2: wrong everywhere ----------------------------------------------------------------------------------------------


@pytest.mark.fuse
@pytest.mark.row("N2")
@pytest.mark.usefixtures("fuse")
def test_a_chunk_that_is_wrong_everywhere(tmp_path: Path, record_property: Record) -> None:
    """One bit of the registry's own copy is wrong."""
    with FakeRegistry() as registry:
        add_chunked(registry, {OTHER: b"core" * 5000, PAGES: DATA}, CHUNK)
        digest, blob = max(registry.blobs.items(), key=lambda item: len(item[1]))
        at = blob.index(DATA[20 * CHUNK : 20 * CHUNK + 1000])  # random bytes are stored as they are
        registry.blobs[digest] = blob[:at] + bytes([blob[at] ^ 4]) + blob[at + 1 :]
        with mounted(registry.reference("repo:latest"), tmp_path, *LAZY) as mount:
            file = os.open(mount.path / PAGES.decode(), os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            took = []
            for _ in range(3):
                began = time.monotonic()
                assert errno_of(lambda: os.pread(file, 100, 20 * CHUNK + 500)) == errno.EIO
                took.append(time.monotonic() - began)
            asked = sum(within(access, at) for access in registry.requests(BLOB))
            for chunk in (0, 19, 21, 63):
                assert os.pread(file, CHUNK, chunk * CHUNK) == DATA[chunk * CHUNK : (chunk + 1) * CHUNK]
            os.close(file)
            assert (mount.path / OTHER.decode()).read_bytes() == b"core" * 5000
            status = mount.status()
            log = MountFiles.of(str(mount.path)).log.read_text()
    lines = [line for line in log.splitlines() if " ERROR " in line]
    record_property("figure", f"EIO after {max(took):.2f} s, {asked} fetches in 3 reads, {len(lines)} ERROR line")
    assert max(took) <= 2.0
    assert asked == 2
    assert len(lines) == 1
    assert len(status["errors"]) == 1 and "wrong bytes twice" in status["errors"][0]


def test_what_came_before_a_failure_counts(tmp_path: Path) -> None:
    """The first half of an extent is handed out and kept although the connection never brings the rest."""
    timeouts = Timeouts(read_deadline=1.0, first_byte=0.3, stall_window=0.3, retry_first=0.05)
    with FakeRegistry() as registry, client(registry, timeouts=timeouts) as c:
        add_chunked(registry, {PAGES: DATA}, CHUNK)

        async def work(image: OpenImage) -> tuple[bytes, int]:
            await read_file(image, PAGES, 0, 1)
            registry.script[BLOB, None] = Trickle(0.001, 4 * KiB)

            async def all_of_it() -> None:
                with pytest.raises(CkptfsError):
                    await read_file(image, PAGES, CHUNK, 40 * CHUNK)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(all_of_it)
                await trio.sleep(0.15)
                registry.script[BLOB, None] = Status(500)
                first = await read_file(image, PAGES, CHUNK, CHUNK)
                registry.closing.set()  # the trickle ends in the middle
            registry.closing.clear()
            asked = len(registry.requests(BLOB))
            return first + await read_file(image, PAGES, 2 * CHUNK, CHUNK), len(registry.requests(BLOB)) - asked

        assert with_image(c, tmp_path, work) == (DATA[CHUNK : 3 * CHUNK], 0)


# -- N6: a login that was revoked --------------------------------------------------------------------------------------


@pytest.mark.fuse
@pytest.mark.row("N6")
@pytest.mark.usefixtures("fuse")
def test_revoked_credentials_take_away_only_what_is_not_here(tmp_path: Path, record_property: Record) -> None:
    with FakeRegistry(auth="bearer", anonymous=True) as registry:
        add_chunked(registry, {OTHER: b"core" * 5000, PAGES: DATA}, CHUNK)
        with mounted(registry.reference("repo:latest"), tmp_path, *LAZY) as mount:
            file = os.open(mount.path / PAGES.decode(), os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            assert os.pread(file, CHUNK, 0) == DATA[:CHUNK]
            registry.denying = True
            registry.expire_tokens()
            tokens = len(registry.requests("/token"))
            began = time.monotonic()
            for chunk in range(10, 30):
                assert errno_of(lambda: os.pread(file, 10, chunk * CHUNK)) == errno.EACCES  # noqa: B023
            took = time.monotonic() - began
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file, CHUNK, 0) == DATA[:CHUNK]
            os.close(file)
            errors = mount.status()["errors"]
        tokens = len(registry.requests("/token")) - tokens
    record_property("figure", f"20 misses: EACCES in {took:.2f} s, {tokens} token request; cached reads work")
    assert took <= 1.0
    assert tokens <= 1
    assert "podman login" in errors[-1]


# -- N14: a storm of readers -------------------------------------------------------------------------------------------


@pytest.mark.row("N14")
def test_a_thousand_readers_of_a_dead_chunk(tmp_path: Path, record_property: Record) -> None:
    """Each of them tries again a second after its error. The default time limits."""
    seconds, readers = 7.0, 1000
    with FakeRegistry() as registry, client(registry, timeouts=Timeouts()) as c:
        add_chunked(registry, {PAGES: DATA}, CHUNK)

        async def work(image: OpenImage) -> tuple[int, int, float]:
            await read_file(image, PAGES, 0, 1)
            node = await image.find(PAGES)
            assert node is not None and node.inode is not None
            inode, failures = node.inode, 0
            registry.script[BLOB, None] = Status(500)
            asked, cpu = len(registry.requests(BLOB)), time.process_time()

            async def reader() -> None:
                nonlocal failures
                while True:
                    try:
                        await image.read(inode, 20 * CHUNK, 100)
                    except CkptfsError:
                        failures += 1
                        await trio.sleep(1.0)

            with trio.move_on_after(seconds):
                async with trio.open_nursery() as nursery:
                    for _ in range(readers):
                        nursery.start_soon(reader)
            return failures, len(registry.requests(BLOB)) - asked, time.process_time() - cpu

        failures, asked, cpu = with_image(c, tmp_path, work)
    figure = f"{readers} readers, {failures} errors in {seconds:.0f} s: {asked / seconds:.1f} requests/s, "
    record_property("figure", f"{figure}{cpu / seconds:.0%} of a core, the registry of the test included")
    assert failures > readers
    assert asked <= seconds
    assert cpu <= 0.2 * seconds


# -- N15: a tag that moves ---------------------------------------------------------------------------------------------


@pytest.mark.fuse
@pytest.mark.row("N15")
@pytest.mark.usefixtures("fuse")
def test_a_tag_that_moves_changes_nothing_under_a_reader(tmp_path: Path, record_property: Record) -> None:
    with FakeRegistry() as registry:
        add_chunked(registry, {PAGES: DATA}, CHUNK)
        before = registry.manifests["repo", "latest"]
        with mounted(registry.reference("repo:latest"), tmp_path, *LAZY) as mount:
            with (mount.path / PAGES.decode()).open("rb", buffering=0) as file:
                first = file.read(len(DATA) // 2)
                add_chunked(registry, {PAGES: DATA[::-1]}, CHUNK)
                assert registry.manifests["repo", "latest"] != before
                rest = b"".join(iter(lambda: file.read(1 * MiB), b""))
            assert first + rest == DATA
            digest = mount.status()["digest"]
        found = next(key for (_, key), value in registry.manifests.items() if value == before and ":" in key)
    assert digest == found
    record_property("figure", f"retagged in the middle of a read: same bytes, status says {digest[:19]}…")


# -- L2: demand beats prefetch -----------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.row("L2")
def test_a_demand_goes_out_before_anything_more_is_prefetched(tmp_path: Path, record_property: Record) -> None:
    """While the background fills a slow link: how many other requests follow a read before its own."""
    data, random, reads = Random(24).randbytes(32 * MiB), Random(25), 30
    with FakeRegistry() as registry, client(registry, timeouts=Timeouts()) as c:
        add_chunked(registry, {PAGES: data}, CHUNK)

        async def work(image: OpenImage) -> tuple[list[int], list[float]]:
            await read_file(image, PAGES, 0, 1)
            node = await image.find(PAGES)
            assert node is not None and node.inode is not None
            chunks = [extent.chunk for extent in node.inode.extents]
            registry.script[BLOB, None] = Trickle(0.01, 16 * KiB)
            image.fetcher.fill(iter(chunks))
            before, waits = [], []
            while len(before) < reads:
                await trio.sleep(0.1)
                missing = [n for n, chunk in enumerate(chunks) if not image.fetcher.has(chunk)]
                number = random.choice(missing[len(missing) // 2 :])
                chunk, log, began = chunks[number], len(registry.requests(BLOB)), time.monotonic()
                assert await read_file(image, PAGES, number * CHUNK, 100) == data[number * CHUNK :][:100]
                waits.append(time.monotonic() - began)
                asked = registry.requests(BLOB)[log:]
                own = [place for place, access in enumerate(asked) if within(access, chunk.offset)]
                before += own[:1]  # none: it was on its way already
            assert not all(image.fetcher.has(chunk) for chunk in chunks), "there was something to beat"
            return before, waits

        before, waits = with_image(c, tmp_path, work)
    waits.sort()
    figure = f"{reads} reads beside a background fetch: at most {max(before)} request before their own"
    record_property("figure", f"{figure}, data after {waits[len(waits) // 2] * 1000:.0f} ms in the median")
    assert max(before) <= 1


# -- F5: laziness ------------------------------------------------------------------------------------------------------


@pytest.mark.row("F5")
def test_no_more_is_fetched_than_is_needed(tmp_path: Path, record_property: Record) -> None:
    """Without prefetch, random reads of whole chunks, of small pieces, and of runs."""
    data = Random(22).randbytes(32 * MiB)
    random = Random(23)
    chunks = len(data) // CHUNK
    patterns = {
        "small reads": [(random.randrange(chunks) * CHUNK + random.randrange(CHUNK - 4096), 4096) for _ in range(60)],
        "chunks": [(random.randrange(chunks) * CHUNK, CHUNK) for _ in range(60)],
        "runs": [(random.randrange(chunks - 20) * CHUNK, 16 * CHUNK) for _ in range(6)],
    }
    figures = []
    for name, reads in patterns.items():
        with FakeRegistry() as registry, client(registry) as c:
            add_chunked(registry, {PAGES: data}, CHUNK)

            async def work(image: OpenImage, reads: list[tuple[int, int]] = reads) -> tuple[int, int]:
                await read_file(image, PAGES, 0, 1)
                before = image.counters.bytes
                for offset, size in reads:
                    assert await read_file(image, PAGES, offset, size) == data[offset : offset + size]
                needed = {(offset + at) // CHUNK for offset, size in reads for at in range(0, size, 4096)} - {0}
                return image.counters.bytes - before, len(needed) * CHUNK

            fetched, needed = with_image(c, tmp_path / name, work)
            figures.append(f"{name} {fetched / needed:.2f}")
            assert fetched <= 1.10 * needed
    record_property("figure", f"fetched / needed: {', '.join(figures)}")


@pytest.mark.alone
@pytest.mark.fuse
@pytest.mark.row("F5")
@pytest.mark.usefixtures("fuse")
def test_ready_is_independent_of_the_size(tmp_path: Path, record_property: Record) -> None:
    """The names of a plain tar, whose headers lie around 100 MB and 10 GB of pages."""
    times: dict[int, list[float]] = {100: [], 10_000: []}
    with FakeRegistry() as registry:
        for size in times:
            add_huge(registry, size * MiB, f"mb{size}")
        for number in range(5):
            for size, found in times.items():
                folder = tmp_path / f"{size}-{number}"
                with mounted(registry.reference(f"repo:mb{size}"), folder, *LAZY) as mount:
                    assert (mount.path / OTHER.decode()).stat().st_size == 9
                    found.append(mount.first["ready_ms"])
    small, large = (min(found) for found in times.values())
    record_property("figure", f"ready after {small:.0f} ms with 100 MB, {large:.0f} ms with 10 GB")
    assert large <= 1.2 * small + 30  # ms that one start differs from the next


class HugeTar:
    """The bytes of a tar with `size` zeros in the middle, without the memory for them."""

    def __init__(self, size: int) -> None:
        self._front = member(b"config.dump", b"{}") + header(PAGES, size)
        self._back = member(OTHER, b"core file") + END
        self._size = len(self._front) + size + len(self._back)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, wanted: slice) -> bytes:
        start, stop, _ = wanted.indices(self._size)
        hole = self._size - len(self._back)
        front, back = self._front[start:stop], self._back[max(start - hole, 0) : max(stop - hole, 0)]
        return front + bytes(stop - start - len(front) - len(back)) + back


def add_huge(registry: FakeRegistry, size: int, tag: str) -> None:
    """An image whose layer nobody will hash."""
    tar = HugeTar(size)
    digest = str(Digest.of(tag.encode()))
    registry.blobs[digest] = tar  # type: ignore[assignment]
    registry.owned.add(("repo", digest))
    config = {"mediaType": CONFIG, "digest": str(registry.add_blob(b"{}")), "size": 2}
    layer = {"mediaType": TAR, "digest": digest, "size": len(tar)}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [layer]}
    registry.add_manifest("repo", json.dumps(manifest).encode(), OCI_MANIFEST, tag)
