"""When to ask again: pure decisions on a clock that takes no time."""

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import IntegrityError, UnavailableError
from ckptfs.settings import Timeouts
from ckptfs.sources.retry import Attempts, HostWindows, NoAnswer, parse_retry_after
from ckptfs.telemetry import NetworkCounters
from tests.support.clock import ManualClock

BUSY = UnavailableError("answered 500")
GONE = NoAnswer("refused")


class Case:
    def __init__(self, seconds: float = 60.0, *, outlast: bool = False, dice: float = 0.5) -> None:
        self.clock = ManualClock(dice=dice)
        self.windows = HostWindows()
        self.counters = NetworkCounters()
        self.attempts = Attempts(Timeouts(), self.windows, self.counters, self.clock, seconds=seconds, outlast=outlast)

    def fail(self, error: UnavailableError | IntegrityError) -> int:
        """Tries until the error comes out; how many there were."""
        tries = 0
        with pytest.raises(type(error)) as caught:
            while True:
                tries += 1
                self.attempts.failed(error)
        assert caught.value is error
        return tries


def test_errors_are_retried_five_times_with_doubling_waits() -> None:
    case = Case()
    assert case.fail(BUSY) == 5
    assert case.clock.slept == [0.25, 0.5, 1.0, 2.0]
    assert (case.counters.retries, case.counters.errors) == (4, 1)


@pytest.mark.parametrize("dice", [0.0, 0.999])
def test_waits_vary_by_a_tenth(dice: float) -> None:
    case = Case(dice=dice)
    case.fail(BUSY)
    for wait, exact in zip(case.clock.slept, [0.25, 0.5, 1.0, 2.0], strict=True):
        assert 0.9 * exact <= wait <= 1.1 * exact
        assert wait != exact


def test_what_a_retry_cannot_help_is_not_retried() -> None:
    assert Case().fail(IntegrityError("wrong")) == 1
    assert Case(outlast=True).fail(UnavailableError("bad certificate", permanent=True)) == 1


def test_an_outage_is_outlasted_until_the_deadline() -> None:
    case = Case(outlast=True)
    began = case.clock.now()
    assert case.fail(GONE) > 20
    assert case.clock.now() - began == pytest.approx(60.0)
    assert max(case.clock.slept) <= 3.0


def test_answers_that_are_errors_are_not_outlasted() -> None:
    assert Case(outlast=True).fail(BUSY) == 5


def test_without_patience_an_outage_ends_it_after_five_tries() -> None:
    assert Case().fail(GONE) == 5


def test_the_deadline_ends_it_before_the_tries_are_used_up() -> None:
    case = Case(seconds=1.0)
    began = case.clock.now()
    case.fail(BUSY)
    assert case.clock.now() - began == pytest.approx(1.0)


def test_progress_starts_the_patience_anew() -> None:
    case = Case(seconds=60.0)
    for _ in range(20):
        case.attempts.failed(BUSY)
        case.attempts.failed(BUSY)
        case.attempts.progress(Timeouts().stall_bytes)
    assert case.attempts.number == 1
    assert case.attempts.remaining() == 60.0


def test_a_few_bytes_are_no_progress() -> None:
    case = Case()
    case.attempts.failed(BUSY)
    case.attempts.progress(Timeouts().stall_bytes - 1)
    assert case.attempts.number == 2
    case.attempts.progress(1)
    assert case.attempts.number == 1


def test_a_closed_connection_is_replaced_at_once_but_only_the_first_time() -> None:
    case = Case(outlast=True)
    stale = NoAnswer("closed", at_once=True)
    case.attempts.failed(stale)
    case.attempts.failed(stale)
    assert case.clock.slept == [0.0, 0.5]


@pytest.mark.parametrize("dice", [0.0, 0.999])
def test_retry_after_is_waited_for_and_not_much_longer(dice: float) -> None:
    case = Case(dice=dice)
    case.attempts.failed(UnavailableError("busy", retry_after=2.0))
    assert 2.0 <= case.clock.slept[0] <= 3.0


def test_a_retry_after_behind_the_deadline_is_not_waited_for() -> None:
    case = Case(seconds=10.0)
    assert case.fail(UnavailableError("busy", retry_after=11.0)) == 1
    assert case.clock.slept == []


def test_nobody_enters_a_closed_window() -> None:
    case = Case(dice=0.0)
    case.windows.close("h", case.clock.now() + 5)
    case.windows.close("h", case.clock.now() + 2)  # does not shorten it
    case.attempts.enter("other")
    assert case.clock.slept == []
    began = case.clock.now()
    case.attempts.enter("h")
    assert case.clock.now() - began == 5


def test_a_window_that_opens_too_late_is_an_error_at_once() -> None:
    case = Case(seconds=10.0)
    case.windows.close("h", case.clock.now() + 11)
    with pytest.raises(UnavailableError, match="h wants to be left alone for 11 s") as caught:
        case.attempts.enter("h")
    assert caught.value.retry_after == 11
    assert case.clock.slept == []


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        (" 120 ", 120.0),
        ("9" * 30, 1e9),
        ("-1", None),
        ("soon", None),
        ("", None),
        ("1.5", None),
        (format_datetime(datetime.fromtimestamp(1_000_030, UTC), usegmt=True), 30.0),
        (format_datetime(datetime.fromtimestamp(999_000, UTC), usegmt=True), 0.0),
    ],
)
def test_retry_after_headers(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, 1_000_000.0) == seconds


def test_retry_after_as_seconds_since_the_epoch() -> None:
    """Docker Hub has sent such; taken for a duration they close a host for 54 years."""
    assert parse_retry_after("1700000042", 1_700_000_000.0) == 42.0
    assert parse_retry_after("1700000042", 1_700_000_100.0) == 0.0


@given(st.text(max_size=40))
def test_any_retry_after_is_a_time_or_none(value: str) -> None:
    found = parse_retry_after(value, 0.0)
    assert found is None or found >= 0
