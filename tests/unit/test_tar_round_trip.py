"""What `push` writes as a tar header is what a tar is read as, at the edges of every field."""

import os
import stat

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfs.layers.grid import Grid
from ckptfs.layers.tar_encode import END, encode_header
from ckptfs.layers.tar_scanner import TarScanner
from ckptfs.model.times import BILLION, MOST
from ckptfs.model.toc import Inode
from ckptfs.settings import KiB, Limits

LIMITS = Limits()
IDS = st.sampled_from([0, 0o7777777, 0o10000000, (1 << 32) - 1])
SIZES = st.sampled_from([0, 1, 511, 512, 0o77777777777, 0o100000000000, LIMITS.file_bytes])
LATEST = 0o77777777777 * BILLION  # that ustar can say
TIMES = st.sampled_from([0, -1, 1, LATEST, LATEST + 1, LATEST + BILLION, MOST, -MOST]) | st.integers(-MOST, MOST)
LENGTHS = st.sampled_from([1, 99, 100, 101, 155, 156, 255])
NAMES = st.builds(
    lambda unit, length: (unit * length)[:length], st.sampled_from([b"n", b"\xff", "é".encode(), b"=%3D\n"]), LENGTHS
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(b"/".join)
XATTRS = st.dictionaries(
    st.sampled_from([b"user.x", b"user.=", b"user.%3D%25", b"user.\xff\n"]),
    st.sampled_from([b"", b"=\n", bytes(970), bytes(9970), bytes(LIMITS.xattr_bytes)]),
    max_size=2,
)
DEVICES = st.builds(os.makedev, st.sampled_from([0, 4095]), st.sampled_from([0, 255, 256, (1 << 20) - 1]))
KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO)


@st.composite
def inodes(draw: st.DrawFn) -> Inode:
    kind = draw(st.sampled_from(KINDS))
    inode = Inode(kind | draw(st.sampled_from([0, 0o7777])), draw(IDS), draw(IDS), 0, draw(TIMES))
    inode.xattrs = draw(XATTRS)
    if kind == stat.S_IFREG:
        inode.size = draw(SIZES)
    elif kind == stat.S_IFLNK:
        inode.target = draw(PATHS | st.just(b"t" * (LIMITS.path_bytes - 1)))
        inode.size = len(inode.target)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        inode.rdev = draw(DEVICES)
    return inode


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(PATHS, inodes(), st.none() | PATHS), min_size=1, max_size=4))
def test_what_is_written_is_read(members: list[tuple[bytes, Inode, bytes | None]]) -> None:
    scanner = TarScanner(Grid("x", 0, 256 * KiB), LIMITS)
    found = []
    for path, inode, link in members:
        found += scanner.feed(encode_header(path, inode, link))
        scanner.skip_to(scanner.wanted)  # its bytes
    found += scanner.feed(END)
    scanner.close()
    fields = ("mode", "uid", "gid", "size", "mtime_ns", "rdev", "target", "xattrs")
    for (path, inode, link), entry in zip(members, found, strict=True):
        assert (entry.path, entry.link) == (path, link)
        if entry.inode is not None:
            assert [getattr(entry.inode, name) for name in fields] == [getattr(inode, name) for name in fields]
