"""One tar header, the same bytes for the same file always: POSIX ustar, with PAX records where ustar cannot say it.

Owns the writing of headers (POSIX.1-2008, pax; xattrs as SCHILY.xattr.* as GNU tar and libarchive write them). No user
or group names, no access and change times, no device of origin: nothing that differs between two machines. Called by
layers/zstd_chunked_writer.py and push/; reading headers is layers/tar_header.py.
"""

import os
import stat

from ckptfs.errors import FormatError
from ckptfs.model.toc import Inode

BLOCK = 512
END = bytes(2 * BLOCK)  # two zero blocks end an archive

_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}
_LINK = b"1"
_MAX_ID = 0o7777777
_MAX_SIZE = 0o77777777777
_MAX_TIME = 0o77777777777


def padding(size: int) -> int:
    """Zero bytes that follow a payload of `size` bytes."""
    return -size % BLOCK


def tar_name(path: bytes, inode: Inode, link: bytes | None) -> bytes:
    """The name as it stands in the archive: directories end in a slash, the root is './'."""
    if link is None and inode.is_dir:
        return path + b"/" if path else b"./"
    return path


def tar_type(inode: Inode, link: bytes | None) -> bytes:
    """The typeflag of a member; FormatError for what a tar cannot hold (sockets)."""
    if link is not None:
        return _LINK
    kind = _TYPES.get(stat.S_IFMT(inode.mode))
    if kind is None:
        raise FormatError(
            f"a file of type {stat.S_IFMT(inode.mode):#o} has no place in a tar", hint="remove the socket"
        )
    return kind


def encode_header(path: bytes, inode: Inode, link: bytes | None = None) -> bytes:
    """The header blocks of one member. With `link` it is a hard link to that path, described by the target's inode.

    Paths as in model.toc.Entry.
    """
    kind = tar_type(inode, link)
    name = tar_name(path, inode, link)
    target = link if link is not None else inode.target
    size = inode.size if kind == b"0" else 0
    seconds, nanoseconds = divmod(inode.mtime_ns, 1_000_000_000)
    records: list[tuple[bytes, bytes]] = []
    if len(name) > 100 or not name.isascii():
        records.append((b"path", name))
    if len(target) > 100 or not target.isascii():
        records.append((b"linkpath", target))
    if size > _MAX_SIZE:
        records.append((b"size", b"%d" % size))
    if inode.uid > _MAX_ID:
        records.append((b"uid", b"%d" % inode.uid))
    if inode.gid > _MAX_ID:
        records.append((b"gid", b"%d" % inode.gid))
    if nanoseconds or not 0 <= seconds <= _MAX_TIME:
        records.append((b"mtime", _pax_time(inode.mtime_ns)))
    if link is None:
        records += [(b"SCHILY.xattr." + _xattr_name(key), inode.xattrs[key]) for key in sorted(inode.xattrs)]
    blocks = b""
    if records:
        body = b"".join(_record(key, value) for key, value in records)
        blocks = _block(b"././@PaxHeader", b"x", 0o644, size=len(body)) + body + bytes(padding(len(body)))
    device = kind in (b"3", b"4")
    if device and max(os.major(inode.rdev), os.minor(inode.rdev)) > _MAX_ID:
        raise FormatError("a device with such numbers has no place in a tar", hint="Linux has none; remove it")
    return blocks + _block(
        name[:100],
        kind,
        stat.S_IMODE(inode.mode),
        uid=_fits(inode.uid, _MAX_ID),
        gid=_fits(inode.gid, _MAX_ID),
        size=_fits(size, _MAX_SIZE),
        mtime=_fits(seconds, _MAX_TIME),
        target=target[:100],
        major=os.major(inode.rdev) if device else 0,
        minor=os.minor(inode.rdev) if device else 0,
    )


def _block(
    name: bytes,
    kind: bytes,
    mode: int,
    *,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    target: bytes = b"",
    major: int = 0,
    minor: int = 0,
) -> bytes:
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:108] = b"%07o\0" % mode
    block[108:116] = b"%07o\0" % uid
    block[116:124] = b"%07o\0" % gid
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"%011o\0" % mtime
    block[148:156] = b"        "
    block[156:157] = kind
    block[157 : 157 + len(target)] = target
    block[257:265] = b"ustar\x0000"
    block[329:337] = b"%07o\0" % major
    block[337:345] = b"%07o\0" % minor
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _record(key: bytes, value: bytes) -> bytes:
    """`LENGTH KEY=VALUE\\n`, where LENGTH counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))  # one more digit may have come: 98 + 2 is 100
    return b"%d %s=%s\n" % (length, key, value)


def _pax_time(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    seconds, rest = divmod(abs(nanoseconds), 1_000_000_000)
    fraction = (b".%09d" % rest).rstrip(b"0") if rest else b""
    return sign + b"%d" % seconds + fraction


def _xattr_name(name: bytes) -> bytes:
    """GNU tar writes '=' as %3D, which would end the keyword, and '%' as %25."""
    return name.replace(b"%", b"%25").replace(b"=", b"%3D")


def _fits(value: int, limit: int) -> int:
    return value if 0 <= value <= limit else 0
