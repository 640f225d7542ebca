"""Writing, handles, the write gate, caches without names, and encryption."""

import errno
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from ckptfs.engine import chunk_index
from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.disk import RETRY_WRITES, DiskOps, Handle, WriteGate, read_all, write_all
from ckptfs.engine.seal import Seal
from ckptfs.engine.segment_files import AnonymousSegments
from ckptfs.errors import CacheError, UsageError
from tests.support.cache_load import chunk, item, key, right
from tests.support.disk_faults import FakeClock

KiB, MiB = 1024, 1024 * 1024
SIZE = 16 * MiB  # segments of 2 MiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


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


def test_a_write_of_nothing_is_a_full_disk(tmp_path: Path) -> None:
    class Stuck(DiskOps):
        @staticmethod
        def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:  # type: ignore[override]
            return 0

    file = Handle(Stuck(), str(tmp_path / "f"), os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="No space"):
        write_all(Stuck(), file.fd, [b"0123456789"], 0)


def test_two_that_write_again_at_the_same_time_tell_it_once(caplog: pytest.LogCaptureFixture) -> None:
    gate = WriteGate("x", FakeClock())
    gate.failed(OSError(errno.EIO, "x"))
    with gate._lock:
        threads = [threading.Thread(target=gate.succeeded) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert caplog.text.count("writing to it again") == 1 and gate.may_write()


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
    assert gate.may_write()
    for _ in range(3):
        gate.failed(OSError(28, "No space left on device"))
    assert not gate.may_write()
    clock.advance(RETRY_WRITES)
    assert gate.may_write()
    clock.advance(-1e8)  # the clock was set
    assert gate.may_write()
    gate.succeeded()
    assert gate.may_write()
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


def test_an_evicted_segment_without_a_name_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While what was hot in it is written again readers still find it, closed, and nobody can open it any more."""

    class ReadWhileWriting(DiskOps):
        def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:  # type: ignore[override]
            for _ in range(2):  # the first time others are opened in its place
                right(cache, range(60), 100 * KiB)
            return os.pwritev(fd, buffers, offset)

    monkeypatch.setattr(chunk_index, "_OPEN_FILES", 4)
    with ChunkCache.ephemeral(tmp_path, size=4 * MiB, segment=512 * KiB, ops=ReadWhileWriting()) as cache:
        for number in range(60):
            cache.put_many([item(number, 100 * KiB)])
        assert 59 in right(cache, range(60), 100 * KiB)


def test_a_segment_without_a_name_is_there_while_its_use_is_noted(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    files, done = AnonymousSegments(tmp_path, DiskOps()), threading.Event()
    name, data, _ = files.create()
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)

    def use() -> None:
        while not done.is_set():
            files.touch(name)

    user = threading.Thread(target=use)
    user.start()
    try:
        assert all(files.open(name) is data for _ in range(300_000))
    finally:
        done.set()
        user.join()


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
