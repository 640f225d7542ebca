"""Connections of a registry's source: kept from one request to the next, and made before there is a request."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from random import Random

import pytest

from ckptfs.bench.link import ShapedLink
from ckptfs.errors import NotFoundError, UnavailableError
from ckptfs.model.oci import Manifest
from ckptfs.settings import KiB, MiB, Registries, Timeouts
from ckptfs.sources import happy_eyeballs
from tests.support.addresses import dark, resolve
from tests.support.fake_registry import FakeRegistry
from tests.support.faulty import secure_source
from tests.support.sources import QUICK, Client, client

TAR = "application/vnd.oci.image.layer.v1.tar"
SIZE = 9_000_000  # more than the 8 MiB that a source takes whole in place of a range
DATA = Random(1).randbytes(SIZE)


def test_connections_are_kept() -> None:
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = c.source()
        image = source.resolve()
        assert isinstance(image, Manifest)
        blob = source.blob(image.layers[0])
        for offset in range(0, 1_000_000, 100_000):
            blob.read_at(offset, 100_000)
        source.fetch(image.config)
        with pytest.raises(NotFoundError):
            c.source("repo:nope").resolve()
        assert len({access.connection for access in registry.log}) == 1
        assert c.counters.bytes >= 1_000_000


@pytest.mark.parametrize("tls", [False, True])
def test_requests_use_the_connections_that_were_made_ahead(tls: bool, tmp_path: Path) -> None:
    with FakeRegistry(tls=tls) as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        if tls:
            c.trust(tmp_path)
        source = secure_source(c) if tls else c.source()
        for _ in range(2):
            source.connect()
        assert not registry.log
        image = source.resolve()
        assert isinstance(image, Manifest)
        blob = source.blob(image.layers[0])
        both = zip_longest(blob.stream(0, SIZE), blob.stream(0, SIZE), fillvalue=b"")  # at the same time
        assert sum(len(piece) for pair in both for piece in pair) == 2 * SIZE
        assert len({access.connection for access in registry.log}) == registry.accepted == 2


def test_where_no_connection_can_be_made_the_request_says_so() -> None:
    with FakeRegistry() as registry, client(registry) as c:
        source = c.source()
    source.connect()
    with pytest.raises(UnavailableError, match="connection refused"):
        source.resolve()


@contextmanager
def named(
    monkeypatch: pytest.MonkeyPatch, *addresses: str, timeouts: Timeouts = QUICK
) -> Iterator[tuple[FakeRegistry, Client]]:
    """A registry that is at the last of these addresses of its name, and a client of it."""
    with FakeRegistry() as registry:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        port = int(registry.host.rpartition(":")[2])
        resolve(monkeypatch, "registry.example", *addresses)
        name = f"registry.example:{port}"
        with client(name, timeouts=timeouts, registries=Registries(plain_http=frozenset({name}))) as c:
            yield registry, c


def test_an_address_that_is_dark_costs_a_quarter_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = ("127.0.0.2", "127.0.0.3", "127.0.0.1")
    with named(monkeypatch, *addresses, timeouts=Timeouts()) as (registry, c), ExitStack() as stack:
        for address in addresses[:2]:
            stack.enter_context(dark(address, int(registry.host.rpartition(":")[2])))
        before = len(os.listdir("/proc/self/fd"))
        began = time.monotonic()
        c.source().connect()
        took = time.monotonic() - began
        assert c.layer().read_at(0, 10) == DATA[:10] and registry.accepted == 1 and c.counters.retries == 0
        assert 0.5 <= took < 1.0
        assert len(os.listdir("/proc/self/fd")) <= before + 2, "both ends of one connection"


def test_after_an_address_that_refuses_the_next_is_tried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with named(monkeypatch, "127.0.0.2", "127.0.0.3", "127.0.0.1") as (registry, c):
        began = time.monotonic()
        c.source().connect()
        assert time.monotonic() - began < 0.2
        assert c.layer().read_at(0, 10) == DATA[:10] and registry.accepted == 1 and c.counters.retries == 0


def test_one_limit_holds_for_all_addresses_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses, port = [f"127.0.0.{number}" for number in range(2, 8)], 0
    resolve(monkeypatch, "registry.example", *addresses)
    with ExitStack() as stack:
        for address in addresses:
            port = stack.enter_context(dark(address, port))
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            happy_eyeballs.connect("registry.example", port, 0.6)
        assert 0.6 <= time.monotonic() - began < 0.9


def test_the_families_of_addresses_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have no route are passed over at once."""
    asked: list[str] = []

    def refuse(sock: socket.socket, address: tuple[str, int]) -> None:
        asked.append(address[0])
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    four, six = [f"192.0.2.{number}" for number in range(3)], [f"2001:db8::{number}" for number in range(2)]
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 0, "", (address, 443, 0, 0)) for address in six]
    found += [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 443)) for address in four]  # type: ignore[misc]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(OSError, match="Network is unreachable"):
        happy_eyeballs.connect("registry.example", 443, 3.0)
    assert asked == [six[0], four[0], six[1], four[1], four[2]]


def test_options_are_set_before_the_connection_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window of a connection is told in its SYN."""
    found: list[tuple[int, int]] = []
    connect = socket.socket.connect

    def noted(sock: socket.socket, address: tuple[str, int]) -> None:
        window = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        found.append((window, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
        connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    with FakeRegistry() as registry, client(registry) as c:
        c.transport.send("GET", f"{registry.url}/v2/", c.transport.attempts(1.0), narrow=True).close()
    assert found == [(16 * KiB, 1)]  # socket(7): the kernel doubles the 8 KiB that were asked for


@pytest.mark.parametrize(
    ("rate", "patient", "first"),
    [
        (200e6, False, [128 * KiB]),
        (200e6, True, [MiB]),
        (20e6, True, [MiB, 128 * KiB]),  # a megabyte takes 0.4 s
    ],
)
def test_pieces_are_long_where_nobody_waits_for_short_ones(rate: float, patient: bool, first: list[int]) -> None:
    with FakeRegistry() as registry, ShapedLink(registry.host, rate=rate) as link, client(link.address) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        pieces = list(c.layer().stream(0, 2 * MiB, patient=patient))
        assert b"".join(pieces) == DATA[: 2 * MiB]
        assert [len(piece) for piece in pieces[: len(first)]] == first
