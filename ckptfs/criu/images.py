"""The image files: which names there are, their magics, headers and records.

An image is a header (4 or 8 bytes) and records: a little-endian u32 size, one protobuf message of that size and, in
some kinds, raw bytes that the message announces. Pages, tars and dumps of `ip` have neither header nor records ("raw").
Names and numbers: CRIU 4.2, criu/image-desc.c and criu/include/magic.h. Owns no meaning of any message (its siblings
do) and opens nothing.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ckptfs.criu.wire import Message
from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.settings import Limits

COMMON_MAGIC = 0x54564319  # stands before the kind's own magic since images v1.1; inventory.img has none
SERVICE_MAGIC = 0x55105940  # the same for statistics and irmap-cache
DEFAULT_LIMITS = Limits()

# kind of image (its file name without number and .img) -> magic; None: raw, no header
_MAGICS: dict[str, int | None] = {
    "inventory": 0x58313116,
    "pstree": 0x50273030,
    "ids": 0x54432030,
    "core": 0x55053847,
    "mm": 0x57492820,
    "vmas": 0x54123737,
    "pagemap": 0x56084025,
    "pagemap-shmem": 0x56084025,
    "pages": None,
    "pages-shmem": 0x56084025,
    "files": 0x56303138,
    "fdinfo": 0x56213732,
    "fs": 0x51403912,
    "reg-files": 0x50363636,
    "ext-files": 0x59255641,
    "ns-files": 0x61394011,
    "eventfd": 0x44523722,
    "eventpoll": 0x45023858,
    "eventpoll-tfd": 0x44433746,
    "signalfd": 0x57323820,
    "timerfd": 0x50493712,
    "inotify": 0x48424431,
    "inotify-wd": 0x54562009,
    "fanotify": 0x55096122,
    "fanotify-mark": 0x56506035,
    "pipes": 0x56513555,
    "pipes-data": 0x56453709,
    "fifo": 0x58364939,
    "fifo-data": 0x59333054,
    "unixsk": 0x54373943,
    "inetsk": 0x56443851,
    "packetsk": 0x60454618,
    "netlinksk": 0x58005614,
    "sk-queues": 0x56264026,
    "tcp-stream": 0x51465506,
    "tty": 0x59433025,
    "tty-info": 0x59453036,
    "tty-data": 0x59413026,
    "tunfile": 0x57143751,
    "memfd": 0x48453499,
    "bpfmap-file": 0x57506142,
    "bpfmap-data": 0x64324033,
    "pidfd": 0x54435556,
    "ghost-file": 0x52583605,
    "remap-fpath": 0x59133954,
    "filelocks": 0x54323616,
    "sigacts": 0x55344201,
    "signal-s": 0x59255647,
    "signal-p": 0x59255647,
    "itimers": 0x57464056,
    "posix-timers": 0x52603957,
    "creds": 0x54023547,
    "rlimit": 0x57113925,
    "seccomp": 0x64413049,
    "apparmor": 0x59423047,
    "cgroup": 0x59383330,
    "cpuinfo": 0x61404013,
    "mountpoints": 0x55563928,
    "utsns": 0x54473203,
    "ipcns-var": 0x53115007,
    "ipcns-shm": 0x46283044,
    "ipcns-msg": 0x55453737,
    "ipcns-sem": 0x59573019,
    "userns": 0x55474906,
    "pidns": 0x61157326,
    "timens": 0x43114433,
    "netns": 0x55933752,
    "netdev": 0x57373951,
    "netns-ct": None,
    "netns-exp": None,
    "ifaddr": None,
    "route": None,
    "route6": None,
    "rule": None,
    "iptables": None,
    "ip6tables": None,
    "nftables": None,
    "tmpfs": None,
    "tmpfs-dev": None,
    "autofs": 0x49353943,
    "binfmt-misc": 0x67343323,
    "stats-dump": 0x57093306,
    "stats-restore": 0x57093306,
    "irmap-cache": 0x57004059,
    "amdgpu-kfd": None,
    "amdgpu-pages": None,
    "amdgpu-renderD": None,
}
_SERVICE = {"stats-dump", "stats-restore", "irmap-cache"}  # their names have no .img

# How many raw bytes follow a record; the rest of the file where the length stands elsewhere.
_REST = -1
_EXTRA: dict[str, Callable[[Message], int]] = {
    "pipes-data": lambda entry: entry.uint(2),
    "fifo-data": lambda entry: entry.uint(2),
    "sk-queues": lambda entry: entry.uint(2),
    "bpfmap-data": lambda entry: entry.uint(2) + entry.uint(3),
    "tcp-stream": lambda entry: entry.uint(1) + entry.uint(3),
    "ghost-file": lambda entry: _REST,
    "ipcns-shm": lambda entry: _REST,
    "ipcns-msg": lambda entry: _REST,
    "ipcns-sem": lambda entry: _REST,
}


class Name(NamedTuple):
    """What a file name says: the kind of image, and the number in it (a pid, an id) where it has one."""

    kind: str
    number: int | None = None

    @property
    def raw(self) -> bool:
        """Whether such files have neither header nor records."""
        return _MAGICS[self.kind] is None


def parse_name(name: str) -> Name | None:
    """The kind of an image file by its name; None for a file that is not CRIU's.

    Numbers are decimal but for ghost-file and tcp-stream (criu/image-desc.c).
    """
    if name in _SERVICE:
        return Name(name)
    if not name.endswith(".img"):
        return None
    stem = name[:-4].removesuffix(".tar.gz")
    if stem in _MAGICS:
        return Name(stem)
    kind, dash, number = stem.rpartition("-")
    if not dash or kind not in _MAGICS or not number.isascii():
        return None
    try:
        return Name(kind, int(number, 16 if kind in ("ghost-file", "tcp-stream") else 10))
    except ValueError:
        return None


class Record(NamedTuple):
    """One record: its message, and the raw bytes that follow it (b"" in most kinds)."""

    message: Message
    extra: bytes = b""


def records(data: bytes, kind: str, name: str, limits: Limits = DEFAULT_LIMITS) -> Iterator[Record]:
    """The records of an image of `kind`, whole in `data`; `name` is for errors.

    FormatError for another magic, a cut record or a message that is not one; LimitExceeded past `limits`.
    """
    position, count, end = header(data, kind, name, limits), 0, len(data)
    extra_of = _EXTRA.get(kind)
    while position < end:
        count += 1
        what = f"{name}, record {count}"
        start = position + 4
        size = int.from_bytes(data[position:start], "little")
        position = start + size
        if position > end:
            raise FormatError(f"{what} has {size} bytes, but the file ends before")
        if count > limits.criu_records or size > limits.criu_record_bytes:
            raise LimitExceeded(f"{what} is past the limits", hint="no CRIU writes such an image")
        message = Message(data[start:position], what)
        if extra_of is None:
            yield Record(message)
            continue
        length = extra_of(message)
        stop = end if length == _REST else position + length
        if stop > end:
            raise FormatError(f"{what} announces {length} raw bytes, but the file ends before")
        yield Record(message, data[position:stop])
        position = stop


def only_record(data: bytes, kind: str, name: str, limits: Limits = DEFAULT_LIMITS) -> Message:
    """The first record of an image that has one."""
    for record in records(data, kind, name, limits):
        return record.message
    raise FormatError(f"{name} has no record")


def header(data: bytes, kind: str, name: str, limits: Limits = DEFAULT_LIMITS) -> int:
    """The position of the first record; FormatError unless `data` begins as an image of `kind` does."""
    magic = _MAGICS.get(kind)
    if magic is None:
        raise FormatError(f"{name} has no records: it is raw")
    if len(data) > limits.criu_image_bytes:
        raise LimitExceeded(f"{name} has {len(data)} bytes", hint=f"at most {limits.criu_image_bytes} are read")
    first, second = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little")
    outer = SERVICE_MAGIC if kind in _SERVICE else COMMON_MAGIC
    if len(data) >= 8 and first == outer and second == magic:
        return 8
    if len(data) >= 4 and first == magic:  # inventory, and every image of the first version
        return 4
    raise FormatError(
        f"{name} is not a CRIU image of kind {kind}", hint=f"it begins with {data[:8].hex() or 'nothing'}"
    )
