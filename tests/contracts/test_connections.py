"""Connections of a registry's source: kept from one request to the next, and made before there is a request."""

from itertools import zip_longest
from pathlib import Path
from random import Random

import pytest

from ckptfs.bench.link import ShapedLink
from ckptfs.errors import NotFoundError, UnavailableError
from ckptfs.model.oci import Manifest
from ckptfs.settings import KiB, MiB
from tests.support.fake_registry import FakeRegistry
from tests.support.faulty import secure_source
from tests.support.sources import client

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
