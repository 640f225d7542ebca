"""Open files and sockets: files.img (and the images that were one per kind before it), and fdinfo-N.img.

Called by inspection and restore/.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ckptfs.criu.images import DEFAULT_LIMITS, records
from ckptfs.criu.wire import Message
from ckptfs.settings import Limits

# fd_types, by their names in CRIU (and in checkpointctl's output), with the field of file_entry that has the rest
_KINDS = {
    1: ("REG", 3),
    2: ("PIPE", 18),
    3: ("FIFO", 17),
    4: ("INETSK", 4),
    5: ("UNIXSK", 16),
    6: ("EVENTFD", 8),
    7: ("EVENTPOLL", 9),
    8: ("INOTIFY", 13),
    9: ("SIGNALFD", 10),
    10: ("PACKETSK", 6),
    11: ("TTY", 19),
    12: ("FANOTIFY", 14),
    13: ("NETLINKSK", 7),
    14: ("NS", 5),
    15: ("TUNF", 11),
    16: ("EXT", 15),
    17: ("TIMERFD", 12),
    18: ("MEMFD", 20),
    19: ("BPFMAP", 21),
    20: ("PIDFD", 22),
}
# images of one kind each, before files.img
LEGACY_IMAGES = {
    "reg-files": "REG",
    "pipes": "PIPE",
    "fifo": "FIFO",
    "inetsk": "INETSK",
    "unixsk": "UNIXSK",
    "eventfd": "EVENTFD",
    "eventpoll": "EVENTPOLL",
    "inotify": "INOTIFY",
    "signalfd": "SIGNALFD",
    "packetsk": "PACKETSK",
    "tty": "TTY",
    "fanotify": "FANOTIFY",
    "netlinksk": "NETLINKSK",
    "ns-files": "NS",
    "tunfile": "TUNF",
    "ext-files": "EXT",
    "timerfd": "TIMERFD",
}
_STATES = {
    1: "ESTABLISHED",
    2: "SYN_SENT",
    3: "SYN_RECEIVED",
    4: "FIN_WAIT_1",
    5: "FIN_WAIT_2",
    6: "TIME_WAIT",
    7: "CLOSE",
    8: "CLOSE_WAIT",
    9: "LAST_ACK",
    10: "LISTEN",
    11: "CLOSING",
    12: "NEW_SYN_RECV",
}  # include/net/tcp_states.h
_TYPES = {1: "STREAM", 2: "DGRAM", 3: "RAW", 4: "RDM", 5: "SEQPACKET", 6: "DCCP", 10: "PACKET"}
_PROTOCOLS = {0: "IP", 1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPV6", 132: "SCTP", 136: "UDPLITE", 255: "RAW"}
_NO_NAMES: Mapping[int, str] = {}
_NETLINK = {0: "ROUTE", 4: "SOCK_DIAG", 9: "AUDIT", 12: "NETFILTER", 15: "KOBJECT_UEVENT", 16: "GENERIC"}


class Socket(NamedTuple):
    """What a socket was. Buffers in bytes; ports are 0 and addresses "" where the family has none.

    A name in the abstract namespace of UNIX sockets begins with "@".
    """

    family: str
    type: str
    protocol: str
    state: str
    source: str
    source_port: int
    destination: str
    destination_port: int
    send_buffer: int
    receive_buffer: int


class OpenFile(NamedTuple):
    """An open file description; several descriptors may have it. `kind` is CRIU's name of the type (REG, PIPE, ...).

    `path` is a path for REG, and otherwise a word that tells files of the kind apart ("pipe[12]", "memfd:cache").
    `size` is the size that the file must have at restore, and `mode` its st_mode, where CRIU noted them.
    """

    id: int
    kind: str
    path: str
    flags: int = 0
    position: int = 0
    size: int | None = None
    socket: Socket | None = None
    mode: int | None = None


class Descriptor(NamedTuple):
    """One entry of a descriptor table: number -> id of the open file."""

    fd: int
    file: int
    kind: str
    flags: int


def parse_files(
    data: bytes, name: str = "files.img", memfds: Mapping[int, str] = _NO_NAMES, limits: Limits = DEFAULT_LIMITS
) -> Iterator[OpenFile]:
    """The open files of all tasks. `memfds`: id -> name, out of memfd.img."""
    for record in records(data, "files", name, limits):
        m = record.message
        kind, number = _KINDS.get(m.uint(1), (f"TYPE{m.uint(1)}", 0))
        details = m.message(number) if number in m else None
        file = _open_file(m.uint(2), kind, details)
        if kind == "MEMFD" and details is not None:
            file = file._replace(path=f"memfd:{memfds.get(details.uint(5), '?')}")
        yield file


def parse_legacy_files(data: bytes, kind: str, name: str, limits: Limits = DEFAULT_LIMITS) -> Iterator[OpenFile]:
    """The open files of an image of one of LEGACY_IMAGES."""
    for record in records(data, kind, name, limits):
        yield _open_file(record.message.uint(1), LEGACY_IMAGES[kind], record.message)


def parse_fdinfo(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> tuple[Descriptor, ...]:
    found = (record.message for record in records(data, "fdinfo", name, limits))
    return tuple(
        Descriptor(m.uint(4), m.uint(1), _KINDS.get(m.uint(3), (f"TYPE{m.uint(3)}", 0))[0], m.uint(2)) for m in found
    )


def _open_file(number: int, kind: str, m: Message | None) -> OpenFile:
    decode = _DECODERS.get(kind)
    if m is None or decode is None:
        return OpenFile(number, kind, f"{kind.lower()}[{number}]")
    return decode(number, m)


def _regular(number: int, m: Message) -> OpenFile:
    size, mode = (m.uint(field) if field in m else None for field in (8, 10))
    return OpenFile(number, "REG", m.text(6), m.uint(2), m.uint(3), size, mode=mode)


def _pipe(number: int, m: Message) -> OpenFile:
    return OpenFile(number, "PIPE", f"pipe[{m.uint(2)}]", m.uint(3))


def _fifo(number: int, m: Message) -> OpenFile:
    return OpenFile(number, "FIFO", f"fifo[{m.uint(2)}]")


def _memfd(number: int, m: Message) -> OpenFile:
    return OpenFile(number, "MEMFD", "memfd", m.uint(2), m.uint(3))


def _inet(number: int, m: Message) -> OpenFile:
    source, destination = _address(m.uints(11)), _address(m.uints(12))
    family = "INET6" if m.uint(3) == socket.AF_INET6 else "INET"
    protocol = _PROTOCOLS.get(m.uint(5), str(m.uint(5)))
    words = family, _TYPES.get(m.uint(4), str(m.uint(4))), protocol, _STATES.get(m.uint(6), "")
    details = Socket(*words, source, m.uint(7), destination, m.uint(8), *_buffers(m, 14))
    path = f"{protocol.lower()}[{source}:{m.uint(7)}]"
    return OpenFile(number, "INETSK", path, m.uint(9), socket=details)


def _unix(number: int, m: Message) -> OpenFile:
    raw = m.raw(11)
    address = raw[1:] if raw[:1] == b"\0" else raw
    name = ("@" if raw[:1] == b"\0" else "") + address.rstrip(b"\0").decode("utf-8", "backslashreplace")
    words = "UNIX", _TYPES.get(m.uint(3), str(m.uint(3))), "", _STATES.get(m.uint(4), "")
    details = Socket(*words, name, 0, "", 0, *_buffers(m, 10))
    return OpenFile(number, "UNIXSK", f"unix[{m.uint(2)} ({m.uint(8)}) {name}]", m.uint(5), socket=details)


def _packet(number: int, m: Message) -> OpenFile:
    kind = _TYPES.get(m.uint(2), str(m.uint(2)))
    details = Socket("PACKET", kind, f"{m.uint(3):#06x}", "", "", 0, "", 0, *_buffers(m, 7))
    return OpenFile(number, "PACKETSK", f"packet[{number}]", m.uint(4), socket=details)


def _netlink(number: int, m: Message) -> OpenFile:
    protocol = _NETLINK.get(m.uint(3), str(m.uint(3)))
    details = Socket("NETLINK", "RAW", protocol, _STATES.get(m.uint(4), ""), "", 0, "", 0, *_buffers(m, 12))
    return OpenFile(number, "NETLINKSK", f"netlink[{protocol}]", m.uint(6), socket=details)


def _buffers(m: Message, field: int) -> tuple[int, int]:
    """(send, receive) buffer sizes out of the socket's options."""
    options = m.message(field)
    return options.uint(1), options.uint(2)


def _address(words: list[int]) -> str:
    """An IPv4 or IPv6 address from one or four words in network order."""
    if len(words) not in (1, 4):
        return ""
    raw = b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, raw)


_DECODERS: dict[str, Callable[[int, Message], OpenFile]] = {
    "REG": _regular,
    "PIPE": _pipe,
    "FIFO": _fifo,
    "MEMFD": _memfd,
    "INETSK": _inet,
    "UNIXSK": _unix,
    "PACKETSK": _packet,
    "NETLINKSK": _netlink,
}
