"""A registry with one image, a client of it, and TLS: what the network's fault tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from ckptfs.model.blob import Blob
from ckptfs.settings import MiB
from ckptfs.sources.origin import Origin, Territory
from ckptfs.sources.registry import RegistrySource
from tests.support.fake_registry import (
    FakeRegistry,
)
from tests.support.sources import USER, Client, client

TAR = "application/vnd.oci.image.layer.v1.tar"
SIZE = 9 * MiB
DATA = Random(3).randbytes(SIZE)
BLOB = "GET /v2/repo/blobs/"
Record = Callable[[str, object], None]


class Faulty:
    """A registry with one image of one layer, DATA, and a client of it. The log is empty when the test begins."""

    def __init__(self, registry: FakeRegistry, c: Client, data: bytes = DATA) -> None:
        registry.add_image("repo", "latest", [(TAR, data)])
        self.registry = registry
        self.client = c
        self.blob: Blob = c.layer(credentials=USER)
        self.forget()

    def forget(self) -> None:
        self.registry.log.clear()
        self.client.counters.bytes = 0

    @property
    def asked(self) -> int:
        return len(self.registry.requests(BLOB))


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with FakeRegistry() as registry, client(registry) as c:
        yield Faulty(registry, c)


@pytest.fixture
def secure() -> Iterator[FakeRegistry]:
    with FakeRegistry(tls=True) as registry:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        yield registry


@pytest.fixture
def trusted(secure: FakeRegistry, tmp_path: Path) -> Iterator[Client]:
    """A client that trusts the certificate of `secure`."""
    with client(secure) as c:
        c.trust(tmp_path)
        yield c


def secure_source(c: Client) -> RegistrySource:
    """https on loopback, which ckptfs takes for http."""
    source = c.source()
    source._home.endpoint._territory = Territory(Origin.of(f"https://{c.host}"))
    return source
