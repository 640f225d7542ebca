"""Several ranges of a blob with one request, and what becomes of them where that goes wrong."""

from collections.abc import Iterator
from random import Random

import pytest

from ckptfs.model.blob import Blob
from tests.support.fake_registry import (
    Claims,
    FakeRegistry,
    Fault,
    Reset,
    Status,
    Truncate,
    WrongRange,
)
from tests.support.sources import Client, client

TAR = "application/vnd.oci.image.layer.v1.tar"
SIZE = 9_000_000  # more than the 8 MiB that a source takes whole in place of a range
DATA = Random(1).randbytes(SIZE)
RANGES = [(start, start + 5000 + start % 7) for start in range(0, SIZE - 10_000, 400_000)]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        yield registry


@pytest.fixture
def blob(registry: FakeRegistry) -> Iterator[Blob]:
    """One of which a range has been read; the log is empty."""
    with client(registry) as c:
        yield warmed(registry, c)


def warmed(registry: FakeRegistry, c: Client) -> Blob:
    blob = c.layer()
    assert blob.ranges_at_once == 1  # nobody knows yet
    assert blob.read_at(1, 10) == DATA[1:11]
    registry.log.clear()
    return blob


def got(blob: Blob, ranges: list[tuple[int, int]] = RANGES) -> list[bytes]:
    """What came of each range; every byte once, ascending."""
    pieces: dict[tuple[int, int], bytes] = dict.fromkeys(ranges, b"")
    for at, piece in blob.stream_ranges(ranges):
        place = next((start, end) for start, end in ranges if start <= at < end)
        assert at == place[0] + len(pieces[place])
        pieces[place] += piece
    return [pieces[place] for place in ranges]


WANTED = [DATA[start:end] for start, end in RANGES]


def test_one_request(registry: FakeRegistry, blob: Blob) -> None:
    assert 1 < len(RANGES) <= blob.ranges_at_once
    assert got(blob) == WANTED
    assert len(registry.log) == 1


def test_a_registry_that_does_not_know_it_is_asked_for_one_at_a_time(registry: FakeRegistry, blob: Blob) -> None:
    registry.many_ranges = False
    assert got(blob) == WANTED
    assert len(registry.log) == 1 + len(RANGES)
    assert blob.ranges_at_once == 1
    assert got(blob) == WANTED  # and is not asked again
    assert len(registry.log) == 1 + 2 * len(RANGES)


@pytest.mark.parametrize(
    "fault",
    [
        Truncate(after=20_000),
        Reset(after=20_000),
        Status(503),
        Status(416),
        Status(501),
        WrongRange(shift=3),
        Claims({"Content-Type": "text/plain"}),
        Claims({"Content-Encoding": "gzip"}),
    ],
    ids=repr,
)
def test_a_bad_answer_costs_a_request_and_no_byte(registry: FakeRegistry, blob: Blob, fault: Fault) -> None:
    registry.script = {("blobs/", 1): fault}
    assert got(blob) == WANTED
    assert len(registry.log) > len(RANGES)


def test_a_reset_is_no_reason_to_ask_for_one_at_a_time_for_long(registry: FakeRegistry, blob: Blob) -> None:
    registry.script = {("blobs/", 1): Reset(after=20_000)}
    assert got(blob) == WANTED  # ends with single ranges, which worked
    registry.log.clear()
    assert got(blob) == WANTED
    assert len(registry.log) == 1


def test_more_than_may_be_asked_for(registry: FakeRegistry, blob: Blob) -> None:
    ranges = [(start, start + 10) for start in range(0, 100 * blob.ranges_at_once, 100)]
    ranges.append((SIZE - 10, SIZE))
    assert got(blob, ranges) == [DATA[start:end] for start, end in ranges]
