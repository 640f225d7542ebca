"""The link's arithmetic, in made-up time: rate, delay, fairness, windows, the handshake."""

from collections import defaultdict

import pytest

from ckptfs.bench.channel import END, Channel, Flow

RATE = 25e6  # bytes per second: 200 Mbit/s
DELAY = 0.010


class Line:
    """A channel with a clock of its own, whose receivers take everything at once."""

    def __init__(self, rate: float = RATE, delay: float = DELAY, *, receivers_take: bool = True) -> None:
        self.now = 0.0
        self.channel = Channel(rate, delay, self._deliver)
        self.got: dict[Flow, list[tuple[float, int]]] = defaultdict(list)
        self._take = receivers_take

    def _deliver(self, flow: Flow, piece: memoryview) -> None:
        self.got[flow].append((self.now, len(piece)))
        if self._take:
            self.channel.taken(flow, len(piece), self.now)

    def offer(self, flow: Flow, data: bytes) -> None:
        self.channel.offer(flow, data, self.now)

    def run(self, until: float = float("inf")) -> None:
        while (at := self.channel.next_event()) is not None and at <= until:
            self.now = max(self.now, at)
            self.channel.advance(self.now)

    def bytes_of(self, flow: Flow) -> int:
        return sum(count for _, count in self.got[flow])


def test_one_flow_gets_the_whole_rate_and_arrives_after_the_delay() -> None:
    line, flow = Line(), Flow(0.0)
    line.offer(flow, bytes(25_000_000))
    line.run()
    assert line.got[flow][0][0] == pytest.approx(DELAY + line.channel.quantum / RATE)
    assert line.now == pytest.approx(1.0 + DELAY)
    assert line.bytes_of(flow) == line.channel.bytes_sent == 25_000_000


def test_without_a_cap_only_the_delay_counts() -> None:
    line, flow = Line(rate=0), Flow(0.0)
    line.offer(flow, bytes(5_000_000))
    line.run()
    assert line.now == pytest.approx(DELAY)


def test_a_small_request_waits_for_one_turn_of_the_others() -> None:
    line, big, small = Line(), Flow(0.0), Flow(0.0)
    line.offer(big, bytes(10_000_000))
    line.run(until=0.1)
    line.offer(small, bytes(1000))
    asked = line.now
    line.run()
    assert line.got[small][0][0] - asked < DELAY + 2 * line.channel.quantum / RATE + 1000 / RATE


def test_flows_share_evenly() -> None:
    line, flows = Line(), [Flow(0.0) for _ in range(5)]
    for flow in flows:
        line.offer(flow, bytes(10_000_000))
    line.run(until=1.0)
    shares = [line.bytes_of(flow) for flow in flows]
    assert max(shares) - min(shares) <= line.channel.quantum


def test_a_late_caller_loses_no_bandwidth_but_an_idle_link_saves_nothing_up() -> None:
    line, flow = Line(), Flow(0.0)
    line.offer(flow, bytes(250_000))  # 10 ms of link
    line.now = 0.5  # the process was not scheduled for half a second
    line.channel.advance(line.now)
    line.run()
    assert line.now == pytest.approx(0.5)
    line.now = 2.0
    line.offer(flow, bytes(250_000))
    line.run()
    assert line.now == pytest.approx(2.0 + 0.010 + DELAY)


def test_nothing_is_sent_before_the_handshake_is_over() -> None:
    line, flow = Line(), Flow(opens_at=0.020)
    line.offer(flow, b"GET")
    line.run()
    assert line.now == pytest.approx(0.020 + DELAY, abs=1e-6)


def test_a_receiver_that_takes_nothing_stops_its_flow_at_the_window() -> None:
    line, stuck, other = Line(receivers_take=False), Flow(0.0), Flow(0.0)
    line.offer(stuck, bytes(8_000_000))
    line.run()
    assert line.channel.window <= line.bytes_of(stuck) < line.channel.window + line.channel.quantum
    line.offer(other, bytes(1000))
    line.run()
    assert line.bytes_of(other) == 1000
    line.channel.taken(stuck, 100_000, line.now)
    before = line.bytes_of(stuck)
    line.run()
    assert line.bytes_of(stuck) > before


def test_a_sender_is_held_back_beyond_the_backlog_limit_and_let_on_when_it_drains() -> None:
    line, flow = Line(), Flow(0.0)
    line.offer(flow, bytes(line.channel.backlog_limit - 1))
    assert line.channel.has_room(flow)
    line.offer(flow, b"x")
    assert not line.channel.has_room(flow)
    assert line.channel.advance(0.0) == {flow}
    assert line.channel.has_room(flow)


def test_the_end_arrives_after_the_data() -> None:
    line, flow = Line(), Flow(0.0)
    line.offer(flow, bytes(100))
    line.offer(flow, END)
    line.run()
    assert [count for _, count in line.got[flow]] == [100, 0]
