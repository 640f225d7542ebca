"""A registry, mirrors of it, and a client that knows them: what the tests of mirrors share."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ckptfs.model.blob import Blob
from ckptfs.settings import Registries, Timeouts
from tests.support.fake_registry import FakeRegistry
from tests.support.faulty import BLOB, DATA, TAR
from tests.support.sources import QUICK, client


class Hosts:
    """A registry `home` and mirrors of it, all with the same image; `client` asks the mirrors in order, then home."""

    def __init__(self, stack: ExitStack, mirrors: int = 2, timeouts: Timeouts = QUICK, *, tags: bool = False) -> None:
        self.home = stack.enter_context(FakeRegistry())
        self.mirrors = [stack.enter_context(FakeRegistry()) for _ in range(mirrors)]
        for registry in (self.home, *self.mirrors):
            registry.add_image("repo", "latest", [(TAR, DATA)])
        where = tuple(mirror.host for mirror in self.mirrors)
        registries = Registries(mirrors={self.home.host: where}, mirror_tags=tags)
        self.client = stack.enter_context(client(self.home, timeouts=timeouts, registries=registries))
        self._blob: Blob | None = None

    @property
    def blob(self) -> Blob:
        if self._blob is None:
            self._blob = self.client.layer()
            for registry in (self.home, *self.mirrors):
                registry.log.clear()
            self.client.counters.bytes = 0
        return self._blob

    def asked(self) -> list[int]:
        """Requests for the blob: of each mirror in order, then of home."""
        return [len(registry.requests(BLOB)) for registry in (*self.mirrors, self.home)]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        yield Hosts(stack)


def read(blob: Blob, offset: int = 5, length: int = 300_000, attempt: int = 0) -> None:
    assert blob.read_at(offset, length, attempt=attempt) == DATA[offset : offset + length]
