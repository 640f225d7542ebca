"""Several frames with one call: the same bytes as frame after frame, and the same words for what is wrong."""

import random
import struct
import threading

import pytest
import zstandard

from ckptfs.errors import IntegrityError
from ckptfs.layers import compression, libzstd
from ckptfs.layers.compression import unzstd_chunk
from ckptfs.settings import KiB, Limits

RANDOM = random.Random(4)
CELLS = [
    RANDOM.randbytes(16 * KiB),
    bytes(16 * KiB),
    b" ".join(RANDOM.randbytes(2).hex().encode() for _ in range(4000))[: 16 * KiB],
    RANDOM.randbytes(100),
]
PLAIN = b"".join(CELLS)
PACKED = b"".join(zstandard.ZstdCompressor().compress(cell) for cell in CELLS)
LARGE = struct.pack("<I", 0xFD2FB528) + b"\xe0" + struct.pack("<Q", 1 << 40) + b"\x01\x00\x00"  # RFC 8878, 3.1.1


@pytest.fixture(params=["libzstd", "python-zstandard"])
def each(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With libzstd, and where there is none."""
    monkeypatch.setattr(compression, "_zstd", compression._Zstd())
    if request.param == "libzstd":
        assert libzstd.frames() is not None, "the system has no libzstd.so.1"
    else:
        monkeypatch.setattr(compression, "frames", lambda: None)
    return str(request.param)


def test_frames_after_one_another(each: str) -> None:
    assert unzstd_chunk(PACKED, len(PLAIN), Limits()) == PLAIN
    assert unzstd_chunk(memoryview(b"before" + PACKED)[6:], len(PLAIN), Limits()) == PLAIN
    assert (compression._zstd.frames is not None) == (each == "libzstd")


def test_what_follows_is_not_looked_at(each: str) -> None:
    assert unzstd_chunk(PACKED + b"x", len(PLAIN), Limits()) == PLAIN
    assert unzstd_chunk(PACKED, 20 * KiB, Limits()) == PLAIN[: 20 * KiB]


@pytest.mark.parametrize("length", [len(PLAIN) + 1, 1 << 20])
def test_too_few_bytes(each: str, length: int) -> None:
    with pytest.raises(IntegrityError, match=f"ends after {len(PLAIN)} of {length}"):
        unzstd_chunk(PACKED, length, Limits())


@pytest.mark.parametrize("data", [b"", b"x", PACKED[:-1], PACKED[:9], LARGE, PACKED + LARGE, PACKED[1:]])
def test_damaged(each: str, data: bytes) -> None:
    with pytest.raises(IntegrityError):
        unzstd_chunk(data, len(PLAIN) + 5, Limits())


def test_every_flipped_bit_is_seen_or_changes_the_bytes_but_never_their_number(each: str) -> None:
    for at in RANDOM.sample(range(len(PACKED)), 300):
        broken = bytearray(PACKED)
        broken[at] ^= 1 << RANDOM.randrange(8)
        try:
            assert len(unzstd_chunk(bytes(broken), len(PLAIN), Limits())) == len(PLAIN)
        except IntegrityError:
            pass


def test_several_threads() -> None:
    found = set()

    def work() -> None:
        for _ in range(200):
            found.add(bytes(unzstd_chunk(PACKED, len(PLAIN), Limits())))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {PLAIN}


def test_no_libzstd_and_one_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libzstd, "_OLDEST", 1 << 30)
    libzstd._library.cache_clear()
    assert libzstd.frames() is None
    monkeypatch.setattr(libzstd, "_NAME", "libckptfs-has-none.so")
    libzstd._library.cache_clear()
    assert libzstd.frames() is None
    libzstd._library.cache_clear()
