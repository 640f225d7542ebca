"""Files and records of the node's cache, and the largest and smallest of everything."""

import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.disk import DiskOps
from ckptfs.engine.segments import RECORD, SEAL, checksum
from ckptfs.settings import Limits
from tests.support.cache_load import chunk, item, key, segment_files
from tests.support.disk_faults import FakeClock, FaultyDisk, Refusing

KiB, MiB = 1024, 1024 * 1024
SIZE = 16 * MiB  # segments of 2 MiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def one(path: Path) -> Iterator[ChunkCache]:
    with ChunkCache.open(path, size=SIZE) as cache:
        yield cache


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


def test_an_unfinished_segment_that_a_full_disk_does_not_let_seal(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.put_many([item(n, 64 * KiB) for n in range(30)])
    writes = iter([errno.ENOSPC])
    disk = FaultyDisk(lambda name: next(writes, None) if name == "pwritev" else None)
    with ChunkCache.open(path, size=SIZE, ops=disk) as cache:
        cache.put_many([item(30, 64 * KiB)])
        assert next(writes, None) is None and caplog.text == ""
        assert cache.get(key(0)) == chunk(0, 64 * KiB) and cache.get(key(30)) == chunk(30, 64 * KiB)


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


def test_a_large_segment_gets_its_blocks_ahead_and_gives_back_those_it_does_not_need(path: Path) -> None:
    with ChunkCache.open(path, size=1024 * MiB) as cache:
        cache.put_many([item(number, 256 * KiB) for number in range(8)])
        (data,) = segment_files(path)
        assert data.stat().st_blocks * 512 < 3 * MiB, "nothing ahead for what may stay small"
        for number in range(8, 40):
            cache.put_many([item(number, 256 * KiB)])
        assert data.stat().st_size == 40 * 256 * KiB
        assert data.stat().st_blocks * 512 >= 14 * MiB
    assert data.stat().st_size == 40 * 256 * KiB
    assert data.stat().st_blocks * 512 < 11 * MiB
    with ChunkCache.open(path, size=1024 * MiB) as cache:
        assert all(cache.get(key(number)) == chunk(number, 256 * KiB) for number in range(40))


def test_blocks_that_cannot_be_had_ahead_are_not_missed(path: Path) -> None:
    disk = Refusing("allocate")
    disk.code = errno.EOPNOTSUPP
    with ChunkCache.open(path, size=1024 * MiB, ops=disk) as cache:
        for number in range(60):
            cache.put_many([item(number, 256 * KiB)])
        assert all(cache.contains(key(number)) for number in range(60))


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


def test_many_chunks_are_dropped_with_one_look(path: Path) -> None:
    keys = [key(number) for number in range(100_000)]
    gone = keys[80_000:]
    with ChunkCache.open(path, size=SIZE) as cache:
        cache.put_many([(each, b"x") for each in keys])
        began = time.monotonic()
        cache.drop(*gone)
        assert time.monotonic() - began < 4.0
        assert cache.contains(keys[0]) and not any(map(cache.contains, gone))
    with ChunkCache.open(path, size=SIZE) as cache:
        assert cache.stats().chunks == len(keys) - len(gone)


def test_chunks_that_are_dropped_one_by_one_hold_nobody_up(path: Path) -> None:
    """A stream does so, of which an earlier one has left other bytes; readers wait meanwhile."""
    keys = [key(number) for number in range(100_000)]
    with ChunkCache.open(path, size=SIZE) as cache, ChunkCache.open(path, size=SIZE) as other:
        cache.put_many([(each, b"x") for each in keys])
        other.put_many([(keys[0], b"y")])
        cache.refresh()
        began = time.monotonic()
        for each in keys[:200]:
            cache.drop(each)
        assert time.monotonic() - began < 4.0
        assert not any(map(cache.contains, keys[:200])) and cache.contains(keys[200])
    with ChunkCache.open(path, size=SIZE) as cache:
        assert cache.stats().chunks == len(keys) - 200


def test_a_document_too_large_for_one_process_is_left_to_others(path: Path, one: ChunkCache) -> None:
    document = chunk(1, 2 * MiB)
    one.put_document("table", document)
    with ChunkCache.open(path, size=4 * MiB) as smaller:
        assert smaller.get_document("table") is None
        assert smaller.verify() == (0, 0)
    assert one.get_document("table") == document and one.verify() == (1, 0)
