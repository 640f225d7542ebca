"""Rows N1, N9, N11 and N12 with several hosts: who is asked, fail-over, mirrors that lie or are late.

Each host is a registry of its own over real TCP. Time limits are tenths of a second unless a row is about the real
ones.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest
import trio

from ckptfs.errors import NotFoundError, UnavailableError
from ckptfs.image import OpenImage
from ckptfs.model.oci import Manifest
from ckptfs.settings import KiB, MiB, Registries, Sizes, Timeouts
from ckptfs.sources.standing import Standing
from tests.support.addresses import dark, resolve
from tests.support.chunked import PAGES, add_chunked, read_file, with_image
from tests.support.fake_registry import Access, FakeRegistry, Flip, Reset, Silent, Status, Trickle
from tests.support.faulty import BLOB, DATA, TAR, Record
from tests.support.hosts import Hosts, read
from tests.support.registry_faults import Fault
from tests.support.sources import QUICK, client, layers
from tests.support.tools import free_port

# -- who is asked ------------------------------------------------------------------------------------------------------


def test_blobs_come_from_the_first_mirror_and_tags_from_the_registry(hosts: Hosts) -> None:
    source = hosts.client.source()
    image = source.resolve()
    assert isinstance(image, Manifest)
    assert [len(r.log) for r in (*hosts.mirrors, hosts.home)] == [0, 0, 1]
    assert source.fetch(image.config) == b"{}"
    read(source.blob(image.layers[0]))
    assert [len(r.log) for r in (*hosts.mirrors, hosts.home)] == [3, 0, 1]
    assert all(access.query == f"ns={hosts.home.host.replace(':', '%3A')}" for access in hosts.mirrors[0].log)


def test_a_digest_comes_from_a_mirror(hosts: Hosts) -> None:
    image = hosts.client.source().resolve()
    found = hosts.client.source(f"repo@{image.digest}").resolve()
    assert found.digest == image.digest
    assert [len(r.log) for r in (*hosts.mirrors, hosts.home)] == [1, 0, 1]


def test_tags_from_mirrors_only_when_they_may_say_it() -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack, tags=True)
        del hosts.mirrors[0].manifests["repo", "latest"]
        hosts.client.source().resolve()
        assert [len(r.log) for r in (*hosts.mirrors, hosts.home)] == [1, 1, 0]


def test_a_registry_that_is_away_costs_nothing_when_mirrors_have_all(hosts: Hosts) -> None:
    digest = hosts.client.source().resolve().digest
    hosts.home.__exit__()
    source = hosts.client.source(f"repo@{digest}")
    read(source.blob(layers(source)[0]))
    assert hosts.client.counters.retries == 0


# -- fail-over ---------------------------------------------------------------------------------------------------------


@pytest.mark.row("N9")
@pytest.mark.parametrize(
    "fault", [Status(500), Status(503, retry_after=60), Status(404), Status(403), Reset(), Reset(100_000)], ids=str
)
def test_a_mirror_that_fails_is_passed_over_at_once(hosts: Hosts, fault: Status | Reset) -> None:
    blob = hosts.blob
    hosts.mirrors[0].script[BLOB, None] = fault
    began = time.monotonic()
    read(blob)
    assert time.monotonic() - began < 1.0
    assert hosts.asked()[1:] == [2, 0], "one byte, to see whether it serves ranges, and the range"
    assert hosts.client.counters.errors == 0


def test_a_mirror_that_failed_is_left_alone_for_a_while(hosts: Hosts) -> None:
    blob = hosts.blob
    hosts.mirrors[0].script[BLOB, None] = Status(500)
    for _ in range(10):
        read(blob)
    assert hosts.asked() == [1, 11, 0]
    hosts.mirrors[0].script.clear()
    time.sleep(1.1)
    read(blob)
    assert hosts.asked()[0] == 3, "it is well again: one byte, and the range"


def test_mirrors_that_cannot_be_reached(record_property: Record) -> None:
    with FakeRegistry() as home:
        home.add_image("repo", "latest", [(TAR, DATA)])
        registries = Registries(mirrors={home.host: (f"127.0.0.1:{free_port()}", "mirror.invalid")})
        with client(home, registries=registries) as c:
            began = time.monotonic()
            blob = c.layer()
            for _ in range(20):
                read(blob)
            took = time.monotonic() - began
    record_property("figure", f"2 mirrors that are away cost {took:.2f} s in 20 reads")
    assert took < 2.0


def test_when_all_fail_the_registrys_own_error_is_told(hosts: Hosts) -> None:
    blob = hosts.blob
    for mirror in hosts.mirrors:
        mirror.script[BLOB, None] = Status(404)
    hosts.home.script[BLOB, None] = Status(500)
    with pytest.raises(UnavailableError, match=f"{hosts.home.host}.*answered 500"):
        read(blob)
    assert hosts.asked() == [1, 1, QUICK.tries_per_host]
    hosts.home.script[BLOB, None] = Status(404)
    with pytest.raises(NotFoundError, match=hosts.home.host):
        read(blob)


def test_a_mirror_that_is_away_is_not_waited_for_when_the_registry_has_said_no(hosts: Hosts) -> None:
    blob = hosts.blob
    hosts.mirrors[0].script[BLOB, None] = hosts.mirrors[1].script[BLOB, None] = Reset()
    hosts.home.script[BLOB, None] = Status(404)
    began = time.monotonic()
    with pytest.raises(NotFoundError):
        read(blob)
    assert time.monotonic() - began < 0.6 * QUICK.read_deadline


@pytest.mark.row("N12")
def test_an_outage_of_all_hosts_is_waited_out() -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack, timeouts=QUICK._replace(read_deadline=3.0))
        blob = hosts.blob
        for registry in (hosts.home, *hosts.mirrors):
            registry.script[BLOB, None] = Reset()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(read, blob)
            time.sleep(1.0)
            assert not done.done()
            hosts.mirrors[1].script.clear()
            done.result(3.0)


def test_the_deadline_holds_for_all_hosts_together() -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack, timeouts=QUICK._replace(read_deadline=1.0))
        blob = hosts.blob
        for registry in (hosts.home, *hosts.mirrors):
            registry.script[BLOB, None] = Silent()
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            read(blob)
        assert time.monotonic() - began < 2.0


def test_a_body_goes_on_at_another_host_where_it_ended(hosts: Hosts) -> None:
    blob = hosts.blob
    read(blob)
    hosts.mirrors[0].script[BLOB, None] = Reset(1 * MiB)
    read(blob, 0, 4 * MiB)
    rest = hosts.mirrors[1].log[-1].range
    assert rest is not None and 0 < rest[0] <= 1 * MiB and rest[1] == 4 * MiB - 1
    assert hosts.client.counters.bytes <= 4 * MiB + 300_002


# -- N1: wrong bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.row("N1")
def test_wrong_bytes_are_asked_for_elsewhere_and_remembered(hosts: Hosts) -> None:
    blob = hosts.blob
    hosts.mirrors[0].script[BLOB, None] = Flip()
    with pytest.raises(AssertionError):
        read(blob)
    read(blob, attempt=1)
    assert hosts.asked() == [2, 2, 0]
    for _ in range(5):
        read(blob)
    assert hosts.asked()[0] == 2, "scored down"


@pytest.mark.row("N1")
def test_documents_that_a_mirror_damages(hosts: Hosts) -> None:
    image = hosts.client.source().resolve()
    assert isinstance(image, Manifest)
    for part in ("manifests/", BLOB):
        hosts.mirrors[0].script[part, None] = Flip()
    source = hosts.client.source(f"repo@{image.digest}")
    assert source.resolve() == image
    assert source.fetch(image.config) == b"{}"
    assert hosts.client.standing.avoided(hosts.mirrors[0].host, time.monotonic() + 20)


@pytest.mark.row("N1")
def test_the_only_host_that_answers_is_asked_again(hosts: Hosts) -> None:
    blob = hosts.blob
    for registry in (hosts.mirrors[1], hosts.home):
        registry.script[BLOB, None] = Status(404)
    hosts.mirrors[0].script[BLOB, 2] = Flip()
    with pytest.raises(AssertionError):
        read(blob)
    read(blob, attempt=1)


class Flipping(FakeRegistry):
    """One bit of one response in twenty is wrong; with `spare`, never of one that is so short."""

    spare = 0
    flips = 0
    dice = Random(12)

    def note(self, access: Access) -> Fault | None:
        fault = super().note(access)
        first, last = access.range or (0, 0)
        if last - first > self.spare and self.dice.random() < 0.05:
            self.flips += 1
            return Flip(self.dice.randrange(1 << 30))
        return fault


@pytest.mark.row("N1")
@pytest.mark.parametrize("good", [True, False], ids=["a good mirror", "no good mirror"])
def test_ten_thousand_chunks_from_a_mirror_that_flips_bits(good: bool, tmp_path: Path, record_property: Record) -> None:
    """Without a good mirror the same one is asked for the chunk again, and is lucky then."""
    chunk, count, step = 4 * KiB, 10_000, 512 * KiB
    data = Random(11).randbytes(chunk * count)

    async def part(image: OpenImage, offset: int) -> None:
        size = min(step, len(data) - offset)
        assert await read_file(image, PAGES, offset, size) == data[offset : offset + size]

    async def work(image: OpenImage) -> int:
        await read_file(image, PAGES, 0, 1)
        before = image.counters.bytes
        offsets = list(range(0, len(data), step))
        Random(13).shuffle(offsets)
        for at in range(0, len(offsets), 8):
            async with trio.open_nursery() as nursery:
                for offset in offsets[at : at + 8]:
                    nursery.start_soon(part, image, offset)
        return image.counters.bytes - before

    with FakeRegistry() as home, Flipping() as bad, FakeRegistry() as other:
        for registry in (home, bad, other):
            add_chunked(registry, {PAGES: data}, chunk)
        if not good:
            bad.spare = 2 * chunk
            home.script[BLOB, None] = other.script[BLOB, None] = Status(404)
        with client(home, registries=Registries(mirrors={home.host: (bad.host, other.host)})) as c:
            c.settings = c.settings._replace(sizes=Sizes(random_extent=64 * KiB, sequential_extent=64 * KiB))
            extra = max(with_image(c, tmp_path, work) / len(data) - 1, 0)
        kind = "a good mirror" if good else "no good mirror"
        record_property("figure", f"{kind}: {bad.flips} flips, 0 wrong bytes, 0 EIO, {extra:.1%} more fetched")
        assert bad.flips > (0 if good else 20)
        assert extra <= 0.06


# -- N11: late hosts ---------------------------------------------------------------------------------------------------


@pytest.mark.row("N11")
def test_data_of_a_good_mirror_within_six_seconds(record_property: Record) -> None:
    """With the limits that users have; nothing is known of the host."""

    def with_first_mirror(fault: Fault) -> float:
        with ExitStack() as stack:
            hosts = Hosts(stack, timeouts=Timeouts())
            blob = hosts.blob
            hosts.client.standing = hosts.client.transport.standing = Standing()
            hosts.mirrors[0].script[BLOB, None] = fault
            began = time.monotonic()
            read(blob)
            return time.monotonic() - began

    with ThreadPoolExecutor(2) as pool:
        silent, trickle = pool.map(with_first_mirror, (Silent(), Trickle(0.3)))
    record_property("figure", f"good mirror's data after {silent:.1f} s of silence, {trickle:.1f} s of trickle")
    assert max(silent, trickle) <= 6.0


@pytest.mark.row("N11")
@pytest.mark.parametrize("count", [1, 3])
def test_a_mirror_that_takes_no_connection_costs_three_seconds(
    count: int, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """At any of its addresses. The default time limits."""
    with FakeRegistry() as home, ExitStack() as stack:
        addresses, port = [f"127.0.0.{number}" for number in range(2, 2 + count)], 0
        for address in addresses:
            port = stack.enter_context(dark(address, port))
        resolve(monkeypatch, "mirror.example", *addresses)
        home.add_image("repo", "latest", [(TAR, DATA)])
        registries = Registries(mirrors={home.host: (f"http://mirror.example:{port}",)})
        with client(home, timeouts=Timeouts(), registries=registries) as c:
            blob = c.layer()
            began = time.monotonic()
            read(blob)
            took = time.monotonic() - began
    record_property("figure", f"a mirror of {count} addresses that take no connection: {took:.1f} s")
    assert 2.5 < took <= 4.0


@pytest.mark.row("N11")
def test_a_host_that_is_later_than_usual_is_hedged(record_property: Record) -> None:
    """It used to answer in milliseconds: the wait for it is a second, not five, and less than ever for the next."""
    with ExitStack() as stack:
        hosts = Hosts(stack, timeouts=Timeouts())
        blob = hosts.blob
        read(blob)
        hosts.mirrors[0].script[BLOB, None] = Silent()
        began = time.monotonic()
        read(blob)
        first = time.monotonic() - began
        read(blob)
        second = time.monotonic() - began - first
    record_property("figure", f"usually quick, now silent: {first:.2f} s, then {second:.2f} s")
    assert first < 3.0
    assert second < 0.8


@pytest.mark.row("N11")
def test_a_single_host_is_hedged_on_another_connection(record_property: Record) -> None:
    with FakeRegistry() as registry, client(registry, timeouts=Timeouts()) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        blob = c.layer()
        read(blob)
        registry.script[BLOB, 1] = Silent()
        began = time.monotonic()
        read(blob)
        took = time.monotonic() - began
    record_property("figure", f"one host, another connection: {took:.2f} s")
    assert 0.9 < took < 3.0
