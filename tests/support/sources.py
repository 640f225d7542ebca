"""Sources of a FakeRegistry for tests: short time limits, connections and host windows of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor, Manifest, Reference
from ckptfs.settings import Registries, Settings, Timeouts
from ckptfs.sources.connections import Pools
from ckptfs.sources.credentials import Credentials
from ckptfs.sources.registry import RegistrySource
from ckptfs.sources.retry import Clock, HostWindows
from ckptfs.sources.standing import Standing
from ckptfs.sources.transport import Transport
from ckptfs.sources.upload import RegistryTarget
from ckptfs.telemetry import NetworkCounters
from tests.support.certificates import certificate
from tests.support.fake_registry import FakeRegistry

USER = Credentials("user", "canary-password", origin="the test")
QUICK = Timeouts(
    connect=0.5,
    first_byte=0.4,
    commit=2.0,
    stall_window=0.4,
    read_deadline=5.0,
    resolve_deadline=3.0,
    retry_first=0.01,
    retry_cap=0.05,
    mirror_fill=0.2,
)


class Client:
    """One process's view of a registry. `counters` are what its requests add up to."""

    def __init__(
        self,
        registry: FakeRegistry | str,
        *,
        timeouts: Timeouts = QUICK,
        clock: Clock | None = None,
        registries: Registries | None = None,
    ) -> None:
        self.host = registry if isinstance(registry, str) else registry.host
        self.settings = Settings(timeouts=timeouts, registries=registries or Registries())
        self.counters = NetworkCounters()
        self.pools = Pools()
        self.windows = HostWindows()
        self.standing = Standing()
        self.transport = Transport(
            self.settings,
            self.counters,
            pools=self.pools,
            windows=self.windows,
            standing=self.standing,
            clock=clock,
        )

    def trust(self, folder: Path) -> None:
        """Believe the certificate of the registry, as containers-certs.d(5) says, from `folder`."""
        place = folder / "certs.d" / self.host
        place.mkdir(parents=True)
        (place / "ca.crt").write_bytes(certificate()[0])
        self.transport._pools = self.pools = Pools((folder / "certs.d",))

    def source(self, name: str = "repo:latest", credentials: Credentials | None = None) -> RegistrySource:
        reference = Reference.parse(f"{self.host}/{name}")
        return RegistrySource(
            reference, self.settings, self.counters, credentials=credentials, transport=self.transport
        )

    def target(self, name: str = "repo:latest", credentials: Credentials | None = None) -> RegistryTarget:
        reference = Reference.parse(f"{self.host}/{name}")
        return RegistryTarget(
            reference, self.settings, self.counters, credentials=credentials, transport=self.transport
        )

    def layer(self, name: str = "repo:latest", credentials: Credentials | None = None) -> Blob:
        """The first layer of an image, resolved."""
        source = self.source(name, credentials)
        return source.blob(layers(source)[0])


@contextmanager
def client(
    registry: FakeRegistry | str,
    *,
    timeouts: Timeouts = QUICK,
    clock: Clock | None = None,
    registries: Registries | None = None,
) -> Iterator[Client]:
    made = Client(registry, timeouts=timeouts, clock=clock, registries=registries)
    try:
        yield made
        assert made.counters.in_flight == 0, "a reply was not closed"
    finally:
        made.pools.close()


def copy_image(source: Client, target: Client, name: str = "repo:latest") -> None:
    """One image, from one registry to another."""
    reader, writer = source.source(name), target.target(name)
    image = reader.resolve()
    assert isinstance(image, Manifest)
    for descriptor in (image.config, *image.layers):
        writer.put_blob(descriptor, reader.blob(descriptor), lambda count: None)
    writer.put_manifest(image.raw, image.media_type, name.rpartition(":")[2])


def layers(source: RegistrySource) -> tuple[Descriptor, ...]:
    manifest = source.resolve()
    assert isinstance(manifest, Manifest)
    return manifest.layers
