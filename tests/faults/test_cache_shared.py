"""The cache between processes, under eviction, with strangers and clocks, and what it gives away: C5-C8, S3, S6."""

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
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptfs.engine.cache import ChunkCache
from ckptfs.errors import CacheError
from tests.support.cache_load import ROOT, chunk, item, key, right, start, used
from tests.support.disk_faults import FakeClock
from tests.support.tools import require

KiB, MiB = 1024, 1024 * 1024
SIZE = 16 * MiB

Figure = Callable[[str, object], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


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
        highest = max(highest, used(path))
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
    highest = hits = 0
    with ChunkCache.open(path, size=quota) as cache:
        for step, number in enumerate(trace):
            data = cache.get(key(number))
            if data is None:
                cache.put_many([item(number, length)])
            else:
                hits += 1
                assert data[:32] == chunk(number, 32)
            if step % 500 == 0:
                highest = max(highest, used(path))
    ratio = hits / len(trace) / ideal_lru(trace, count // 10)
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
    require(root=True)  # to give files away
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
def test_an_unsafe_directory_is_refused(path: Path, spoil: Callable[[Path], None], record_property: Figure) -> None:
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.put_many([item(1, 1000)])
    spoil(path)
    with pytest.raises(CacheError) as caught:
        ChunkCache.open(path, size=SIZE)
    assert caught.value.exit_code == 8 and "\n" not in str(caught.value)
    command = shlex.split(caught.value.hint.removeprefix("run: ").partition(", or")[0])
    subprocess.run(command, check=True)  # the advice is right
    ChunkCache.open(path, size=SIZE).close()
    record_property("figure", f"{spoil.__name__.strip('_').replace('_', ' ')}: 8")


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
