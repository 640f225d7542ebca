"""A slow link in user space: a TCP proxy with a round-trip time and a bandwidth cap, no privileges, nothing global.

    python -m ckptfs.bench.link --target 127.0.0.1:5000 --rtt 20ms --rate 200Mbit

Owns the sockets and the clock; channel.py decides what is sent when. What is modelled: half of the RTT each way, one
RTT for a new connection (its first byte leaves that much later, since the kernel accepts it at once), one bandwidth
cap per direction that all connections share fairly, and back-pressure on senders. What is not: loss, slow start,
packet headers. Runs in a process of its own (`ShapedLink`), so that its work is not done under the caller's GIL.
Used by the benchmark, the demo and the tests; knows nothing of checkpoints.
"""

import argparse
import contextlib
import json
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Self

from ckptfs.bench.channel import END, Channel, Flow
from ckptfs.errors import UnavailableError, UsageError

_RECEIVE_BYTES = 256 * 1024
_MOST_WAIT = 3600.0
_NUMBER = r"[0-9]{1,12}(?:\.[0-9]*)?|\.[0-9]+"
_UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True, slots=True)
class LinkStats:
    """Since the link was made: connections accepted, and bytes sent towards the target (up) and back (down)."""

    connections: int
    bytes_up: int
    bytes_down: int


class ShapedLink:
    """A link to `target` ("host:port") as a context manager; connect to `address` instead of the target.

    `rtt` in seconds, `rate` in bits per second (0: no cap).
    """

    def __init__(self, target: str, *, rtt: float = 0.020, rate: float = 200e6) -> None:
        self._command = [sys.executable, "-m", __name__, "--target", target, "--rtt", f"{rtt * 1000:g}ms"]
        self._command += ["--rate", f"{rate:.0f}bit", "--control"]
        self._process: subprocess.Popen[str] | None = None
        self.address = ""

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        # Ctrl-C in a terminal is for the command: who reads behind a link that is gone waits until the deadline.
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True, process_group=0)
        try:
            self.address = self._line()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if (process := self._process) is not None:
            process.__exit__(None, None, None)  # closing its standard input ends it
            self._process = None

    def stats(self) -> LinkStats:
        if self._process is None or self._process.stdin is None:
            raise UsageError("the link is not running", hint="use it in a with block")
        self._process.stdin.write("stats\n")
        self._process.stdin.flush()
        return LinkStats(**json.loads(self._line()))

    def _line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise UnavailableError("the link emulator ended", hint="see its last words on standard error")
        return line


class _Side:
    """One socket of a connection: what it sends leaves on `outward`, what it receives came by `inward`."""

    def __init__(self, sock: socket.socket, sends: Flow, outward: Channel, receives: Flow, inward: Channel) -> None:
        self.socket = sock
        self.sends = sends
        self.outward = outward
        self.receives = receives
        self.inward = inward
        self.peer = self
        self.due: deque[memoryview] = deque()  # arrived, and not yet taken by the socket
        self.reads_on = True  # until the peer's end of stream
        self.ended = False  # the end of stream went out
        self.closed = False
        self.events = 0

    def wanted(self) -> int:
        reads = self.reads_on and self.outward.has_room(self.sends)
        return (select.EPOLLIN if reads else 0) | (select.EPOLLOUT if self.due else 0)


