"""Two processes on one cache: what each sees of the other."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptfs.engine import directory, key_mark
from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.disk import Buffer, DiskOps
from ckptfs.errors import CacheError
from tests.support.cache_load import chunk, item, key, segment_files
from tests.support.disk_faults import FakeClock, Refusing
from tests.support.tools import wait_for

KiB, MiB = 1024, 1024 * 1024
SIZE = 16 * MiB  # segments of 2 MiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def one(path: Path) -> Iterator[ChunkCache]:
    with ChunkCache.open(path, size=SIZE) as cache:
        yield cache


@pytest.fixture
def other(path: Path, one: ChunkCache) -> Iterator[ChunkCache]:
    """A second cache on the same directory: its locks conflict with the first one's as another process's would."""
    with ChunkCache.open(path, size=SIZE) as cache:
        yield cache


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_mark, "_PATIENCE", 0.05)


# -- two processes -----------------------------------------------------------------------------------------------------


def test_what_one_appends_the_other_finds(one: ChunkCache, other: ChunkCache) -> None:
    for number in range(0, 100, 2):
        one.put_many([item(number, 100 * KiB)])
        other.put_many([item(number + 1, 100 * KiB)])
        other.refresh()
        assert other.get(key(number)) == chunk(number, 100 * KiB)
        one.refresh()
        assert one.contains(key(number + 1))
    assert one.stats().chunks == other.stats().chunks == 100


def test_a_directory_that_changes_within_a_tick_of_the_clock(path: Path, one: ChunkCache, other: ChunkCache) -> None:
    segments = path / "v1/segments"
    later = time.time() + 1000
    os.utime(segments, (later, later))
    one.refresh()
    other.put_many([item(1, 100)])
    os.utime(segments, (later, later))
    one.refresh()
    assert one.contains(key(1))


def test_misses_look_for_news_but_not_each(path: Path, one: ChunkCache) -> None:
    clock = FakeClock()
    with ChunkCache.open(path, size=SIZE, clock=clock) as other:
        one.put_many([item(1, 100)])
        assert not other.contains(key(1))
        clock.advance(0.03)
        assert other.contains(key(1))
        one.put_many([item(2, 100)])
        assert other.get(key(2)) is None
        clock.advance(0.03)
        assert other.get(key(2)) == chunk(2, 100)


def test_each_process_has_its_own_segment(path: Path, one: ChunkCache, other: ChunkCache) -> None:
    one.put_many([item(1, 100)])
    other.put_many([item(2, 100)])
    one.put_many([item(3, 100)])
    assert [file.stat().st_size for file in segment_files(path)] == [200, 100]


def test_what_one_evicts_the_other_lets_go(path: Path, one: ChunkCache, other: ChunkCache) -> None:
    one.put_many([item(n, 100 * KiB) for n in range(50)])
    other.refresh()
    assert all(other.get(key(n)) for n in range(50))
    one.prune(0)
    assert other.get(key(0)) == chunk(0, 100 * KiB)  # open readers survive
    other.refresh()
    assert other.get(key(0)) is None and other.stats().chunks == 0


def test_use_by_any_process_keeps_a_segment(path: Path, one: ChunkCache) -> None:
    for start in range(0, 160, 20):
        one.put_many([item(n, 100 * KiB) for n in range(start, start + 20)])
    for age, file in enumerate(reversed(segment_files(path))):
        os.utime(file, (1_000_000 - age, 1_000_000 - age))
        os.utime(file.with_suffix(".idx"), (1_000_000 - age, 1_000_000 - age))
    with ChunkCache.open(path, size=SIZE) as other:
        assert other.get(key(0)) is not None
    one.put_many([item(n, 100 * KiB) for n in range(160, 180)])
    one.refresh()
    assert one.contains(key(0)) and not one.contains(key(20))


def test_a_live_segment_of_another_is_never_evicted(path: Path, one: ChunkCache, other: ChunkCache) -> None:
    other.put_many([item(1000, 1000)])
    for number in range(400):
        one.put_many([item(number, 100 * KiB)])
    one.prune(0)
    other.put_many([item(1001, 1000)])
    assert other.get(key(1000)) == chunk(1000, 1000) and other.get(key(1001)) == chunk(1001, 1000)
    assert one.get(key(1000)) == chunk(1000, 1000)


def test_clear_wants_to_be_alone(path: Path, one: ChunkCache, other: ChunkCache) -> None:
    other.put_many([item(1, 1000)])
    with pytest.raises(CacheError, match="in use") as caught:
        one.clear()
    assert caught.value.exit_code == 8 and "unmount" in caught.value.hint
    assert other.get(key(1)) is not None
    one.clear(force=True)
    assert segment_files(path) == []
    other.put_many([item(2, 1000)])  # it notices that its segment has no name any more
    assert len(segment_files(path)) == 1
    one.refresh()
    assert one.get(key(2)) == chunk(2, 1000) and one.get(key(1)) is None
    other.close()
    one.clear()


def test_claims_between_processes(one: ChunkCache, other: ChunkCache) -> None:
    assert one.try_claim([key(1), key(2)]) == {key(1), key(2)}
    assert other.try_claim([key(1), key(3)]) == {key(3)}
    one.release([key(2)])
    assert other.try_claim([key(2)]) == {key(2)}
    one.close()
    assert other.try_claim([key(1)]) == {key(1)}


def test_leftovers_of_the_dead_are_removed(path: Path, one: ChunkCache) -> None:
    one.put_many([item(1, 100)])
    segments, documents = path / "v1/segments", path / "v1/documents"
    for leftover in (
        segments / "00000009-0badcafe.seg",
        segments / "00000010-0badcafe.idx",
        documents / "0123456789abcdef.tmp",
    ):
        leftover.touch(0o600)
    with ChunkCache.open(path, size=SIZE) as other:
        assert other.get(key(1)) == chunk(1, 100)
    assert len(list(segments.iterdir())) == 2 and list(documents.iterdir()) == []


def test_a_stopped_process_that_evicts_does_not_stop_others(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ChunkCache.open(path, size=SIZE) as cache, (path / "v1/locks/room").open("r+") as room:
        fcntl.flock(room, fcntl.LOCK_EX)
        for number in range(20):
            cache.put_many([item(number, 1000)])
        assert cache.stats().chunks == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_stopped_process_that_clears_is_named_to_who_opens_the_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_USERS_PATIENCE", 0.1)
    ChunkCache.open(path, size=SIZE).close()
    with (path / "v1/locks/users").open("r+") as users:
        fcntl.flock(users, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match="is being cleared") as caught:
            ChunkCache.open(path, size=SIZE)
    assert "kill it" in caught.value.hint and str(path / "v1/locks/users") in caught.value.hint
    ChunkCache.open(path, size=SIZE).close()


def test_who_opens_a_cache_waits_until_it_is_cleared(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ChunkCache.open(path, size=SIZE).close()
    with (path / "v1/locks/users").open("r+") as users:
        fcntl.flock(users, fcntl.LOCK_EX)
        monkeypatch.setattr(time, "sleep", lambda seconds: users.close())
        ChunkCache.open(path, size=SIZE).close()
        assert users.closed


def test_segments_that_vanish_are_misses(path: Path) -> None:
    with ChunkCache.open(path, size=SIZE, segment=100 * KiB) as cache:
        cache.put_many([item(n, 40 * KiB) for n in range(10)])
    clock = FakeClock()
    with ChunkCache.open(path, size=SIZE, clock=clock) as cache:
        first, second, *_ = segment_files(path)
        os.utime(first, (0, 0))
        assert cache.get(key(0)) is not None
        wait_for("noted as used", lambda: first.stat().st_mtime)
        first.unlink()
        assert cache.get(key(0)) is not None  # held open
        clock.advance(6)
        wait_for("noted as used once more: it is not there", lambda: cache.get(key(0)) is None)
        assert not cache.contains(key(1))
        second.unlink()
        assert cache.get(key(2)) is None and not cache.contains(key(3))
        assert cache.get(key(4)) == chunk(4, 40 * KiB)


# -- whose the directory is --------------------------------------------------------------------------------------------

SECRET = b"0123456789abcdef"


def keyed(path: Path, secret: bytes = SECRET) -> None:
    """What a command with --cache-key does."""
    with ChunkCache.open(path, size=SIZE, secret=secret) as cache:
        cache.require_key()
        assert cache.stats().encrypted


def test_a_cache_in_use_without_a_key_gets_none(path: Path) -> None:
    with ChunkCache.open(path, size=SIZE).require_key() as plain:
        with pytest.raises(CacheError, match="is not encrypted"):
            keyed(path)
        plain.put_many([item(1, 1000)])
        with ChunkCache.open(path, size=SIZE) as tool:
            tool.clear(force=True)
            assert not tool.stats().encrypted
        with pytest.raises(CacheError, match="is not encrypted"):
            keyed(path)
        plain.put_many([item(2, 1000)])
    with pytest.raises(CacheError, match="is not encrypted"):
        keyed(path)
    with ChunkCache.open(path, size=SIZE) as tool:
        tool.clear()
    keyed(path)
    with pytest.raises(CacheError, match="is encrypted"), ChunkCache.open(path, size=SIZE) as cache:
        cache.require_key()


def test_an_empty_cache_without_a_key_gets_one_when_nobody_uses_it(path: Path) -> None:
    with ChunkCache.open(path, size=SIZE) as plain:
        plain.require_key()
    keyed(path)
    with pytest.raises(CacheError, match="with another key"):
        keyed(path, b"fedcba9876543210")


@pytest.mark.usefixtures("impatient")
def test_a_cache_that_others_use_and_have_not_marked_gets_no_key(path: Path, one: ChunkCache) -> None:
    """An earlier ckptfs, or one whose disk was full."""
    with pytest.raises(CacheError, match="is in use") as caught:
        keyed(path)
    assert "unmount" in caught.value.hint
    one.close()
    keyed(path)


@pytest.mark.parametrize("damaged", [False, True])
def test_what_an_earlier_version_has_kept_without_a_key_is_plain(path: Path, damaged: bool) -> None:
    with ChunkCache.open(path, size=SIZE) as earlier:
        earlier.put_many([item(1, 1000)])
        if damaged:
            earlier.drop(key(1))  # its bytes stay on disk
    for _ in range(2):
        with pytest.raises(CacheError, match="is not encrypted"):
            keyed(path)
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.require_key()


def test_of_several_that_bring_a_key_at_once_all_with_the_first_ones_get_in(path: Path) -> None:
    caches = [ChunkCache.open(path, size=SIZE, secret=SECRET) for _ in range(8)]
    caches.append(ChunkCache.open(path, size=SIZE, secret=b"fedcba9876543210"))
    together = threading.Barrier(len(caches))

    def take(cache: ChunkCache) -> str:
        together.wait()
        try:
            cache.require_key()
        except CacheError as error:
            return error.message
        return "its own"

    with ThreadPoolExecutor(len(caches)) as pool:
        *same, other = pool.map(take, caches)
    for cache in caches:
        cache.close()
    assert len(set(same)) == 1 and {same[0], other} == {"its own", f"the cache {path} is encrypted with another key"}


def test_without_a_key_a_disk_that_refuses_is_read(path: Path) -> None:
    disk = Refusing("rename")
    disk.code = errno.ENOSPC
    with ChunkCache.open(path, size=SIZE, ops=disk) as cache:
        cache.require_key()
    disk.code = errno.EROFS
    with pytest.raises(CacheError), ChunkCache.open(path, size=SIZE, secret=SECRET, ops=disk) as cache:
        cache.require_key()


def test_nothing_is_written_into_another_cache_that_is_in_the_place_of_ours(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be encrypted."""
    with ChunkCache.open(path, size=SIZE).require_key() as plain:
        plain.put_many([item(1, 1000)])
        path.rename(path.with_name("elsewhere"))
        keyed(path)
        plain.put_many([item(2, 1000)])
        plain.put_document("d", chunk(3, 1000))
        plain.drop(key(1))
        assert plain.get(key(2)) is None and plain.get_document("d") is None
    assert [file.name for file in path.rglob("*") if file.suffix in (".seg", ".idx", ".doc")] == []
    assert "another directory is in its place" in caplog.text


