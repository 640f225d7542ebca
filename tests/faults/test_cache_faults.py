"""The cache when processes are killed, disks fill, files are torn, clocks jump and strangers look in: C1-C8, S3, S6."""

import errno
import itertools
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.disk import DiskOps
from ckptfs.errors import CacheError
from tests.support.cache_load import ROOT, chunk, item, key, start
from tests.support.disk_faults import FailAt, FakeClock, Refusing

KiB, MiB = 1024, 1024 * 1024
SIZE = 16 * MiB

Figure = Callable[[str, object], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def used(path: Path) -> int:
    return sum(file.lstat().st_blocks * 512 for file in path.rglob("*") if file.is_file())


def right(cache: ChunkCache, numbers: range, length: int) -> list[int]:
    """The numbers of the chunks that are there; fails if one has wrong bytes."""
    found = []
    for number in numbers:
        data = cache.get(key(number))
        if data is not None:
            assert data == chunk(number, length), f"wrong bytes in chunk {number}"
            found.append(number)
    return found


# -- C1, C2: what a crash leaves ---------------------------------------------------------------------------------------


@pytest.mark.row("C1")
def test_killed_while_filling(path: Path, record_property: Figure) -> None:
    length, finished, reused = 40_000, 0, 0
    rng = random.Random(1)
    for _ in range(20):
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
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=755", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def warnings(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelname == "WARNING" for record in caplog.records)


@pytest.mark.row("C3")
def test_a_disk_smaller_than_the_cache(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ChunkCache.open(small_disk / "cache", size=256 * MiB) as cache:
        for number in range(1000):
            cache.put_many([item(number, 64 * KiB)])
        kept = right(cache, range(1000), 64 * KiB)
        assert 999 in kept and len(kept) * 64 * KiB >= 12 * MiB
        assert not cache.stats().read_only and warnings(caplog) == 0


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
        assert cache.stats().read_only and warnings(caplog) == 1
        (small_disk / "other").unlink()
        cache.put_many([item(100, 64 * KiB)])
        assert not cache.contains(key(100))
        clock.advance(30)
        cache.put_many([item(101, 64 * KiB)])
        assert cache.get(key(101)) == chunk(101, 64 * KiB)
        assert not cache.stats().read_only and warnings(caplog) == 2
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
        assert cache.stats().read_only and warnings(caplog) == 1
        with pytest.raises(CacheError):
            cache.clear(force=True)


@pytest.mark.row("C3")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG])
def test_writes_that_fail(path: Path, code: int, caplog: pytest.LogCaptureFixture) -> None:
    disk, clock = Refusing("pwritev"), FakeClock()
    with ChunkCache.open(path, size=SIZE, ops=disk, clock=clock) as cache:
        cache.put_many([item(number, 64 * KiB) for number in range(60)])
        disk.code = code
        for number in range(60, 80):
            cache.put_many([item(number, 64 * KiB), item(number + 100, 64 * KiB)])
        assert cache.stats().read_only and warnings(caplog) == 1
        kept = right(cache, range(200), 64 * KiB)
        assert max(kept) == 59
        assert len(kept) == 60 or code in (errno.ENOSPC, errno.EDQUOT)  # then the oldest segment went, in vain
        disk.code = None
        clock.advance(29)
        cache.put_many([item(80, 64 * KiB)])
        assert cache.stats().read_only
        clock.advance(2)
        cache.put_many([item(81, 64 * KiB)])
        assert not cache.stats().read_only and warnings(caplog) == 2
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
        assert not cache.stats().read_only and warnings(caplog) == 0


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
    print(found, cache.stats().read_only)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 1, 2] True\n"
    assert "File too large" in done.stderr and len(done.stderr.splitlines()) == 1


SMALL = 256 * KiB  # four segments of six chunks