class _Proxy:
    """The event loop. Waits with select() on one epoll descriptor: epoll's own time-out is in whole milliseconds."""

    def __init__(self, listener: socket.socket, target: tuple[str, int], rtt: float, rate: float) -> None:
        self._listener = listener
        self._target = target
        self._rtt = rtt
        self._up = Channel(rate / 8, rtt / 2, self._arrived)
        self._down = Channel(rate / 8, rtt / 2, self._arrived)
        self._epoll = select.epoll()
        self._sides: dict[int, _Side] = {}
        self._receiver: dict[Flow, _Side] = {}
        self._connections = 0
        self._now = time.monotonic()
        listener.setblocking(False)
        self._epoll.register(listener, select.EPOLLIN)

    def run(self, control: int | None) -> None:
        """Serves until the control descriptor (standard input) ends, or for ever without one."""
        if control is not None:
            self._epoll.register(control, select.EPOLLIN)
        while True:
            self._now = time.monotonic()
            for flow in self._up.advance(self._now) | self._down.advance(self._now):
                if (side := self._receiver.get(flow)) is not None:
                    self._watch(side)  # its sender may have room again
            events = [at for at in (self._up.next_event(), self._down.next_event()) if at is not None]
            wait = max(0.0, min(events, default=self._now + _MOST_WAIT) - time.monotonic())
            if not select.select([self._epoll], [], [], wait)[0]:
                continue
            self._now = time.monotonic()
            for descriptor, mask in self._epoll.poll(0):
                if descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor == control:
                    if not self._answer():
                        return
                elif (side := self._sides.get(descriptor)) is not None:
                    self._ready(side, mask)

    def _answer(self) -> bool:
        if not sys.stdin.readline():
            return False
        print(json.dumps(asdict(LinkStats(self._connections, self._up.bytes_sent, self._down.bytes_sent))), flush=True)
        return True

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # the client went away, or descriptors are short: it will ask again
        target = socket.socket(self._listener.family)
        for sock in (client, target):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        target.connect_ex(self._target)  # a refusal shows up as an error event
        request, response = Flow(self._now + self._rtt), Flow(self._now + self._rtt)
        near = _Side(client, request, self._up, response, self._down)
        far = _Side(target, response, self._down, request, self._up)
        near.peer, far.peer = far, near
        for side in (near, far):
            self._sides[side.socket.fileno()] = side
            self._receiver[side.receives] = side
        self._watch(near)
        self._connections += 1

    def _ready(self, side: _Side, mask: int) -> None:
        try:
            if mask & select.EPOLLERR:
                raise OSError(side.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), "socket error")
            if mask & select.EPOLLOUT:
                self._write(side)
            if mask & (select.EPOLLIN | select.EPOLLHUP) and side.reads_on:
                data = side.socket.recv(_RECEIVE_BYTES)
                side.reads_on = data != END
                side.outward.offer(side.sends, data, self._now)
        except BlockingIOError:
            pass
        except OSError:
            self._close(side, abort=True)
            return
        self._watch(side)

    def _arrived(self, flow: Flow, piece: memoryview) -> None:
        side = self._receiver.get(flow)
        if side is None:
            return  # the connection was closed while this was on the way
        side.due.append(piece)
        try:
            self._write(side)
        except BlockingIOError:
            pass
        except OSError:
            self._close(side, abort=True)
            return
        self._watch(side)

    def _write(self, side: _Side) -> None:
        while side.due:
            piece = side.due[0]
            if not piece:
                side.ended = True
                side.due.popleft()
                side.socket.shutdown(socket.SHUT_WR)
                continue
            count = side.socket.send(piece)
            side.inward.taken(side.receives, count, self._now)
            if count < len(piece):
                side.due[0] = piece[count:]
            else:
                side.due.popleft()

    def _watch(self, side: _Side) -> None:
        """Asks epoll for what both ends can use now, and closes a connection that has said everything."""
        if side.closed:
            return
        if side.ended and side.peer.ended:
            self._close(side, abort=False)
            return
        for each in (side, side.peer):
            if (wanted := each.wanted()) == each.events:
                continue
            if not each.events:
                self._epoll.register(each.socket, wanted)
            elif not wanted:
                self._epoll.unregister(each.socket)  # else a hang-up would wake us for ever
            else:
                self._epoll.modify(each.socket, wanted)
            each.events = wanted

    def _close(self, side: _Side, *, abort: bool) -> None:
        """Ends both ends; `abort` tells them with a reset that something was lost."""
        if side.closed:
            return
        for each in (side, side.peer):
            each.closed = True
            del self._sides[each.socket.fileno()]
            del self._receiver[each.receives]
            if abort:
                each.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.socket.close()


def seconds(text: str) -> float:
    """A time such as "20ms" or "0.5s"; no unit means seconds."""
    match = re.fullmatch(rf"({_NUMBER}) ?(ms|s|)", text)
    if not match:
        raise UsageError(f"{text!r} is not a time", hint="write it like 20ms")
    return float(match[1]) * (0.001 if match[2] == "ms" else 1.0)


def bits_per_second(text: str) -> float:
    """A rate such as "200Mbit", "1Gbit" or "0" for no cap. Others without a unit are mistakes: 200 bits a second."""
    match = re.fullmatch(rf"({_NUMBER}) ?([kKMG]?)(?:bit(?:/s)?)?", text)
    if not match or (match[0] == match[1] and float(match[1])):
        raise UsageError(f"{text!r} is not a rate", hint="write it like 200Mbit")
    return float(match[1]) * _UNITS[match[2]]


def _host_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"{text!r} is not an address", hint="write it like 127.0.0.1:5000")
    return host.strip("[]"), int(port)


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints the address to connect to, then serves until interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m ckptfs.bench.link",
        description="A TCP proxy that behaves like a slow link.",
        epilog="example: python -m ckptfs.bench.link --target 127.0.0.1:5000 --rtt 20ms --rate 200Mbit",
    )
    parser.add_argument("--target", required=True, metavar="HOST:PORT", help="where connections go")
    parser.add_argument("--rtt", default="20ms", help="round-trip time (default 20ms)")
    parser.add_argument("--rate", default="200Mbit", help="bandwidth per direction, 0 for no cap (default 200Mbit)")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="default: a free loopback port")
    parser.add_argument("--control", action="store_true", help="answer 'stats' on standard input, end with it")
    options = parser.parse_args(arguments)
    try:
        target, listen = _host_port(options.target), _host_port(options.listen)
        rtt, rate = seconds(options.rtt), bits_per_second(options.rate)
        listener = socket.create_server(listen, backlog=1024)
    except UsageError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"cannot listen on {options.listen}: {error.strerror}; choose another --listen", file=sys.stderr)
        return 5
    host, port = listener.getsockname()[:2]
    print(f"{host}:{port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        _Proxy(listener, target, rtt, rate).run(sys.stdin.fileno() if options.control else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
