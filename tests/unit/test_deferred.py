"""A registry's source that is opened when something is first asked of it, and one that is resolved before."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptfs.errors import UsageError
from ckptfs.model.oci import Descriptor, Digest, Reference
from ckptfs.sources import Repository
from ckptfs.sources.deferred import DeferredSource
from ckptfs.sources.early import EarlySource
from ckptfs.sources.registry import RegistrySource
from tests.support.fake_registry import FakeRegistry
from tests.support.sources import Client, client

TAR = "application/vnd.oci.image.layer.v1.tar"
DATA = b"a layer"
LAYER = Descriptor(TAR, Digest.of(DATA), len(DATA))


class Opener:
    """Counts how often the source is opened; the first `failures` times it is not."""

    def __init__(self, c: Client, failures: int = 0) -> None:
        self.count = 0
        self._client = c
        self._failures = failures

    def __call__(self) -> RegistrySource:
        self.count += 1
        if self.count <= self._failures:
            raise UsageError("the configuration is wrong")
        return self._client.source()


def test_it_is_opened_by_the_first_read_and_once_for_all_threads() -> None:
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = DeferredSource(Reference.parse(registry.reference("repo:latest")), opener := Opener(c))
        blob = source.blob(LAYER)
        assert isinstance(source, Repository) and source.reference.tag == "latest"
        assert (blob.descriptor, blob.size, opener.count) == (LAYER, len(DATA), 0)
        with ThreadPoolExecutor(8) as threads:
            read = list(threads.map(lambda _: (blob.read_at(0, len(DATA)), b"".join(blob.stream(2, 3))), range(8)))
        assert read == [(DATA, DATA[2:5])] * 8
        assert source.resolve() == source.document("latest") and opener.count == 1


def test_a_failure_to_open_it_is_the_callers_and_not_the_last_word() -> None:
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = DeferredSource(Reference.parse(registry.reference("repo:latest")), Opener(c, failures=1))
        with pytest.raises(UsageError):
            source.blob(LAYER).read_at(0, 1)
        assert source.fetch(LAYER) == DATA


def test_what_no_thread_can_be_had_for_is_resolved_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        with monkeypatch.context() as limit:
            limit.setattr(threading.Thread, "start", refused)
            source = EarlySource(c.source())
        assert source.resolve() == c.source().resolve()
