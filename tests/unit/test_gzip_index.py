"""Access points in gzip streams, and inflating from them: every alignment, every encoder's kind of block."""

import gzip
import random
import subprocess
import zlib
from collections.abc import Iterator

import pytest
from zlib_ng import zlib_ng

from ckptfs.errors import FormatError, IntegrityError
from ckptfs.layers import gzip_index
from ckptfs.layers.compression import gunzipped
from ckptfs.layers.deflate import inflate_from
from ckptfs.layers.gzip_index import PointFinder, can_find_points
from ckptfs.model.layer_index import unpack_window
from ckptfs.settings import KiB, Limits, MiB
from tests.support.tools import unavailable

LIMITS = Limits()
UNIT = 64 * KiB


@pytest.fixture(autouse=True)
def _zlib() -> None:
    if not can_find_points():
        unavailable("needs libz.so.1")


def mixed(size: int, seed: int = 1) -> bytes:
    """Like memory: zeros, noise, text that repeats from far and near."""
    rng = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        kind = rng.random()
        length = rng.randrange(1, 40 * KiB)
        if kind < 0.2:
            out += bytes(length)
        elif kind < 0.5 or not out:
            out += rng.randbytes(length)
        else:
            start = rng.randrange(max(0, len(out) - 33 * KiB), len(out))
            out += out[start : start + length]
    return bytes(out[:size])


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def fixed_codes(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, 31, 8, zlib.Z_FIXED)
    return packer.compress(data) + packer.flush()


def flushed(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    parts = [packer.compress(part) + packer.flush(zlib.Z_SYNC_FLUSH) for part in pieces(data, 5000)]
    return b"".join(parts) + packer.flush()


ENCODERS = {
    "zlib 1": lambda data: gzip.compress(data, 1),
    "zlib 9": lambda data: gzip.compress(data, 9),
    "stored": lambda data: gzip.compress(data, 0),
    "fixed codes": fixed_codes,
    "flushed": flushed,
    "zlib-ng": lambda data: zlib_ng.compress(data, wbits=31),
    "members": lambda data: b"".join(gzip.compress(part) for part in pieces(data, 100_001)),
    "tiny members": lambda data: b"".join(gzip.compress(part) for part in pieces(data, 3000)),
    "empty members": lambda data: gzip.compress(b"") + gzip.compress(data) + gzip.compress(b"") * 3,
    "padded": lambda data: gzip.compress(data) + bytes(1000),
    "rubbish": lambda data: gzip.compress(data) + b"\x1frubbish",
    "gzip --rsyncable": lambda data: subprocess.run(["gzip", "--rsyncable"], input=data, capture_output=True).stdout,
}


def check_every_chunk(blob: bytes, data: bytes, unit: int, piece: int, *, sparse: bool = False) -> PointFinder:
    finder = PointFinder(sparse=sparse)
    found = list(finder.inflated(pieces(blob, piece), unit, LIMITS))
    assert found == list(gunzipped(pieces(blob, piece), unit, LIMITS))
    assert b"".join(found) == data
    access = finder.access
    assert access is not None and len(access.ends) == len(found)
    for index, chunk in enumerate(found):
        point = access.point(index * unit)
        encoded = memoryview(blob)[point.offset : access.ends[index]]
        skip = index * unit - point.position
        window = unpack_window(point.window)
        assert inflate_from(window, point.bits, encoded, skip, len(chunk), LIMITS) == chunk
    return finder


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("piece", [997, 64 * KiB, 16 * MiB])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_chunk_inflates_by_itself(encoder: str, piece: int, sparse: bool) -> None:
    data = mixed(3 * MiB + 12_345)
    check_every_chunk(ENCODERS[encoder](data), data, UNIT, piece, sparse=sparse)


def test_sparse_windows_are_small() -> None:
    data = mixed(8 * MiB, 2)
    blob = gzip.compress(data)
    sizes = []
    for sparse in (False, True):
        access = check_every_chunk(blob, data, 256 * KiB, 64 * KiB, sparse=sparse).access
        assert access is not None
        sizes.append(sum(len(point.window) for point in access.points))
    assert sizes[1] < sizes[0] / 2


def test_blocks_at_every_bit_are_met() -> None:
    data = mixed(8 * MiB)
    access = check_every_chunk(gzip.compress(data, 6), data, UNIT, 64 * KiB).access
    assert access is not None
    assert {point.bits for point in access.points} == set(range(8))


def test_long_runs_share_a_point() -> None:
    data = bytes(20 * MiB)
    access = check_every_chunk(gzip.compress(data), data, MiB, 64 * KiB).access
    assert access is not None and len(access.points) < 8


@pytest.mark.parametrize("size", [0, 1, UNIT - 1, UNIT, UNIT + 1, 2 * UNIT])
def test_edges(size: int) -> None:
    data = mixed(size)
    finder = PointFinder()
    assert b"".join(finder.inflated(pieces(gzip.compress(data), 1000), UNIT, LIMITS)) == data
    if size:
        check_every_chunk(gzip.compress(data), data, UNIT, 1000)
    else:
        assert finder.access is None


def test_a_stream_in_one_block_has_no_random_access() -> None:
    data = bytes(2 * MiB)
    finder = PointFinder()
    limits = Limits(chunk_bytes=MiB)
    assert b"".join(finder.inflated(pieces(gzip.compress(data), 4096), UNIT, limits)) == data
    assert finder.access is None


def test_a_stream_that_was_left_has_no_points() -> None:
    finder = PointFinder()
    stream = finder.inflated(pieces(gzip.compress(mixed(MiB)), 4096), UNIT, LIMITS)
    next(stream)
    stream.close()
    assert finder.access is None


def test_damage_is_found_like_without_points() -> None:
    blob = gzip.compress(mixed(MiB))
    for broken in (blob[: len(blob) // 2], blob[:3000] + bytes(10) + blob[3010:], blob[:-8] + bytes(8)):
        with pytest.raises(FormatError, match="gzip"):
            list(PointFinder().inflated(pieces(broken, 4096), UNIT, LIMITS))


def test_a_chunk_that_is_damaged_or_short_is_an_integrity_error() -> None:
    data = mixed(MiB)
    blob = gzip.compress(data)
    access = check_every_chunk(blob, data, UNIT, 4096).access
    assert access is not None
    point = access.points[5]
    window = unpack_window(point.window)
    for encoded in (b"", b"\xff" * 5000, blob[point.offset : point.offset + 50]):
        with pytest.raises(IntegrityError):
            inflate_from(window, point.bits, memoryview(encoded), 0, UNIT, LIMITS)


def test_without_zlib_layers_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip_index, "_zlib", lambda: None)
    assert not can_find_points()
    with pytest.raises(FormatError):
        list(PointFinder().inflated(iter((gzip.compress(b"x"),)), UNIT, LIMITS))
