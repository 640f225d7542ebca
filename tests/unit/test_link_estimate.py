"""How much may be on the way: bandwidth x delay and a little, from samples of the traffic that there is."""

import os

import pytest

from ckptfs.engine.link import LinkEstimate
from ckptfs.settings import KiB, MiB, Sizes

SECOND = 0.1  # seconds that a sample takes


def _measured(rate: float, delay: float, *, full: bool = True) -> LinkEstimate:
    link = LinkEstimate(Sizes())
    link.first_byte(delay)
    link.busy()
    link.received(1, 0.0)
    link.received(int(rate * SECOND), SECOND)
    link.sample(SECOND, full=full)
    return link


@pytest.mark.parametrize(
    ("rate", "delay", "seconds"),
    [
        (25e6, 0.02, 0.02 + 0.03),  # 200 Mbit/s
        (25e6, 0.2, 0.4),
        (100e6, 0.001, 0.001 + 0.03),
    ],
)
def test_the_window_is_what_the_link_holds_and_a_little(rate: float, delay: float, seconds: float) -> None:
    assert _measured(rate, delay).window == pytest.approx(rate * seconds, rel=0.01)


def test_one_request_is_longer_where_the_way_is_short() -> None:
    assert _measured(25e6, 0.02).extent == Sizes().in_flight
    assert _measured(25e6, 0.2).extent == Sizes().sequential_extent


def test_more_is_on_the_way_where_nobody_waits_for_single_pages() -> None:
    link = _measured(25e6, 0.02)
    link.be_patient(True)
    assert link.window == pytest.approx(25e6 * (0.02 + 0.25), rel=0.01)
    assert link.extent == Sizes().in_flight
    far = _measured(25e6, 0.2)
    far.be_patient(True)
    assert far.extent == Sizes().sequential_extent
    link.be_patient(False)
    assert link.window == pytest.approx(25e6 * (0.02 + 0.03), rel=0.01)


def test_few_long_requests_where_bytes_come_faster_than_they_are_decoded() -> None:
    link = _measured(100e6, 0.0005)
    link.spent(MiB, 0.01, 0.1)
    assert link.outrun
    assert link.jobs == max(min(len(os.sched_getaffinity(0)), Sizes().jobs), 2)
    assert (link.extent, link.window) == (8 * MiB, 16 * MiB)


def test_what_is_waited_for_says_that_it_is_the_link_that_takes_the_time() -> None:
    link = _measured(25e6, 0.02)
    window = link.window
    for waiting in (0.01, 0.09, 0.08, 0.1, 0.09):
        link.spent(MiB, waiting, 0.1)
    assert not link.outrun
    assert (link.jobs, link.window) == (Sizes().jobs, window)


def test_small_bodies_which_come_in_one_piece_do_not_tell_which_it_is() -> None:
    link = _measured(25e6, 0.02)
    for _ in range(100):
        link.spent(16 * KiB, 0.0, 0.0001)
    assert not link.outrun


def test_the_window_is_never_more_than_memory_may_hold_nor_less_than_two_chunks() -> None:
    assert _measured(5e9, 0.1).window == Sizes().in_flight
    assert _measured(6e6, 0.0).window == 512 * KiB


def test_traffic_that_did_not_fill_the_link_says_only_that_it_carries_so_much() -> None:
    assert _measured(6e6, 0.02, full=False).rate == 0
    assert _measured(200e6, 0.02, full=False).rate == pytest.approx(200e6)


def test_two_chunks_in_one_burst_are_no_sample() -> None:
    link = LinkEstimate(Sizes())
    link.busy()
    link.received(1, 0.0)
    link.received(8 * MiB, 0.001)
    link.sample(0.001, full=True)
    assert link.rate == 0
