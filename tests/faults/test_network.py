"""Rows N3, N4 and N8 to N12 of the reliability plan, as far as one registry and the transport go.

Each test talks to the registry that misbehaves on a script, over real TCP. Time limits are tenths of a second; where a
row is about long waits, the clock is a manual one.
"""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from random import Random

import pytest
from urllib3.exceptions import NameResolutionError

from ckptfs.errors import IntegrityError, LimitExceeded, UnavailableError
from ckptfs.model.oci import Manifest
from ckptfs.settings import MiB, Timeouts
from tests.support.clock import ManualClock
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import (
    FakeRegistry,
    Flip,
    Full200,
    Reset,
    Silent,
    Status,
    TooLong,
    Trickle,
    Truncate,
    WrongRange,
)
from tests.support.faulty import BLOB, DATA, SIZE, TAR, Faulty, Record, secure_source
from tests.support.sources import QUICK, Client, client, copy_image, layers

# -- damaged documents (chunks are checked by their formats) -----------------------------------------------------------


def test_a_document_that_was_damaged_on_the_way_is_fetched_again() -> None:
    script = {("manifests/", 1): Flip(), (BLOB, 1): Flip(7)}
    with FakeRegistry(script) as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = c.source()
        image = source.resolve()
        assert isinstance(image, Manifest)
        assert source.fetch(image.config) == b"{}"
        assert len(registry.requests("manifests/")) == len(registry.requests(BLOB)) == 2


def test_a_document_that_is_always_damaged_is_an_error_after_two_fetches() -> None:
    with FakeRegistry({("manifests/", None): Flip()}) as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        with pytest.raises(IntegrityError, match="has digest"):
            c.source().resolve()
        assert len(registry.log) == 2


# -- N3: truncated bodies ----------------------------------------------------------------------------------------------


@pytest.mark.row("N3")
def test_a_truncated_body_goes_on_where_it_ended(faulty: Faulty) -> None:
    faulty.registry.script[BLOB, 1] = Truncate(1_000_000)
    assert faulty.blob.read_at(100, 2_000_000) == DATA[100:2_000_100]
    assert [access.range for access in faulty.registry.log] == [(100, 2_000_099), (1_000_100, 2_000_099)]
    assert faulty.client.counters.bytes == 2_000_000


@pytest.mark.row("N3")
def test_bodies_truncated_anywhere(faulty: Faulty, record_property: Record) -> None:
    random, length, runs = Random(4), 262_144, 1000
    for number in range(runs):
        faulty.registry.script[BLOB, 2 * number + 1] = Truncate(random.randrange(length))
    for _ in range(runs):
        offset = random.randrange(SIZE - length)
        assert faulty.blob.read_at(offset, length) == DATA[offset : offset + length]
    again = faulty.client.counters.bytes / (runs * length) - 1
    record_property("figure", f"0 errors in {runs} runs, {again:.1%} fetched again")
    assert again <= 0.05


# -- N4: not what was asked for ----------------------------------------------------------------------------------------


@pytest.mark.row("N4")
@pytest.mark.parametrize("fault", [TooLong(), WrongRange(), Full200()])
def test_a_wrong_answer_is_dropped_after_its_headers(faulty: Faulty, fault: TooLong | WrongRange | Full200) -> None:
    faulty.registry.script[BLOB, 1] = fault
    assert faulty.blob.read_at(1000, 100_000) == DATA[1000:101_000]
    assert faulty.asked <= 3, "a range in the middle of a blob that came whole is asked for by one byte first"
    assert faulty.client.counters.bytes <= 100_001


@pytest.mark.row("N4")
@pytest.mark.parametrize("fault", [TooLong(), WrongRange()])
def test_answers_that_are_always_wrong_end_in_an_error(faulty: Faulty, fault: TooLong | WrongRange) -> None:
    faulty.registry.script[BLOB, None] = fault
    with pytest.raises(UnavailableError):
        faulty.blob.read_at(1000, 100_000)
    assert faulty.asked == QUICK.tries_per_host