class Meanwhile(DiskOps):
    """Something happens between the making of a document's file and its lock, once."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action: Callable[[], object] | None = action

    def flock(self, fd: int, operation: int) -> None:  # type: ignore[override]
        if operation == fcntl.LOCK_EX and self._action is not None:
            action, self._action = self._action, None
            action()
        fcntl.flock(fd, operation)


def test_a_document_whose_file_is_swept_while_it_is_written(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It looks like what the dead leave, to who opens the cache; the disk has refused nothing, so writing goes on."""
    meanwhile = Meanwhile(lambda: ChunkCache.open(path, size=SIZE).close())
    with ChunkCache.open(path, size=SIZE, ops=meanwhile) as cache:
        cache.put_document("name", b"payload")
        assert cache.get_document("name") == b"payload"
        cache.put_many([item(1, 1000)])
        assert cache.get(key(1)) == chunk(1, 1000)
    assert caplog.text == ""


class Unreadable(DiskOps):
    """One file cannot be read."""

    name = ""

    def pread(self, fd: int, length: int, offset: int) -> bytes:  # type: ignore[override]
        if self.name and os.readlink(f"/proc/self/fd/{fd}").endswith(self.name):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.pread(fd, length, offset)


def test_an_index_that_cannot_be_read_keeps_nothing_else_away(
    path: Path, other: ChunkCache, caplog: pytest.LogCaptureFixture
) -> None:
    disk, clock = Unreadable(), FakeClock()
    other.put_many([item(1, 1000)])
    with ChunkCache.open(path, size=SIZE, ops=disk, clock=clock) as cache:
        (first,) = segment_files(path, ".idx")
        disk.name = first.name
        with ChunkCache.open(path, size=SIZE) as third:
            third.put_many([item(2, 1000)])
            clock.advance(0.03)
            assert cache.get(key(2)) == chunk(2, 1000)
            cache.put_many([item(3, 1000)])
            assert cache.get(key(3)) == chunk(3, 1000) and caplog.text == ""
        disk.name = ""
        other.put_many([item(4, 1000)])
        clock.advance(0.03)
        assert all(cache.get(key(number)) == chunk(number, 1000) for number in range(1, 5))


