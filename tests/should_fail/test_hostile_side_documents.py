"""Indexes, zTOCs and seek tables that no honest tool would write: refused for what they are, at little cost."""

import gzip
import random
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import zstandard

from ckptfs.errors import CkptfsError, FormatError, IntegrityError, LimitExceeded
from ckptfs.layers.flatbuffers import Buffer
from ckptfs.layers.indexed import Indexed
from ckptfs.layers.soci import Ztoc
from ckptfs.layers.zstd_seekable import read_seek_table
from ckptfs.model.layer_index import (
    AccessPoint,
    GzipAccess,
    LayerIndex,
    decode_layer_index,
    encode_layer_index,
    pack_window,
    runs,
    unpack_window,
)
from ckptfs.model.toc import Entry, Inode
from ckptfs.settings import GiB, KiB, Limits, MiB, Settings
from tests.support import soci
from tests.support.blobs import TAR, BytesBlob, blob_of
from tests.support.side import SETTINGS, index_of, scanned, seekable
from tests.support.speed import slowness
from tests.support.tars import END, member

pytestmark = pytest.mark.row("M7")

NOISE = random.Random(5).randbytes(2 * MiB)
LAYER_TAR = member(b"dir/file", b"data") + member(b"big", NOISE) + END
GZIP = blob_of(gzip.compress(LAYER_TAR), TAR + "+gzip")
INDEX = index_of(GZIP)
FILE = next(entry for entry in INDEX.entries if entry.path == b"big")


def refused(index: LayerIndex, *, blob: BytesBlob = GZIP, settings: Settings = SETTINGS) -> None:
    with pytest.raises(FormatError):
        Indexed.parse(encode_layer_index(index), blob.descriptor, settings, own=False)


def with_entry(entry: Entry) -> LayerIndex:
    return INDEX._replace(entries=(*INDEX.entries, entry))


def big(**fields: Any) -> Inode:
    assert FILE.inode is not None
    return replace(FILE.inode, **fields)


ENTRIES: dict[str, Entry] = {
    "parent": Entry(b"../escape", big()),
    "absolute": Entry(b"/etc/passwd", big()),
    "inner parent": Entry(b"a/../../b", big()),
    "empty part": Entry(b"a//b", big()),
    "long name": Entry(b"n" * 256, big()),
    "deep": Entry(b"/".join([b"d"] * 257), big()),
    "root that is a file": Entry(b"", big()),
    "no type": Entry(b"x", big(mode=0o644)),
    "socket": Entry(b"x", big(mode=0o140644)),
    "mode of 32 bits": Entry(b"x", big(mode=0x10000 | 0o100644)),
    "larger than any file": Entry(b"x", big(size=1 << 63)),
    "directory with bytes": Entry(b"x", big(mode=0o40755)),
    "symbolic link to nothing": Entry(b"x", Inode(0o120777)),
    "symbolic link of another size": Entry(b"x", Inode(0o120777, size=3, target=b"ab")),
    "time": Entry(b"x", big(mtime_ns=(1 << 41) * 10**9)),
    "xattr without a name": Entry(b"x", big(xattrs={b"": b"v"})),
    "long xattr": Entry(b"x", big(xattrs={b"user.x": bytes(64 * KiB + 1)})),
    "device that Linux does not have": Entry(b"x", Inode(0o020644, rdev=1 << 70)),
    "link out": Entry(b"x", None, b"../y"),
    "bytes outside the layer": Entry(b"x", big(extents=runs([(0, 10, INDEX.length - 5)], INDEX.digest))),
}


@pytest.mark.parametrize("sin", ENTRIES)
def test_entries_of_an_index(sin: str) -> None:
    refused(with_entry(ENTRIES[sin]))


def _access(**fields: Any) -> LayerIndex:
    assert INDEX.gzip is not None
    return INDEX._replace(gzip=INDEX.gzip._replace(**fields))


def _points(change: Callable[[AccessPoint], AccessPoint]) -> LayerIndex:
    assert INDEX.gzip is not None
    return _access(points=tuple(map(change, INDEX.gzip.points)))


ENDS = INDEX.gzip.ends if INDEX.gzip is not None else ()
ACCESS: dict[str, Callable[[], LayerIndex]] = {
    "point outside": lambda: _points(lambda p: p._replace(offset=p.offset + GZIP.size)),
    "first point late": lambda: _points(lambda p: p._replace(position=p.position + 1)),
    "points twice": lambda: _access(points=(INDEX.gzip.points[0],) * 2),  # type: ignore[union-attr]
    "nine bits": lambda: _points(lambda p: p._replace(bits=9)),
    "no points": lambda: _access(points=()),
    "end outside": lambda: _access(ends=(*ENDS[:-1], GZIP.size + 1)),
    "end of nothing": lambda: _access(ends=(0, *ENDS[1:])),
    "end before its point": lambda: _access(ends=(1, *ENDS[1:])),
    "too few ends": lambda: _access(ends=ENDS[:-1]),
    "too few digests": lambda: INDEX._replace(digests=INDEX.digests[:-32]),
    "another layer": lambda: INDEX._replace(digest="sha256:" + "0" * 64),
    "another size": lambda: INDEX._replace(size=GZIP.size + 1),
    "no unit": lambda: INDEX._replace(unit=0),
    "huge unit": lambda: INDEX._replace(unit=128 * MiB),
    "huge length": lambda: INDEX._replace(length=1 << 62),
    "plain tar of another length": lambda: INDEX._replace(compression="none", gzip=None),
}