@pytest.mark.row("N4")
def test_that_a_registry_has_no_ranges_is_remembered(faulty: Faulty, record_property: Record) -> None:
    faulty.registry.script[BLOB, None] = Full200()
    for _ in range(3):
        with pytest.raises(UnavailableError, match="whole blobs in place of ranges"):
            faulty.blob.read_at(1000, 100_000)
    asked = faulty.asked
    assert asked <= 8, "it might be a mirror that is still fetching the blob, for mirror_fill seconds"
    assert faulty.client.counters.bytes == 0
    assert faulty.blob.read_at(0, SIZE) == DATA, "the whole blob can still be had"
    assert faulty.asked == asked + 1
    record_property("figure", "0 body bytes taken from wrong answers")


@pytest.mark.row("N4")
@pytest.mark.parametrize(("size", "taken"), [(8 * MiB, True), (8 * MiB + 1, False)])
def test_a_whole_blob_is_taken_for_a_range_up_to_8_mib(size: int, taken: bool) -> None:
    with FakeRegistry() as registry, client(registry) as c:
        faulty = Faulty(registry, c, DATA[:size])
        registry.script[BLOB, None] = Full200()
        if taken:
            assert faulty.blob.read_at(size - 200_000, 150_000) == DATA[size - 200_000 : size - 50_000]
        else:
            with pytest.raises(UnavailableError):
                faulty.blob.read_at(size - 200_000, 150_000)


def test_a_body_compressed_on_the_way_is_refused(faulty: Faulty) -> None:
    faulty.registry.script[BLOB, 1] = Status(200, body=b"x", headers={"Content-Encoding": "gzip"})
    assert faulty.blob.read_at(5, 5) == DATA[5:10]


# -- N8, N9: busy and broken -------------------------------------------------------------------------------------------


@pytest.mark.row("N8")
@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_holds_for_all_threads(code: int, record_property: Record) -> None:
    timeouts = Timeouts(retry_first=0.25, read_deadline=10)
    with FakeRegistry() as registry, client(registry, timeouts=timeouts) as c:
        faulty = Faulty(registry, c)
        registry.script[BLOB, 1] = Status(code, retry_after=2)
        with ThreadPoolExecutor(8) as pool:
            first = pool.submit(faulty.blob.read_at, 0, 1000)
            while not faulty.asked:
                time.sleep(0.001)
            time.sleep(0.05)
            others = [pool.submit(faulty.blob.read_at, number, 1000) for number in range(7)]
            assert all(len(done.result()) == 1000 for done in [first, *others])
        began, *rest = [access.time for access in registry.requests(BLOB)]
        waits = sorted(at - began for at in rest)
        record_property("figure", f"{code}, Retry-After 2: retries after {waits[0]:.2f} to {waits[-1]:.2f} s")
        assert len(waits) == 8
        assert waits[0] >= 2.0 and waits[-1] <= 3.0


@pytest.mark.row("N8")
def test_retry_after_as_a_date(faulty: Faulty) -> None:
    began = time.time()
    faulty.registry.script[BLOB, 1] = Status(429, retry_after=formatdate(began + 1.99, usegmt=True))
    faulty.blob.read_at(0, 10)
    assert time.time() >= int(began + 1.99)


@pytest.mark.row("N8")
def test_retry_after_as_a_date_is_by_the_clock_of_the_registry() -> None:
    """Ours is an hour behind, or ahead: the host is left alone for the two seconds that it asks for."""
    for error in (-3600.0, 3600.0):
        clock = ManualClock(time.time() + error)
        with FakeRegistry() as registry, client(registry, clock=clock) as c:
            faulty = Faulty(registry, c)
            registry.script[BLOB, 1] = Status(429, retry_after=formatdate(time.time() + 2, usegmt=True))
            assert faulty.blob.read_at(0, 10) == DATA[:10]
            assert 1 <= sum(clock.slept) < 4


