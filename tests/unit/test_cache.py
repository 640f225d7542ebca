"""The parts of the node's cache: files and records, two processes' views of them, rotation, permissions."""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.disk import RETRY_WRITES, DiskOps, Handle, WriteGate, read_all, write_all
from ckptfs.engine.seal import Seal
from ckptfs.engine.segments import RECORD, SEAL, checksum
from ckptfs.errors import CacheError, UsageError
from ckptfs.settings import Limits
from tests.support.cache_load import chunk, item, key
from tests.support.disk_faults import FakeClock, Refusing

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


def segment_files(path: Path, suffix: str = ".seg") -> list[Path]:
    return sorted((path / "v1" / "segments").glob(f"*{suffix}"))


# -- files -------------------------------------------------------------------------------------------------------------


def test_layout_modes_and_records(path: Path, one: ChunkCache) -> None:
    one.put_many([item(1, 100), item(2, 200)])
    one.put_document("d", b"x")
    data, index = segment_files(path)[0], segment_files(path, ".idx")[0]
    assert data.read_bytes() == chunk(1, 100) + chunk(2, 200)
    assert list(RECORD.iter_unpack(index.read_bytes())) == [
        (key(1), 0, 100, checksum(key(1), chunk(1, 100))),
        (key(2), 100, 200, checksum(key(2), chunk(2, 200))),
    ]
    for found in (path, *path.rglob("*")):
        assert stat.S_IMODE(found.stat().st_mode) == (0o700 if found.is_dir() else 0o600)


def test_a_cache_outlives_its_process(path: Path) -> None:
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.put_many([item(n, 50 * KiB) for n in range(100)])
        cache.put_document("d", b"document")
    with ChunkCache.open(path, size=SIZE) as cache:
        assert all(cache.get(key(n)) == chunk(n, 50 * KiB) for n in range(100))
        assert cache.get_document("d") == b"document"


def test_the_same_chunk_is_written_once(path: Path, one: ChunkCache) -> None:
    one.put_many([item(1, 100)])
    one.put_many([item(1, 100), item(2, 100)])
    assert segment_files(path)[0].stat().st_size == 200


def test_a_full_segment_is_sealed_and_an_unfinished_one_is_taken_over(path: Path) -> None:
    for start in range(0, 60, 8):
        with ChunkCache.open(path, size=SIZE) as cache:
            cache.put_many([item(n, 64 * KiB) for n in range(start, start + 8)])
    sizes = [file.stat().st_size for file in segment_files(path)]
    assert sizes == [2 * MiB, 2 * MiB]
    assert [file.read_bytes().endswith(SEAL) for file in segment_files(path, ".idx")] == [True, False]


