"""The cache when processes are killed, files are torn and disks refuse: rows C1 to C4."""

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.disk import DiskOps
from ckptfs.engine.errands import Errands
from ckptfs.errors import CacheError
from tests.support.cache_load import ROOT, chunk, item, key, right, start, used
from tests.support.chunked import PAGES, add_chunked
from tests.support.command import mounted
from tests.support.disk_faults import DiesAt, FailAt, FakeClock, FaultyDisk, Refusing
from tests.support.disks import disk_of
from tests.support.fake_registry import FakeRegistry
from tests.support.tools import require

KiB, MiB = 1024, 1024 * 1024
SIZE = 16 * MiB

Figure = Callable[[str, object], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# -- C1, C2: what a crash leaves ---------------------------------------------------------------------------------------


@pytest.mark.row("C1")
def test_killed_while_filling(path: Path, record_property: Figure) -> None:
    length, finished, reused = 40_000, 0, 0
    rng = random.Random(1)
    for _ in range(int(os.environ.get("CKPTFS_SOAK_KILLS", "20"))):
        child = start("fill", path, 64 * MiB, length)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.random() * 0.03)
        child.send_signal(signal.SIGKILL)
        numbers = [int(line) for line in child.stdout.read().splitlines() if line]
        child.stdout.close()
        child.wait()
        with ChunkCache.open(path, size=64 * MiB) as cache:
            assert not list(path.rglob("*.tmp"))
            last = max(numbers, default=0)
            finished += last + 1
            reused += len(right(cache, range(last + 1), length))
            newest = cache.get_document("newest")
            assert newest is not None and newest == newest[: len(newest) // 1000] * 1000
            cache.clear()
    record_property("figure", f"{reused / finished:.1%} of finished chunks reused")
    assert reused >= 0.95 * finished


@pytest.mark.row("C2")
@pytest.mark.parametrize("damage", ["truncate", "zero", "shuffle"])
def test_torn_files_are_misses(path: Path, damage: str) -> None:
    rng = random.Random(damage)
    length, numbers = 9000, range(1000)
    with ChunkCache.open(path, size=SIZE, segment=256 * KiB) as cache:
        for number in numbers:
            cache.put_many([item(number, length)])
        for number in range(30):
            cache.put_document(str(number), chunk(number, length))
    files = sorted(file for file in path.rglob("*") if file.suffix in (".seg", ".idx", ".doc"))
    damaged = rng.sample(files, len(files) // 10)
    for file in damaged:
        data = file.read_bytes()
        if damage == "truncate":
            data = data[: rng.randrange(len(data))]
        elif damage == "zero":
            at = rng.randrange(0, len(data), 4096)
            data = data[:at] + bytes(len(data[at : at + 8192])) + data[at + 8192 :]
        else:
            blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
            rng.shuffle(blocks)
            data = b"".join(blocks)
        file.write_bytes(data)
    documents = {file for file in damaged if file.suffix == ".doc"}
    with ChunkCache.open(path, size=SIZE, segment=256 * KiB) as cache:
        found = right(cache, numbers, length)
        assert 0.6 * len(numbers) < len(found) < len(numbers)
        for number in range(30):
            assert cache.get_document(str(number)) in (None, chunk(number, length))
        assert not any(file.exists() and file.stat().st_size != length for file in documents if damage == "truncate")
        cache.put_many([item(number, length) for number in numbers])
        assert len(right(cache, numbers, length)) == len(numbers)
    with ChunkCache.open(path, size=SIZE, segment=256 * KiB) as cache:
        assert len(right(cache, numbers, length)) == len(numbers)  # what was bad has been erased, not shadowed
        cache.verify()
        assert cache.verify()[1] == 0


# -- C3, C4: a disk that refuses ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    with disk_of(tmp_path / "disk", "size=16m,mode=755") as disk:
        yield disk


def warnings(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelname == "WARNING" for record in caplog.records)


@pytest.mark.row("C3")
def test_a_disk_smaller_than_the_cache(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ChunkCache.open(small_disk / "cache", size=256 * MiB) as cache:
        for number in range(1000):
            cache.put_many([item(number, 64 * KiB)])
        kept = right(cache, range(1000), 64 * KiB)
        assert 999 in kept and len(kept) * 64 * KiB >= 12 * MiB
        assert warnings(caplog) == 0


@pytest.mark.row("C3")
def test_a_disk_that_others_fill(small_disk: Path, caplog: pytest.LogCaptureFixture, record_property: Figure) -> None:
    clock = FakeClock()
    with ChunkCache.open(small_disk / "cache", size=256 * MiB, clock=clock) as cache:
        cache.put_many([item(number, 64 * KiB) for number in range(10)])
        with (small_disk / "other").open("wb") as other, pytest.raises(OSError, match="No space"):
            while True:
                other.write(bytes(1 * MiB))
                other.flush()
        for number in range(10, 100):
            cache.put_many([item(number, 64 * KiB)])
            cache.put_document(str(number), bytes(300 * KiB))
            right(cache, range(100), 64 * KiB)
        assert warnings(caplog) == 1
        (small_disk / "other").unlink()
        cache.put_many([item(100, 64 * KiB)])
        assert not cache.contains(key(100))
        clock.advance(30)
        cache.put_many([item(101, 64 * KiB)])
        assert cache.get(key(101)) == chunk(101, 64 * KiB)
        assert warnings(caplog) == 2
    record_property("figure", "resumes 30 s after there is space")


@pytest.mark.row("C3")
def test_a_disk_that_turns_read_only(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = small_disk / "cache"
    with ChunkCache.open(path, size=8 * MiB) as cache:
        cache.put_many([item(1, 1000)])
        cache.put_document("d", b"x")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with ChunkCache.open(path, size=8 * MiB) as cache:
        cache.put_many([item(2, 1000)])
        cache.put_document("e", b"x")
        cache.drop(key(7))
        assert cache.get(key(1)) == chunk(1, 1000) and cache.get(key(2)) is None
        assert cache.get_document("d") == b"x" and cache.get_document("e") is None
        assert cache.try_claim([key(2)]) == {key(2)}
        assert warnings(caplog) == 1
        with pytest.raises(CacheError):
            cache.clear(force=True)


@pytest.mark.row("C3")
@pytest.mark.parametrize("make", [ChunkCache.open, ChunkCache.ephemeral])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG])
def test_writes_that_fail(
    tmp_path: Path, make: Callable[..., ChunkCache], code: int, caplog: pytest.LogCaptureFixture
) -> None:
    disk, clock = Refusing("pwritev"), FakeClock()
    with make(tmp_path, size=SIZE, ops=disk, clock=clock) as cache:
        cache.put_many([item(number, 64 * KiB) for number in range(60)])
        disk.code = code
        for number in range(60, 80):
            cache.put_many([item(number, 64 * KiB), item(number + 100, 64 * KiB)])
        assert warnings(caplog) == 1
        kept = right(cache, range(200), 64 * KiB)
        assert max(kept) == 59
        assert len(kept) == 60 or code in (errno.ENOSPC, errno.EDQUOT)  # then the oldest segment went, in vain
        disk.code = None
        clock.advance(29)
        cache.put_many([item(80, 64 * KiB)])
        assert not cache.contains(key(80)) and warnings(caplog) == 1
        clock.advance(2)
        cache.put_many([item(81, 64 * KiB)])
        assert warnings(caplog) == 2
        assert right(cache, range(200), 64 * KiB) == [*kept, 81]


@pytest.mark.row("C3")
def test_a_quota_that_nobody_tells_about(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """EDQUOT at 8 MiB while statvfs promises more: after the first time the cache lives within it."""

    class Quota(DiskOps):
        @staticmethod
        def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:  # type: ignore[override]
            if used(path) + sum(map(len, buffers)) > 8 * MiB:
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            return os.pwritev(fd, buffers, offset)

    with ChunkCache.open(path, size=256 * MiB, segment=4 * MiB, ops=Quota()) as cache:
        for number in range(400):
            cache.put_many([item(number, 64 * KiB)])
        assert used(path) >= 6 * MiB and 399 in right(cache, range(400), 64 * KiB)
        assert warnings(caplog) == 0


@pytest.mark.row("C3")
def test_a_limit_on_file_sizes(path: Path) -> None:
    """The kernel refuses in the middle of a write."""
    script = f"""
import resource, sys
from pathlib import Path
from ckptfs.engine.cache import ChunkCache
from tests.support.cache_load import chunk, item, key
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with ChunkCache.open(Path({str(path)!r}), size=16 << 20) as cache:
    for number in range(10):
        cache.put_many([item(number, 30_000)])
    found = [number for number in range(10) if cache.get(key(number)) == chunk(number, 30_000)]
    print(found)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 1, 2]\n"
    assert "File too large" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.alone
@pytest.mark.row("C3")
def test_a_disk_that_refuses_at_random(path: Path, record_property: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    """One write in thirty: what is kept is right, and nothing is thrown at who reads."""
    # What is kept in the end is chance, so always the same: when a segment was used decides what is evicted.
    monkeypatch.setattr(Errands, "do", lambda _, errand: errand())
    rng, refused = random.Random(9), 0

    def verdict(name: str) -> int | None:
        nonlocal refused
        if name not in ("pwritev", "open", "ftruncate") or rng.random() > 0.03:
            return None
        refused += 1
        return rng.choice((errno.ENOSPC, errno.EDQUOT))

    clock = FakeClock()
    disk = FaultyDisk(lambda name: None)
    with ChunkCache.open(path, size=SIZE, segment=1 * MiB, ops=disk, clock=clock) as cache:
        for name in ("pwritev", "open", "ftruncate"):
            setattr(disk, name, FaultyDisk._guarded(name, getattr(DiskOps, name), verdict))
        for number in range(1, 500):
            cache.put_many([item(number, 40_000)])
            right(cache, range(max(0, number - 20), number + 1), 40_000)
            clock.advance(31)
        kept = len(right(cache, range(500), 40_000))
    record_property("figure", f"{refused} random refusals: 0 wrong of {kept} kept chunks")
    assert refused > 10 and kept > 20


@pytest.mark.fuse
@pytest.mark.row("C3")
def test_a_mount_with_a_disk_of_a_quarter_of_the_image(tmp_path: Path, record_property: Figure) -> None:
    """64 MiB for 256 MiB, and then others fill what is left."""
    require("fusermount3", root=True)
    data = b"".join(random.Random(n).randbytes(64 * MiB) for n in range(4))
    with disk_of(tmp_path / "disk", "size=64m,mode=700") as disk, FakeRegistry() as registry:
        add_chunked(registry, {PAGES: data}, 256 * KiB)
        with mounted(registry.reference("repo:latest"), tmp_path, cache=disk / "cache") as mount:
            wrong = differences(mount.path / PAGES.decode(), data)
            held = used(disk)
            with (disk / "other").open("wb", buffering=0) as other, suppress(OSError):
                while True:
                    other.write(bytes(1 * MiB))
            wrong += differences(mount.path / PAGES.decode(), data)
            errors = mount.status()["errors"]
    record_property(
        "figure", f"256 MiB twice over a disk of 64: {wrong} wrong, {len(errors)} errors, {held >> 20} MiB kept"
    )
    assert wrong == 0 and errors == []
    assert held <= 64 * MiB


def differences(path: Path, data: bytes) -> int:
    """How many MiB of the file are not as they should be."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return sum(os.pread(file, MiB, at) != data[at : at + MiB] for at in range(0, len(data), MiB))
    finally:
        os.close(file)


SMALL = 256 * KiB  # four segments of six chunks


def scenario(cache: ChunkCache) -> None:
    """What a mount and the cache command do, in a cache small enough to evict; wrong bytes fail."""
    length, numbers = 10_000, range(36)
    for number in range(0, 36, 3):
        mine = cache.try_claim([key(number)])
        cache.put_many([item(n, length) for n in range(number, number + 3)])
        cache.release(mine)
        right(cache, range(0, number, 12), length)
    cache.put_document("d", chunk(1, length))
    assert cache.get_document("d") in (None, chunk(1, length))
    for action in (cache.stats, cache.verify, lambda: cache.prune(100_000), lambda: cache.clear(force=True)):
        with suppress(CacheError):
            action()
    cache.put_many([item(number, length) for number in range(8)])
    cache.put_document("e", chunk(2, length))
    cache.delete_document("d")
    buffer = memoryview(bytearray(100))
    for number in range(0, 8, 3):
        assert not cache.read_into(key(number), 50, buffer) or buffer == chunk(number, length)[50:150]
    right(cache, numbers, length)


@pytest.mark.row("C4")
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EINTR, errno.ENOENT])
def test_every_system_call_fails_once(tmp_path: Path, code: int, record_property: Figure) -> None:
    for n in itertools.count(1):
        path = tmp_path / str(n)
        disk = FailAt(n, code)
        with (
            suppress(CacheError),
            ChunkCache.open(path, size=SMALL, segment=SMALL // 4, ops=disk, clock=FakeClock()) as cache,
        ):
            scenario(cache)
        if not disk.tripped:
            break
        with ChunkCache.open(path, size=SMALL, segment=SMALL // 4) as cache:
            right(cache, range(36), 10_000)
            cache.put_many([item(100, 10_000)])
            assert cache.get(key(100)) == chunk(100, 10_000)
            assert cache.get_document("d") in (None, chunk(1, 10_000))
            assert cache.verify()[1] == 0
        assert used(path) <= SMALL + SMALL // 4
    record_property("figure", f"{os.strerror(code)}: N = 1..{n - 1}")
    assert n > 200


@pytest.mark.row("C1")
def test_killed_at_every_system_call(path: Path, record_property: Figure) -> None:
    """Who has the cache open, and who opens it then, reads right bytes, claims and keeps more, can give all back."""
    length = 10_000
    with ChunkCache.open(path, size=SMALL, segment=SMALL // 4) as other:
        for n in itertools.count(1):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    with ChunkCache.open(path, size=SMALL, segment=SMALL // 4, ops=DiesAt(n)) as cache:
                        scenario(cache)
                    code = 0
                finally:
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in (0, -signal.SIGKILL)
            with ChunkCache.open(path, size=SMALL, segment=SMALL // 4) as cache:
                for each in (other, cache):
                    each.refresh()
                    right(each, range(1000), length)
                    assert each.get_document("d") in (None, chunk(1, length))
                    assert each.try_claim([key(n)]) == {key(n)}
                    each.release([key(n)])
                    each.put_many([item(500 + n % 500, length)])
                    assert each.get(key(500 + n % 500)) == chunk(500 + n % 500, length)
                assert used(path) <= SMALL + 2 * SMALL // 4
                assert cache.verify()[1] == 0
                assert not list(path.rglob("documents/*.tmp"))
                if n % 10 == 0 or code == 0:
                    cache.clear(force=True)
                    other.refresh()
                    assert used(path) < 8 * KiB
            if code == 0:
                break
    record_property("figure", f"N = 1..{n - 1}")
    assert n > 200


@pytest.mark.row("C4")
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE])
def test_every_system_call_of_an_ephemeral_cache_fails_once(tmp_path: Path, code: int) -> None:
    """It writes again, and its files, which nobody else can remove, take up no more than it tells."""
    for n in itertools.count(1):
        disk, clock = FailAt(n, code), FakeClock()
        with ChunkCache.ephemeral(tmp_path, size=SMALL, segment=SMALL // 4, ops=disk, clock=clock) as cache:
            scenario(cache)
            if not disk.tripped:
                break
            clock.advance(61)  # a disk that was full limits the plan for a minute
            cache.put_many([item(number, 10_000) for number in range(100, 130)])
            assert cache.get(key(129)) == chunk(129, 10_000)
            assert len(nameless(tmp_path)) == cache.stats().segments and cache.stats().bytes <= SMALL
    assert n > 50


def nameless(directory: Path) -> list[str]:
    """The files that this process has open below `directory` and that have no name."""
    opened = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    targets = [os.readlink(file) for file in opened if os.path.lexists(file)]
    return [file for file in targets if file.startswith(str(directory)) and file.endswith("(deleted)")]


@pytest.mark.row("C1")
@pytest.mark.parametrize("secret", [None, b"0123456789abcdef"], ids=["plain", "encrypted"])
def test_killed_at_every_system_call_of_the_first_opening(secret: bytes | None, tmp_path: Path) -> None:
    """Whoever opens it next has a cache of the same key, and nothing is left of who died."""
    for n in itertools.count(1):
        path = tmp_path / str(n)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                ChunkCache.open(path, size=SMALL, ops=DiesAt(n), secret=secret).require_key()
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        with ChunkCache.open(path, size=SMALL, secret=secret).require_key():
            assert sorted(file.name for file in (path / "v1").iterdir()) == ["documents", "key", "locks", "segments"]
            assert not list(path.rglob("*.tmp"))
        if code == 0:
            break
    assert n > 20