@pytest.mark.row("N8")
def test_a_wait_beyond_the_deadline_is_an_error_now(faulty: Faulty) -> None:
    faulty.registry.script[BLOB, None] = Status(503, retry_after=600)
    for _ in range(2):
        with pytest.raises(UnavailableError) as caught:
            faulty.blob.read_at(0, 10)
        assert caught.value.retry_after is not None and caught.value.retry_after > 590
    assert faulty.asked == 1


@pytest.mark.row("N9")
@pytest.mark.parametrize("code", [500, 502, 503, 504])
@pytest.mark.parametrize("count", [1, 4])
def test_a_few_errors_are_not_seen(faulty: Faulty, code: int, count: int) -> None:
    for number in range(1, count + 1):
        faulty.registry.script[BLOB, number] = Status(code, body=b"canary-error-body")
    assert faulty.blob.read_at(0, 1000) == DATA[:1000]
    assert faulty.asked == count + 1
    assert (faulty.client.counters.retries, faulty.client.counters.errors) == (count, 0)


@pytest.mark.row("N9")
def test_endless_errors(record_property: Record) -> None:
    clock = ManualClock()
    with FakeRegistry() as registry, client(registry, timeouts=Timeouts(), clock=clock) as c:
        faulty = Faulty(registry, c)
        registry.script[BLOB, None] = Status(500)
        began = clock.now()
        with pytest.raises(UnavailableError, match="answered 500"):
            faulty.blob.read_at(0, 1000)
        record_property("figure", f"error after {faulty.asked} tries and {clock.now() - began:.2f} s of waiting")
        assert faulty.asked == 5
        assert clock.slept == [0.25, 0.5, 1.0, 2.0]
        assert c.counters.errors == 1


# -- N10, N11, N12: connections ----------------------------------------------------------------------------------------


@pytest.mark.row("N10")
def test_resets(faulty: Faulty, record_property: Record) -> None:
    random, length, runs = Random(5), 4 * MiB, 20
    for number in range(runs):
        faulty.registry.script[BLOB, 2 * number + 1] = Reset(random.randrange(length))
    for _ in range(runs):
        offset = random.randrange(SIZE - length)
        assert faulty.blob.read_at(offset, length) == DATA[offset : offset + length]
    fetched = sum(access.range[1] - access.range[0] + 1 for access in faulty.registry.log[1::2] if access.range)
    assert fetched < runs * length
    again = faulty.client.counters.bytes / (runs * length) - 1
    record_property("figure", f"0 errors in {runs} resets, {again:.1%} fetched again")
    assert again <= 0.05


@pytest.mark.row("N10")
def test_a_kept_connection_that_was_closed_costs_no_wait(faulty: Faulty) -> None:
    faulty.registry.script[BLOB, 1] = Reset()
    began = time.monotonic()
    assert faulty.blob.read_at(0, 10) == DATA[:10]
    assert time.monotonic() - began < 0.1


@pytest.mark.row("N10")
def test_a_name_server_that_is_away_for_a_moment() -> None:
    """Translated as urllib3 raises it: no name server is broken for the test."""
    with client("registry.example") as c:
        for code, retryable in ((socket.EAI_AGAIN, True), (socket.EAI_NONAME, False)):
            error = NameResolutionError("registry.example", None, socket.gaierror(code, "x"))  # type: ignore[arg-type]
            error.__cause__ = socket.gaierror(code, "x")
            found = c.transport.translate(error, "GET registry.example/v2/ (try 1)")
            assert found.retryable is retryable
        c.windows.reached("registry.example")
        assert c.transport.translate(error, "GET registry.example/v2/ (try 1)").retryable, "it had a name before"


@pytest.mark.row("N10")
def test_tls(trusted: Client) -> None:
    source = secure_source(trusted)
    blob = source.blob(layers(source)[0])
    assert blob.read_at(7, 3_000_000) == DATA[7:3_000_007]
    assert blob.read_at(0, SIZE) == DATA


@pytest.mark.row("N10")
def test_a_certificate_that_nobody_trusts(secure: FakeRegistry, record_property: Record) -> None:
    with client(secure) as c:
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=r"certificate is not valid.*certs\.d") as caught:
            secure_source(c).resolve()
        took = time.monotonic() - began
    record_property("figure", f"bad certificate: error after {took:.2f} s")
    assert took < 1.0
    assert not caught.value.retryable