def test_what_could_not_be_opened_for_a_moment_is_found_later(path: Path, other: ChunkCache) -> None:
    disk, clock = Refusing("open"), FakeClock()
    with ChunkCache.open(path, size=SIZE, ops=disk, clock=clock) as cache:
        other.put_many([item(1, 1000)])
        os.utime(path / "v1/segments", (1_000_000, 1_000_000))  # long ago: what is in it is known by now
        disk.code = errno.EMFILE
        clock.advance(0.03)
        assert not cache.contains(key(1))
        disk.code = None
        clock.advance(0.03)
        assert cache.get(key(1)) == chunk(1, 1000)


def test_a_segment_whose_new_writer_cannot_evict_is_left_to_others(path: Path) -> None:
    disk, clock, smaller = Refusing("unlink"), FakeClock(), SIZE * 3 // 4
    with ChunkCache.open(path, size=SIZE) as dead:
        dead.put_many([item(number, 64 * KiB) for number in range(240)])
    with ChunkCache.open(path, size=smaller, ops=disk, clock=clock) as cache:
        disk.code = errno.EIO
        cache.put_many([item(300, 64 * KiB)])
        assert not cache.contains(key(300))
        disk.code = None
        with ChunkCache.open(path, size=smaller) as next_one:
            next_one.put_many([item(301, 64 * KiB)])
        clock.advance(31)
        assert cache.get(key(301)) == chunk(301, 64 * KiB)
        cache.put_many([item(302, 64 * KiB)])
    with ChunkCache.open(path, size=smaller) as later:
        assert [later.get(key(number)) for number in (301, 302)] == [chunk(301, 64 * KiB), chunk(302, 64 * KiB)]


class Between(DiskOps):
    """Something happens when a record has been written and nobody knows of it yet, once."""

    def __init__(self) -> None:
        self.action: Callable[[], object] | None = None

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:  # type: ignore[override]
        count = os.pwritev(fd, buffers, offset)
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".idx") and self.action is not None:
            action, self.action = self.action, None
            action()
        return count


def test_a_segment_that_is_removed_while_it_is_written_holds_nothing(path: Path, other: ChunkCache) -> None:
    disk = Between()
    with ChunkCache.open(path, size=SIZE, ops=disk) as cache:

        def removed() -> None:
            other.clear(force=True)
            cache.refresh()  # another thread does so

        disk.action = removed
        for kept in (False, True):
            cache.put_many([item(1, 1000)])
            assert cache.contains(key(1)) == kept and cache.get(key(1)) == (chunk(1, 1000) if kept else None)
