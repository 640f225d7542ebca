"""One direction of a slow link as a calculation: who sends next, when it is through, when it arrives.

Owns the bandwidth cap (a virtual clock), fairness (round robin in small quanta) and the delay line. Never touches a
socket or a clock: the caller passes the time in, so a test can run hours of link in a millisecond. Called by link.py.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

KiB = 1024
END = b""  # the sender's last piece: it takes no time on the link but arrives in order, delayed like data

_QUANTUM_SECONDS = 0.0007  # one turn of a flow; a small request waits for one turn of every other flow at most
_QUANTUM_BYTES = (4 * KiB, 64 * KiB)
_BACKLOG_SECONDS = 0.020  # kept ready per flow, so that a process scheduled late does not waste the link
_LEAST_BUFFER = 256 * KiB


@dataclass(slots=True, eq=False)
class Flow:
    """One direction of one connection: what waits for the link, and how much is on the way to the receiver."""

    opens_at: float  # seconds on the caller's clock; nothing is sent before (the handshake)
    backlog: int = 0
    on_the_way: int = 0  # sent, and not yet taken by the receiver
    _waiting: deque[memoryview] = field(default_factory=deque)
    _listed: bool = False

    def put(self, data: bytes) -> None:
        self._waiting.append(memoryview(data))
        self.backlog += len(data)

    def take(self, most: int) -> memoryview:
        """The next piece, at most `most` bytes; an empty one is END."""
        piece = self._waiting[0]
        if len(piece) > most:
            self._waiting[0] = piece[most:]
            piece = piece[:most]
        else:
            self._waiting.popleft()
        self.backlog -= len(piece)
        return piece

    @property
    def idle(self) -> bool:
        return not self._waiting


class Channel:
    """`rate` in bytes per second (0: no cap), `delay` in seconds, one way.

    `deliver(flow, piece)` is called when a piece arrives.
    """

    def __init__(self, rate: float, delay: float, deliver: Callable[[Flow, memoryview], None]) -> None:
        self.rate = rate
        self.delay = delay
        self.bytes_sent = 0
        least, most = _QUANTUM_BYTES
        self.quantum = min(max(int(rate * _QUANTUM_SECONDS), least), most) if rate else most
        self.backlog_limit = max(_LEAST_BUFFER, int(rate * _BACKLOG_SECONDS))
        # Two bandwidth-delay products of the round trip: one connection alone can fill the link, as autotuned TCP does.
        self.window = max(_LEAST_BUFFER, int(rate * delay * 4)) if rate else 16 * 1024 * KiB
        self._deliver = deliver
        self._free_at = 0.0
        self._ring: deque[Flow] = deque()
        self._opening: list[tuple[float, int, Flow]] = []
        self._line: deque[tuple[float, Flow, memoryview]] = deque()  # in order of arrival
        self._opened = 0

    def offer(self, flow: Flow, data: bytes, now: float) -> None:
        flow.put(data)
        self._enlist(flow, now)

    def has_room(self, flow: Flow) -> bool:
        """Whether the sender may go on: it is held back beyond the backlog limit."""
        return flow.backlog < self.backlog_limit

    def taken(self, flow: Flow, count: int, now: float) -> None:
        """The receiver took `count` bytes of what was delivered; its window opens by as much."""
        flow.on_the_way -= count
        self._enlist(flow, now)

    def advance(self, now: float) -> set[Flow]:
        """Does what is due: sends while the link is free, and delivers what has arrived. Returns who sent."""
        senders = set()
        while self._opening and self._opening[0][0] <= now:
            flow = heapq.heappop(self._opening)[2]
            flow._listed = False
            self._enlist(flow, now)
        while self._ring and self._free_at <= now:
            flow = self._ring.popleft()
            self._send(flow)
            senders.add(flow)
        while self._line and self._line[0][0] <= now:
            _, flow, piece = self._line.popleft()
            self._deliver(flow, piece)
        return senders

    def next_event(self) -> float | None:
        """When `advance` has something to do, on the caller's clock; None: not before another call."""
        times = []
        if self._opening:
            times.append(self._opening[0][0])
        if self._ring:
            times.append(self._free_at)
        if self._line:
            times.append(self._line[0][0])
        return min(times, default=None)

    def _enlist(self, flow: Flow, now: float) -> None:
        if flow._listed or flow.idle or flow.on_the_way >= self.window:
            return
        flow._listed = True
        if flow.opens_at > now:
            self._opened += 1  # only makes the heap's tuples comparable
            heapq.heappush(self._opening, (flow.opens_at, self._opened, flow))
            return
        if not self._ring:
            self._free_at = max(self._free_at, now)  # an idle link saves nothing up; a late caller loses nothing
        self._ring.append(flow)

    def _send(self, flow: Flow) -> None:
        piece = flow.take(self.quantum)
        flow.on_the_way += len(piece)
        self.bytes_sent += len(piece)
        if self.rate:
            self._free_at += len(piece) / self.rate
        self._line.append((self._free_at + self.delay, flow, piece))
        if not flow.idle and flow.on_the_way < self.window:
            self._ring.append(flow)
        else:
            flow._listed = False