@pytest.mark.parametrize("sin", ACCESS)
def test_places_in_an_index(sin: str) -> None:
    refused(ACCESS[sin]())


def test_a_chunk_far_from_its_point_is_refused() -> None:
    one = AccessPoint(10, 0, 0, b"")
    count = 65
    far = INDEX._replace(length=count * MiB, digests=bytes(32 * count), entries=())
    far = far._replace(gzip=GzipAccess((one,), tuple(range(11, 11 + count))))
    with pytest.raises(LimitExceeded):
        Indexed.parse(encode_layer_index(far), GZIP.descriptor, SETTINGS, own=False)
    near = far._replace(length=64 * MiB, digests=bytes(32 * 64), gzip=GzipAccess((one,), tuple(range(11, 75))))
    Indexed.parse(encode_layer_index(near), GZIP.descriptor, SETTINGS, own=False)


def test_windows_are_no_bombs() -> None:
    assert unpack_window(pack_window(b"w" * 32 * KiB)) == b"w" * 32 * KiB
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(b"w")
    for bomb in (zstandard.compress(bytes(32 * KiB + 1)), zstandard.compress(bytes(MiB)), unsized, b"junk"):
        with pytest.raises(FormatError):
            unpack_window(bomb)


def test_a_false_window_or_place_is_no_wrong_byte() -> None:
    assert INDEX.gzip is not None
    forged = _points(lambda p: p._replace(window=pack_window(b"x" * 32 * KiB)))
    document = Indexed.parse(encode_layer_index(forged), GZIP.descriptor, SETTINGS, own=False)
    found = scanned(GZIP, document)
    inode = next(entry.inode for entry in found.entries if entry.path == b"big")
    assert inode is not None
    try:
        assert found.read(inode) == NOISE  # blocks that reach into no window
    except IntegrityError:
        pass


@pytest.mark.parametrize("own", [True, False])
def test_mutated_indexes_are_refused_or_harmless(own: bool) -> None:
    good = encode_layer_index(INDEX)
    rng = random.Random(7)
    began = time.monotonic()
    for _ in range(400):
        broken = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            broken[rng.randrange(min(len(broken), rng.choice((400, len(broken)))))] = rng.randrange(256)
        if rng.random() < 0.2:
            del broken[rng.randrange(len(broken)) :]
        try:
            index = decode_layer_index(bytes(broken), str(GZIP.descriptor.digest), GZIP.size)
            Indexed.parse(bytes(broken), GZIP.descriptor, SETTINGS, own=own)
        except CkptfsError:
            continue
        assert index.length <= Limits().file_bytes
    assert time.monotonic() - began < 20


# zTOCs


def ztoc(**changes: Any) -> bytes:
    return soci.gzip_ztoc(GZIP, LAYER_TAR, 256 * KiB, **changes)


def parsed(document: bytes) -> Ztoc:
    return Ztoc.parse(document, GZIP.descriptor, SETTINGS)


def file(**fields: Any) -> list[soci.File]:
    return [{**soci.files_of(LAYER_TAR)[1], **fields}]