def test_an_unfinished_segment_with_little_room_is_sealed(path: Path) -> None:
    for start in (0, 30, 31):
        with ChunkCache.open(path, size=SIZE) as cache:
            cache.put_many([item(n, 64 * KiB) for n in range(start, start + 1 + 29 * (start == 0))])
    assert [file.stat().st_size // (64 * KiB) for file in segment_files(path)] == [30, 2]
    assert segment_files(path, ".idx")[0].read_bytes().endswith(SEAL)


def test_a_segment_that_lost_its_tail_is_not_continued(path: Path) -> None:
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.put_many([item(n, 1000) for n in range(10)])
    os.truncate(segment_files(path)[0], 5500)
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.put_many([item(n, 1000) for n in range(10, 20)])
        assert [n for n in range(20) if cache.get(key(n)) == chunk(n, 1000)] == [*range(5), *range(10, 20)]
    assert len(segment_files(path)) == 2


def test_half_a_record_is_written_over(path: Path) -> None:
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.put_many([item(1, 1000)])
    with segment_files(path, ".idx")[0].open("ab") as index:
        index.write(b"half of a record")
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.put_many([item(2, 1000)])
    with ChunkCache.open(path, size=SIZE) as cache:
        assert cache.get(key(1)) == chunk(1, 1000) and cache.get(key(2)) == chunk(2, 1000)


def test_a_segment_smaller_than_configured_when_the_cache_is_small(path: Path) -> None:
    with ChunkCache.open(path, size=1 * MiB) as cache:
        for number in range(40):
            cache.put_many([item(number, 100 * KiB)])
        assert cache.stats().bytes <= 1 * MiB
        assert cache.get(key(39)) == chunk(39, 100 * KiB)


def test_more_segments_than_open_files(path: Path) -> None:
    with ChunkCache.open(path, size=SIZE, segment=4 * KiB) as cache:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(300):
            cache.put_many([item(number, 3 * KiB)])
        for number in (*range(300), *range(300)):
            assert cache.get(key(number)) == chunk(number, 3 * KiB)
        assert cache.stats().segments == 300
        assert len(os.listdir("/proc/self/fd")) - before <= 140


class Frugal(DiskOps):
    """Refuses to read more at once than a chunk or a piece of an index may have."""

    @staticmethod
    def pread(fd: int, length: int, offset: int) -> bytes:
        assert length <= 64 * MiB
        return os.pread(fd, length, offset)


def test_a_record_that_claims_too_much_is_not_read(path: Path) -> None:
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.put_many([item(1, 1000)])
    with segment_files(path, ".idx")[0].open("ab") as index:
        index.write(RECORD.pack(key(2), 0, 0xFFFF_FFFF, 0) + RECORD.pack(key(3), 0xFFFF_FFFF, 10, 0))
        index.write(RECORD.pack(key(4), 0, 0, checksum(key(4), b"")) + bytes(RECORD.size))
    with ChunkCache.open(path, size=SIZE, ops=Frugal()) as cache:
        assert [cache.get(key(n)) for n in (2, 3, 4)] == [None] * 3
        assert cache.get(bytes(32)) is None and cache.get(key(1)) == chunk(1, 1000)


@pytest.mark.parametrize(("length", "kept"), [(5000, True), (5001, False)])
def test_the_largest_chunk(path: Path, length: int, kept: bool) -> None:
    with ChunkCache.open(path, size=SIZE, limits=Limits(chunk_bytes=5000)) as cache:
        cache.put_many([item(1, length)])
        assert cache.contains(key(1)) is kept


def test_a_record_of_another_chunk_is_not_believed(path: Path) -> None:
    """The key is part of the check: right bytes under a wrong name are as wrong as wrong bytes."""
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.put_many([item(1, 1000)])
    index = segment_files(path, ".idx")[0]
    index.write_bytes(key(2) + index.read_bytes()[32:])
    with ChunkCache.open(path, size=SIZE) as cache:
        assert cache.get(key(2)) is None
    assert index.read_bytes() == bytes(RECORD.size)


def test_bytes_that_change_before_the_first_read_are_noticed(path: Path, one: ChunkCache) -> None:
    one.put_many([item(n, 1000) for n in range(1, 5)])
    with segment_files(path)[0].open("r+b") as data:
        data.write(b"\0" * 2500)
    assert one.get(key(1)) is None
    assert not one.read_into(key(2), 600, memoryview(bytearray(100)))
    assert not one.read_into(key(3), 0, memoryview(bytearray(1000)))
    assert one.read_into(key(4), 0, memoryview(bytearray(1000)))


def test_a_document_under_a_wrong_name_is_not_believed(path: Path, one: ChunkCache) -> None:
    one.put_document("a", b"of a")
    file_of_a = next((path / "v1/documents").iterdir())
    one.put_document("b", b"of b")
    file_of_b = next(file for file in (path / "v1/documents").iterdir() if file != file_of_a)
    file_of_a.replace(file_of_b)
    assert one.get_document("b") is None and not file_of_b.exists()


def test_when_everything_was_used_the_oldest_half_goes(path: Path, one: ChunkCache) -> None:
    numbers = range(150)
    one.put_many([item(n, 100 * KiB) for n in numbers])
    assert all(one.get(key(n)) for n in numbers if one.contains(key(n)))
    one.put_many([item(n, 100 * KiB) for n in range(150, 250)])
    assert all(one.get(key(n)) == chunk(n, 100 * KiB) for n in range(200, 250))
    assert one.stats().bytes <= SIZE
    assert max(file.stat().st_size for file in segment_files(path)) <= SIZE // 8


def test_bytes_that_a_record_may_name_are_never_written_again(path: Path, one: ChunkCache) -> None:
    """The write of a record fails after it took effect; another process has read and checked the chunk since."""

    class Liar(DiskOps):
        lie = False

        def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:  # type: ignore[override]
            count = os.pwritev(fd, buffers, offset)
            if self.lie and count == RECORD.size:
                raise OSError(errno.EIO, "Input/output error")
            return count

    liar, clock = Liar(), FakeClock()
    with ChunkCache.open(path, size=SIZE, ops=liar, clock=clock) as cache:
        cache.put_many([item(1, 1000)])
        liar.lie = True
        cache.put_many([item(2, 1000)])
        liar.lie = False
        one.refresh()
        assert one.get(key(2)) == chunk(2, 1000)
        clock.advance(31)
        cache.put_many([item(3, 1000)])
        assert one.get(key(2)) == chunk(2, 1000)
        assert cache.get(key(2)) == chunk(2, 1000) and cache.get(key(3)) == chunk(3, 1000)


def test_data_written_in_part_is_given_back(path: Path) -> None:
    disk = Refusing("pwritev")
    with ChunkCache.open(path, size=SIZE, ops=disk) as cache:
        cache.put_many([item(1, 1000)])
        disk.code = errno.EIO
        cache.put_many([item(2, 1000)])
    assert [file.stat().st_size for file in segment_files(path)] == [1000]


def test_verify_drops_what_is_damaged(path: Path) -> None:
    with ChunkCache.open(path, size=SIZE) as cache:
        for start in range(0, 64, 32):  # two segments
            cache.put_many([item(n, 64 * KiB) for n in range(start, start + 32)])
        cache.put_document("good", b"x")
        cache.put_document("bad", b"x")
    first, second = segment_files(path)
    os.truncate(first, 0)
    with second.open("r+b") as data:
        data.write(b"!!!!")
    bad_document = max((path / "v1/documents").iterdir(), key=lambda p: p.read_bytes().find(b"bad"))
    os.truncate(bad_document, 10)
    with ChunkCache.open(path, size=SIZE) as cache:
        assert cache.verify() == (66, 34)
        assert cache.stats().chunks == 31 and cache.get_document("good") == b"x"
    assert segment_files(path) == [second] and not bad_document.exists()


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
        clock.advance(0.01)
        assert other.contains(key(1))
        one.put_many([item(2, 100)])
        assert other.get(key(2)) is None
        clock.advance(0.01)
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
    assert not other.wait_for(key(1), 0.02)
    one.put_many([item(1, 100)])
    assert other.wait_for(key(1), 1)
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
        assert cache.stats().read_only and cache.stats().chunks == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_segments_that_vanish_are_misses(path: Path) -> None:
    with ChunkCache.open(path, size=SIZE, segment=100 * KiB) as cache:
        cache.put_many([item(n, 40 * KiB) for n in range(10)])
    clock = FakeClock()
    with ChunkCache.open(path, size=SIZE, clock=clock) as cache:
        first, second, *_ = segment_files(path)
        assert cache.get(key(0)) is not None
        first.unlink()
        assert cache.get(key(0)) is not None  # held open
        clock.advance(6)
        cache.get(key(0))  # noted as used: it is not there any more
        assert cache.get(key(0)) is None and not cache.contains(key(1))
        second.unlink()
        assert cache.get(key(2)) is None and not cache.contains(key(3))
        assert cache.get(key(4)) == chunk(4, 40 * KiB)


# -- disk --------------------------------------------------------------------------------------------------------------


def test_short_writes_are_continued(tmp_path: Path) -> None:
    class Drip(DiskOps):
        @staticmethod
        def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:  # type: ignore[override]
            return os.pwrite(fd, buffers[0][:7], offset)

    ops = Drip()
    file = Handle(ops, str(tmp_path / "f"), os.O_RDWR | os.O_CREAT)
    write_all(ops, file.fd, [b"0123456789", b"", bytearray(b"abc"), memoryview(b"defghijkl")], 3)
    assert read_all(ops, file.fd, 0, 100) == b"\0\0\x000123456789abcdefghijkl"
    assert read_all(ops, file.fd, 5, 4) == b"2345"


def test_many_buffers_are_one_write_after_another(tmp_path: Path) -> None:
    ops = DiskOps()
    file = Handle(ops, str(tmp_path / "f"), os.O_RDWR | os.O_CREAT)
    write_all(ops, file.fd, [b"ab"] * 3000, 0)
    assert read_all(ops, file.fd, 0, 1 << 20) == b"ab" * 3000


def test_a_handle_closes_with_its_last_user(tmp_path: Path) -> None:
    handle = Handle(DiskOps(), str(tmp_path / "f"), os.O_RDWR | os.O_CREAT)
    fd, second = handle.fd, handle
    del handle
    os.fstat(fd)
    del second
    with pytest.raises(OSError):
        os.fstat(fd)


def test_the_gate_shuts_and_opens(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    gate = WriteGate("/c", clock)
    gate.succeeded()
    assert gate.may_write() and not gate.shut
    for _ in range(3):
        gate.failed(OSError(28, "No space left on device"))
    assert gate.shut and not gate.may_write()
    clock.advance(RETRY_WRITES)
    assert gate.may_write() and gate.shut
    clock.advance(-1e8)  # the clock was set
    assert gate.may_write()
    gate.succeeded()
    assert gate.may_write() and not gate.shut
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "free some space" in caplog.text and "again" in caplog.text


def test_another_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="Not a directory") as caught:
        ChunkCache.open(tmp_path / "file" / "cache", size=SIZE)
    assert "--cache-dir" in caught.value.hint
    with pytest.raises(CacheError, match="is not a directory"):
        ChunkCache.open(tmp_path / "file", size=SIZE)


def test_nothing_is_kept_with_size_zero(tmp_path: Path) -> None:
    with ChunkCache.ephemeral(tmp_path, size=0) as cache:
        cache.put_many([item(1, 10)])
        cache.put_document("d", b"x")
        assert cache.get(key(1)) is None and cache.get_document("d") is None
        assert cache.stats().bytes == 0


class NoTmpfile(DiskOps):
    """A file system without O_TMPFILE."""

    @staticmethod
    def open(path: str, flags: int, mode: int) -> int:  # type: ignore[override]
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return os.open(path, flags, mode)


@pytest.mark.parametrize("ops", [DiskOps(), NoTmpfile()])
def test_an_ephemeral_cache_has_no_names(tmp_path: Path, ops: DiskOps) -> None:
    with ChunkCache.ephemeral(tmp_path, size=SIZE, ops=ops) as cache:
        cache.put_many([item(n, 100 * KiB) for n in range(100)])
        cache.put_document("d", b"x")
        assert cache.get(key(99)) == chunk(99, 100 * KiB) and cache.stats().segments > 3
        assert list(tmp_path.iterdir()) == []


# -- encryption --------------------------------------------------------------------------------------------------------


def test_only_ciphertext_is_on_disk(path: Path) -> None:
    canary = b"the password is swordfish"
    with ChunkCache.open(path, size=SIZE, secret=b"a" * 16) as cache:
        cache.put_many([(key(n), canary * 1000) for n in range(10)])
        cache.put_document("manifest/host/repo:tag", canary)
        assert cache.get(key(1)) == canary * 1000 and cache.get_document("manifest/host/repo:tag") == canary
    on_disk = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    assert len(on_disk) > len(canary) * 10_000
    for secret in (canary, b"repo:tag", key(1), b"a" * 16):
        assert secret not in on_disk


def test_another_secret_sees_nothing_and_breaks_nothing(path: Path) -> None:
    with (
        ChunkCache.open(path, size=SIZE, secret=b"a" * 16) as first,
        ChunkCache.open(path, size=SIZE, secret=b"b" * 16) as second,
        ChunkCache.open(path, size=SIZE) as plain,
    ):
        first.put_many([item(1, 1000)])
        first.put_document("d", b"x")
        for other in (second, plain):
            other.refresh()
            assert other.get(key(1)) is None and other.get_document("d") is None
            other.put_many([item(1, 2000)])
            assert other.get(key(1)) == chunk(1, 2000)
        first.refresh()
        assert first.get(key(1)) == chunk(1, 1000) and first.get_document("d") == b"x"


def test_a_secret_that_is_too_short(path: Path) -> None:
    with pytest.raises(UsageError, match="15 bytes"):
        ChunkCache.open(path, size=SIZE, secret=b"a" * 15)


def test_ciphertext_under_another_name_or_changed_is_nothing() -> None:
    seal = Seal(b"a" * 16)
    sealed = seal.encrypt(b"n" * 32, b"data")
    assert seal.decrypt(b"n" * 32, sealed) == b"data"
    assert seal.decrypt(b"m" * 32, sealed) is None
    assert seal.decrypt(b"n" * 32, sealed[:-1] + bytes([sealed[-1] ^ 1])) is None
    assert seal.decrypt(b"n" * 32, b"short") is None