@pytest.mark.row("N10")
def test_http_where_https_was_meant() -> None:
    with FakeRegistry() as registry, client(registry) as c, pytest.raises(UnavailableError, match="--plain-http"):
        secure_source(c).resolve()


@pytest.mark.row("N11")
@pytest.mark.parametrize("fault", [Silent(), Trickle(0.05)])
def test_silence_and_trickles_are_abandoned(faulty: Faulty, fault: Silent | Trickle, record_property: Record) -> None:
    faulty.registry.script[BLOB, 1] = fault
    began = time.monotonic()
    assert faulty.blob.read_at(0, 1 * MiB) == DATA[: 1 * MiB]
    took = time.monotonic() - began
    record_property("figure", f"{type(fault).__name__}: {took:.2f} s with limits of {QUICK.stall_window} s")
    assert QUICK.stall_window <= took < QUICK.stall_window + 0.5
    assert len({access.connection for access in faulty.registry.log}) == 2


@pytest.mark.row("N11")
def test_headers_that_trickle_are_abandoned() -> None:
    """The time limit for the first byte holds for the headers as a whole, not for each recv."""
    with socket.create_server(("127.0.0.1", 0)) as server, client(f"127.0.0.1:{server.getsockname()[1]}") as c:
        stop = threading.Event()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                for _ in range(1000):
                    if stop.wait(0.02):
                        break
                    try:
                        connection.send(b"H")
                    except OSError:
                        break

        thread = threading.Thread(target=serve)
        thread.start()
        began = time.monotonic()
        try:
            with pytest.raises(UnavailableError, match="too slow or silent"):
                c.transport.send("GET", f"http://{c.host}/", c.transport.attempts(5.0))
            assert time.monotonic() - began < QUICK.first_byte + 0.3
        finally:
            stop.set()
            thread.join()


def test_a_slow_reader_is_no_slow_server(faulty: Faulty) -> None:
    """Time that the reader takes between pieces does not count."""
    got = b""
    for piece in faulty.blob.stream(0, 400_000):
        got += piece
        time.sleep(QUICK.stall_window * 0.75)
    assert got == DATA[:400_000]
    assert faulty.asked == 1


@pytest.mark.row("N12")
@pytest.mark.registry
def test_a_registry_that_comes_back(registry: DockerRegistry, record_property: Record) -> None:
    with DockerRegistry() as own, client(own.host) as c:
        with FakeRegistry() as fake:
            fake.add_image("repo", "latest", [(TAR, DATA)])
            with client(fake) as source:
                copy_image(source, c)
        blob = c.layer()
        own.stop()
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(blob.read_at, 1, 1000)
            time.sleep(1.5)
            own.start()
            assert read.result() == DATA[1:1001]
        waited = time.monotonic() - began
        record_property("figure", f"away for 1.5 s: data after {waited:.1f} s")


@pytest.mark.row("N12")
def test_a_registry_that_stays_away() -> None:
    clock = ManualClock()
    with FakeRegistry() as registry, client(registry, timeouts=Timeouts(), clock=clock) as c:
        blob = Faulty(registry, c).blob
        registry.__exit__()
        began = clock.now()
        with pytest.raises(UnavailableError):
            blob.read_at(0, 10)
        assert clock.now() - began == pytest.approx(60.0, abs=1)


# -- bounds, and what is told --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("extra", "fits"), [(0, True), (1, False)])
def test_manifests_are_read_up_to_their_limit(extra: int, fits: bool) -> None:
    with FakeRegistry() as registry, client(registry) as c:
        document = b'{"schemaVersion":2,"manifests":[]}'
        raw = document + b" " * (c.settings.limits.manifest_bytes + extra - len(document))
        registry.add_manifest("repo", raw, "application/vnd.oci.image.index.v1+json", "latest")
        if fits:
            c.source().resolve()
        else:
            with pytest.raises(LimitExceeded):
                c.source().resolve()
            assert c.counters.bytes == 0