POINTS = soci.points_of(GZIP.data, 256 * KiB)
DIGEST = "sha256:" + "a" * 64
ZTOCS: dict[str, dict[str, Any]] = {
    "another size": {"compressed": GZIP.size + 1},
    "negative length": {"length": -1},
    "length of 8 EiB": {"length": (1 << 63) - 1},
    "algorithm": {"algorithm": 3},
    "too few digests": {"digests": [DIGEST] * (len(POINTS) - 1)},
    "span count": {"max_span": 1 << 30},
    "no digest": {"digests": ["sha256:zz"] * len(POINTS)},
    "sha512": {"digests": ["sha512:" + "a" * 128] * len(POINTS)},
    "no checkpoints": {"checkpoints": b""},
    "cut checkpoints": {"checkpoints": soci.checkpoints(POINTS, 1)[:-1]},
    "count of checkpoints": {"checkpoints": struct.pack("<iq", 1 << 30, 1) + soci.checkpoints(POINTS, 1)[12:]},
    "nine bits": {"checkpoints": soci.checkpoints([p._replace(bits=9) for p in POINTS], 1)},
    "checkpoints backwards": {"checkpoints": soci.checkpoints(POINTS[::-1], 1)},
    "checkpoints outside": {
        "checkpoints": soci.checkpoints([p._replace(offset=p.offset + GZIP.size) for p in POINTS], 1)
    },
    "negative checkpoint": {"checkpoints": soci.checkpoints([POINTS[0]._replace(offset=-5), *POINTS[1:]], 1)},
    "late first checkpoint": {"checkpoints": soci.checkpoints([POINTS[0]._replace(position=1), *POINTS[1:]], 1)},
    "file outside": {"files": file(offset=len(LAYER_TAR))},
    "negative file": {"files": file(size=-1)},
    "negative place": {"files": file(offset=-1)},
    "path": {"files": file(name="../x")},
    "empty path": {"files": file(name="")},
    "type": {"files": file(type="socket")},
    "time": {"files": file(time="yesterday")},
    "link": {"files": file(type="hardlink", link="../../x")},
    "symlink": {"files": file(type="symlink", link="")},
    "device": {"files": file(type="char", major=-1)},
    "device that Linux does not have": {"files": file(type="block", major=1 << 12)},
    "xattr": {"files": file(pax={"SCHILY.xattr.": "x"})},
    "sparse": {"files": file(pax={"GNU.sparse.major": "1"})},
}


@pytest.mark.parametrize("sin", ZTOCS)
def test_ztocs(sin: str) -> None:
    with pytest.raises(FormatError):
        parsed(ztoc(**ZTOCS[sin]))


def test_the_honest_ztoc_is_read() -> None:
    assert len(parsed(ztoc()).spans) == len(POINTS) > 4


def test_a_small_flatbuffer_that_describes_much_is_stopped_by_its_budget() -> None:
    """Many files with many PAX records each: every one is paid for, shared or not."""
    record = soci.files_of(LAYER_TAR)[0]
    record["pax"] = {f"SCHILY.xattr.user.{i}": "v" * 100 for i in range(150)}
    document = bytearray(ztoc(files=[record] * 150))
    began = time.monotonic()
    settings = SETTINGS._replace(limits=SETTINGS.limits._replace(toc_entries=5_000))
    with pytest.raises(LimitExceeded):
        Ztoc.parse(bytes(document), GZIP.descriptor, settings)
    assert time.monotonic() - began < 5
    with pytest.raises(LimitExceeded):
        buffer = Buffer(bytes(document), tables=10**6, text=1000)
        for table in buffer.root().table(4).tables(0):  # type: ignore[union-attr]
            table.string(0)
            for pair in table.tables(13):
                pair.string(1)


def test_a_wide_table_costs_what_is_read_of_it() -> None:
    """Its 32 765 fields are there once, and twenty thousand references lead to them."""
    count = 20_000
    wide = 24 + 4 * count
    table = wide + 0xFFFE
    root = struct.pack("<IHHHHiI", 12, 6, 8, 4, 0, 8, 4)
    references = struct.pack(f"<I{count}I", count, *(table - at for at in range(24, wide, 4)))
    data = root + references + struct.pack("<HH", 0xFFFE, 4).ljust(0xFFFE, b"\0") + struct.pack("<i", 0xFFFE)
    began = time.process_time()
    files = Buffer(data, tables=count + 1, text=0).root().tables(0)
    assert [file.int64(0) for file in files] == [0] * count
    assert time.process_time() - began < 1.0 * slowness()