def scenario(path: Path, disk: FailAt) -> None:
    """What a mount and the cache command do, in a cache small enough to evict; wrong bytes fail."""
    length, numbers = 10_000, range(36)
    with ChunkCache.open(path, size=SMALL, segment=SMALL // 4, ops=disk, clock=FakeClock()) as cache:
        for number in range(0, 36, 3):
            mine = cache.try_claim([key(number)])
            cache.put_many([item(n, length) for n in range(number, number + 3)])
            cache.release(mine)
            right(cache, range(0, number, 12), length)
        assert cache.wait_for(key(60), 0) in (True, False)
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
        with suppress(CacheError):
            scenario(path, disk)
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


# -- C5, C6: several processes, eviction -------------------------------------------------------------------------------


@pytest.mark.row("C5")
def test_four_processes_one_killed(path: Path, tmp_path: Path, record_property: Figure) -> None:
    count, length = 600, 40_000
    log = tmp_path / "fetched"
    log.touch()
    children = [start("share", path, 64 * MiB, length, count, seed, log) for seed in range(4)]
    victim = children[0]
    assert victim.stdout is not None
    while int(victim.stdout.readline()) < 100:
        pass
    victim.kill()
    for child in children:
        child.communicate(timeout=60)
    assert [child.returncode for child in children] == [-signal.SIGKILL, 0, 0, 0]
    fetched = len(log.read_text().split())
    record_property("figure", f"fetched {fetched / count:.3f} x unique")
    assert count <= fetched <= 1.05 * count
    assert used(path) <= 64 * MiB
    with ChunkCache.open(path, size=64 * MiB) as cache:
        assert len(right(cache, range(count), length)) == count
        cache.clear()  # nobody has it open any more


@pytest.mark.row("C5")
def test_four_processes_in_a_small_cache(path: Path, tmp_path: Path) -> None:
    """They evict from each other all the time."""
    count, length, size = 400, 40_000, 8 * MiB
    log = tmp_path / "fetched"
    log.touch()
    children = [start("share", path, size, length, count, seed, log) for seed in range(4)]
    highest = 0
    while any(child.poll() is None for child in children):
        try:
            highest = max(highest, used(path))
        except FileNotFoundError:
            pass  # evicted between listing and stat
        time.sleep(0.01)
    for child in children:
        child.communicate()
    assert [child.returncode for child in children] == [0] * 4
    assert highest <= size + length


@pytest.mark.row("C5")
def test_claims_of_the_dead_are_free(path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from ckptfs.engine.cache import ChunkCache
from tests.support.cache_load import key
cache = ChunkCache.open(Path({str(path)!r}), size=16 << 20)
print(len(cache.try_claim([key(1)])), flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"1\n"
    with ChunkCache.open(path, size=SIZE) as cache:
        assert cache.try_claim([key(1)]) == set()
        child.kill()
        child.communicate()
        assert not cache.wait_for(key(1), 1)
        assert cache.try_claim([key(1)]) == {key(1)}


def zipf(count: int, skew: float, reads: int) -> list[int]:
    rng = random.Random(7)
    weights = list(itertools.accumulate(1 / (rank + 1) ** skew for rank in range(count)))
    numbers = list(range(count))
    rng.shuffle(numbers)
    return [numbers[bisect_left(weights, rng.random() * weights[-1])] for _ in range(reads)]


def ideal_lru(trace: list[int], capacity: int) -> float:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in trace:
        hits += number in held
        held[number] = None
        held.move_to_end(number)
        if len(held) > capacity:
            held.popitem(last=False)
    return hits / len(trace)


@pytest.mark.row("C6")
@pytest.mark.parametrize("skew", [0.8, 1.1])
def test_hit_rate_under_zipf(path: Path, skew: float, record_property: Figure) -> None:
    count, length = 6000, 16 * KiB
    quota = count * length // 10
    trace = zipf(count, skew, 25_000)
    highest = 0
    with ChunkCache.open(path, size=quota) as cache:
        for step, number in enumerate(trace):
            data = cache.get(key(number))
            if data is None:
                cache.put_many([item(number, length)])
            else:
                assert data[:32] == chunk(number, 32)
            if step % 500 == 0:
                highest = max(highest, used(path))
        stats = cache.stats()
    ratio = stats.hits / len(trace) / ideal_lru(trace, count // 10)
    record_property("figure", f"skew {skew}: {ratio:.2f} x ideal LRU, {highest / quota:.2f} x quota")
    assert ratio >= 0.9
    assert highest <= quota


@pytest.mark.row("C6")
def test_an_open_chunk_survives_the_unlink(path: Path) -> None:
    with ChunkCache.open(path, size=SIZE) as reader, ChunkCache.open(path, size=SIZE) as evictor:
        reader.put_many([item(1, 100 * KiB)])
        assert reader.get(key(1)) is not None
        evictor.clear(force=True)
        assert reader.get(key(1)) == chunk(1, 100 * KiB)
        reader.refresh()
        assert reader.get(key(1)) is None


# -- C7, C8: strangers and clocks --------------------------------------------------------------------------------------


@pytest.mark.row("C7")
def test_what_is_not_ours_is_left_alone(path: Path) -> None:
    junk = {
        "README": b"junk",
        "v0/segments/00000001-00000000.seg": b"old",
        "v2/new": b"newer",
        "v1/note": b"junk",
        "v1/segments/note.txt": b"junk",
        "v1/segments/junk.seg": b"not a name of ours",
        "v1/documents/note": b"junk",
        "v1/locks/note": b"junk",
    }
    for directory in ("v0/segments", "v1/segments", "v1/documents", "v1/locks", "v2"):
        (path / directory).mkdir(parents=True)
    for directory in (path, *path.rglob("*")):
        directory.chmod(0o700)
    for name, content in junk.items():
        (path / name).write_bytes(content)
        (path / name).chmod(0o600)
    with ChunkCache.open(path, size=1 * MiB) as cache:
        for number in range(40):
            cache.put_many([item(number, 100 * KiB)])
        assert cache.get(key(39)) == chunk(39, 100 * KiB)
        cache.verify()
        cache.clear()
    assert {name: (path / name).read_bytes() for name in junk} == junk


@pytest.mark.row("C8")
def test_clocks_that_jump(path: Path) -> None:
    clock, year = FakeClock(), 365 * 86400.0
    length = 40_000
    with ChunkCache.open(path, size=4 * MiB, clock=clock) as cache, ChunkCache.open(path, size=4 * MiB) as other:
        for number in range(400):
            clock.advance((year, -year, -year, year)[number % 4])
            for file in itertools.islice((path / "v1/segments").iterdir(), 2):
                stamp = time.time() + (year, -year)[number % 2]
                os.utime(file, (stamp, stamp))
            cache.put_many([item(number, length)])
            assert cache.get(key(number)) == chunk(number, length)
            other.refresh()
            assert other.get(key(number)) == chunk(number, length)
            if number % 20 == 0:
                right(cache, range(number), length)
            assert used(path) <= 4 * MiB
        other.put_many([item(1000, length)])
        clock.advance(-3 * year)
        assert cache.contains(key(1000))


# -- S3, S6: what is in it is secret -----------------------------------------------------------------------------------


def _loose_directory(path: Path) -> None:
    path.chmod(0o755)


def _loose_file(path: Path) -> None:
    next(path.rglob("*.seg")).chmod(0o644)


def _symlinked(path: Path) -> None:
    path.rename(path.parent / "real")
    path.symlink_to(path.parent / "real")


def _symlinked_inside(path: Path) -> None:
    (path / "v1/documents").rename(path.parent / "elsewhere")
    (path / "v1/documents").symlink_to(path.parent / "elsewhere")


def _another_owner(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving files away needs root")
    os.chown(path / "v1/segments", 65534, 65534)


def _second_link(path: Path) -> None:
    os.link(next(path.rglob("*.seg")), path.parent / "link")


def _open_parent(path: Path) -> None:
    path.parent.chmod(0o777)


@pytest.mark.row("S3")
@pytest.mark.parametrize(
    "spoil",
    [_loose_directory, _loose_file, _symlinked, _symlinked_inside, _another_owner, _second_link, _open_parent],
)
def test_an_unsafe_directory_is_refused(path: Path, spoil: Callable[[Path], None]) -> None:
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.put_many([item(1, 1000)])
    spoil(path)
    with pytest.raises(CacheError) as caught:
        ChunkCache.open(path, size=SIZE)
    assert caught.value.exit_code == 8 and "\n" not in str(caught.value)
    command = shlex.split(caught.value.hint.removeprefix("run: ").partition(", or")[0])
    subprocess.run(command, check=True)  # the advice is right
    ChunkCache.open(path, size=SIZE).close()


@pytest.mark.row("S3")
def test_a_parent_like_tmp_is_fine(path: Path) -> None:
    path.parent.chmod(0o1777)
    ChunkCache.open(path, size=SIZE).close()


@pytest.mark.row("S6")
def test_nothing_stays_after_clear_or_an_ephemeral_mount(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    canary = b"canary-5d1c2e"
    with ChunkCache.open(tmp_path / "cache", size=SIZE) as cache, ChunkCache.ephemeral(tmp_path, size=SIZE) as secret:
        for kept in (cache, secret):
            kept.put_many([(key(n), canary * 10_000) for n in range(100)])
            kept.put_document("d", canary)
        cache.clear()
        found = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert {file.parent.name for file in found} == {"locks"} and all(file.stat().st_size == 0 for file in found)
        assert secret.get(key(99)) == canary * 10_000
    assert canary.decode() not in caplog.text


@pytest.mark.row("S6")
def test_an_ephemeral_cache_dies_with_its_process(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from ckptfs.engine.cache import ChunkCache
from tests.support.cache_load import item
cache = ChunkCache.ephemeral(Path({str(tmp_path)!r}), size=16 << 20)
cache.put_many([item(n, 100_000) for n in range(50)])
cache.put_document("d", b"x")
print(len(os.listdir({str(tmp_path)!r})), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL and done.stdout == b"0\n"
    assert list(tmp_path.iterdir()) == []