def test_mutated_ztocs_are_refused_or_harmless() -> None:
    good = ztoc()
    rng = random.Random(8)
    began = time.monotonic()
    places = [rng.randrange(len(good)) for _ in range(150)] + [rng.randrange(2000) for _ in range(150)]
    places += [len(good) - 1 - rng.randrange(2000) for _ in range(150)]
    for place in places:
        broken = bytearray(good)
        broken[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        if rng.random() < 0.2:
            del broken[rng.randrange(len(broken)) :]
        try:
            document = parsed(bytes(broken))
        except CkptfsError:
            continue
        found = document.open(GZIP, 0)
        for entry in found.entries or ():
            for extent in entry.inode.extents if entry.inode is not None else ():
                chunk = extent.chunk
                assert 0 <= chunk.offset < chunk.offset + chunk.size <= GZIP.size
                try:
                    found.decode(chunk, memoryview(GZIP.data)[chunk.offset : chunk.offset + chunk.size])
                except IntegrityError:
                    break
    assert time.monotonic() - began < 30


# Seek tables


def table(
    rows: list[tuple[int, int]], *, descriptor: int = 0, count: int | None = None, size: int | None = None
) -> bytes:
    body = b"".join(struct.pack("<II", *row) for row in rows)
    body += struct.pack("<IBI", len(rows) if count is None else count, descriptor, 0x8F92EAB1)
    return struct.pack("<II", 0x184D2A5E, len(body) if size is None else size) + body


FRAME = zstandard.compress(LAYER_TAR)
TABLES = {
    "too short": table([(len(FRAME) - 1, len(LAYER_TAR))]),
    "too long": table([(len(FRAME) + 1, len(LAYER_TAR))]),
    "empty frame": table([(len(FRAME), len(LAYER_TAR)), (0, 5)]),
    "huge frame": table([(len(FRAME), 0xFFFFFFFF)]),
    "empty frames without end": table([(len(FRAME) - 17, len(LAYER_TAR)), *[(1, 0)] * 17]),
    "reserved bits": table([(len(FRAME), len(LAYER_TAR))], descriptor=0x04),
    "more frames than bytes": table([(len(FRAME), len(LAYER_TAR))], count=3_000_000),
    "more frames than anybody has": table([(len(FRAME), len(LAYER_TAR))], count=0xFFFFFFFF),
    "not where it should begin": table([(len(FRAME), len(LAYER_TAR))], size=5),
}


@pytest.mark.parametrize("sin", TABLES)
def test_seek_tables(sin: str) -> None:
    with pytest.raises(FormatError):
        read_seek_table(blob_of(FRAME + TABLES[sin], TAR + "+zstd"), SETTINGS)


def test_a_layer_without_a_seek_table_has_none() -> None:
    for data in (b"", b"x", FRAME, FRAME + b"\xb1\xea\x92\x8f"[:3]):
        assert read_seek_table(blob_of(data, TAR + "+zstd"), SETTINGS) is None


def test_frames_that_lie_about_their_size_are_no_wrong_bytes() -> None:
    """Neither more nor less than the table says, whether the frame declares its size or not; and one frame, no two."""
    bomb = zstandard.compress(bytes(GiB // 4))
    streamed = zstandard.ZstdCompressor(level=1).compressobj()
    undeclared = streamed.compress(LAYER_TAR) + streamed.flush()
    assert zstandard.frame_content_size(undeclared) == -1
    for frame, decoded in (
        (bomb, 1000),
        (bomb, len(LAYER_TAR)),
        (zstandard.compress(b"x" * 100), 5000),
        (FRAME, len(LAYER_TAR) - 512),
        (undeclared, len(LAYER_TAR) - 512),
        (undeclared, len(LAYER_TAR) + 512),
        (FRAME + zstandard.compress(LAYER_TAR), len(LAYER_TAR)),
    ):
        blob = blob_of(frame + table([(len(frame), decoded)]), TAR + "+zstd")
        document = read_seek_table(blob, SETTINGS)
        assert document is not None
        with pytest.raises(IntegrityError):
            scanned(blob, document)


def test_frames_that_hold_nothing_are_looked_into() -> None:
    """Writers end with one where the tar ends with a frame; others skip. A table that calls a full one empty lies."""
    skippable = struct.pack("<II", 0x184D2A50, 100) + bytes(100)
    streamed = zstandard.ZstdCompressor().compressobj()
    undeclared = streamed.compress(LAYER_TAR) + streamed.flush()
    for more, fits in (
        (zstandard.compress(b""), True),
        (skippable, True),
        (zstandard.compress(b"x"), False),
        (zstandard.compress(b"") + zstandard.compress(b"x"), False),
        (b"rubbish, of course", False),
    ):
        rows = [(len(undeclared), len(LAYER_TAR)), (len(more), 0)]
        blob = blob_of(undeclared + more + table(rows), TAR + "+zstd")
        document = read_seek_table(blob, SETTINGS)
        assert document is not None
        if fits:
            assert len(scanned(blob, document).entries) == 2
        else:
            with pytest.raises(IntegrityError):
                scanned(blob, document)


@pytest.mark.parametrize("checksum", [True, False])
def test_mutated_seek_tables_are_refused_or_harmless(checksum: bool) -> None:
    good = seekable(LAYER_TAR, 200_000, checksum=checksum)
    rng = random.Random(9)
    harmless = 0
    for bit in (
        *range(8 * 9),
        *(rng.randrange(8 * 160) for _ in range(200)),
    ):  # all of the footer, and some of the rest
        broken = bytearray(good)
        broken[len(broken) - 1 - bit // 8] ^= 1 << bit % 8
        blob = blob_of(bytes(broken), TAR + "+zstd")
        try:
            document = read_seek_table(blob, SETTINGS)
            if document is None:
                continue
            found = scanned(blob, document)
            contents = {entry.path: found.read(entry.inode) for entry in found.entries if entry.inode is not None}
        except CkptfsError:
            continue
        assert contents == {b"dir/file": b"data", b"big": NOISE}
        harmless += 1
    assert harmless, "some bits of the footer mean nothing"
