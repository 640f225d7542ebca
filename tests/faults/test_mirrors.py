"""Rows N1, N9, N11, S2 with several hosts: fail-over, late and lying mirrors, pull-through, and what is never shown.

Each host is a registry of its own over real TCP. Time limits are tenths of a second unless a row is about the real
ones.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio

from ckptfs.errors import AuthError, NotFoundError, UnavailableError
from ckptfs.image import OpenImage
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Manifest
from ckptfs.settings import KiB, MiB, Registries, Sizes, Timeouts
from ckptfs.sources import host_files
from ckptfs.sources.standing import Standing
from tests.support.certificates import certificate
from tests.support.chunked import PAGES, add_chunked, read_file, with_image
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import Access, FakeRegistry, Flip, Full200, Reset, Silent, Status, Trickle
from tests.support.faulty import BLOB, DATA, SIZE, TAR, Record
from tests.support.registry_faults import Fault
from tests.support.sources import QUICK, client, copy_image, layers
from tests.support.tools import free_port


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
    assert time.monotonic() - began < 0.2
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


@pytest.mark.row("N12")
def test_an_outage_of_all_hosts_is_waited_out() -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack, timeouts=replace(QUICK, read_deadline=3.0))
        blob = hosts.blob
        for registry in (hosts.home, *hosts.mirrors):
            registry.script[BLOB, None] = Reset()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(read, blob)
            time.sleep(1.0)
            assert not done.done()
            hosts.mirrors[1].script.clear()
            done.result(1.0)


def test_the_deadline_holds_for_all_hosts_together() -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack, timeouts=replace(QUICK, read_deadline=1.0))
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
    assert hosts.mirrors[1].log[-1].range == (1 * MiB, 4 * MiB - 1)
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
            c.settings = replace(c.settings, sizes=Sizes(random_extent=64 * KiB, sequential_extent=64 * KiB))
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
    assert first < 1.5
    assert second < 0.2


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
    assert 0.9 < took < 1.5


# -- S2: what a host is shown ------------------------------------------------------------------------------------------


@pytest.mark.row("S2")
def test_each_host_gets_its_own_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        FakeRegistry(auth="bearer", users={"home": "canary-home"}) as home,
        FakeRegistry(auth="basic", users={"mirror": "canary-mirror"}) as known,
        FakeRegistry(auth="bearer") as unknown,
    ):
        for registry in (home, known, unknown):
            registry.add_image("repo", "latest", [(TAR, DATA)])
        entries = {home.host: ("home", "canary-home"), known.host: ("mirror", "canary-mirror")}
        auths = {host: {"username": name, "password": word} for host, (name, word) in entries.items()}
        (tmp_path / "auth.json").write_text(json.dumps({"auths": auths}))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
        monkeypatch.setenv("HOME", str(tmp_path))
        registries = Registries(mirrors={home.host: (unknown.host, known.host)})
        with client(home, registries=registries) as c:
            read(c.layer())
            known.script[BLOB, None] = Status(500)
            read(c.layer())
        sent = {r: {a.headers["authorization"] for a in r.log if "authorization" in a.headers} for r in (home, known)}
        assert not any("authorization" in access.headers for access in unknown.log)
        assert len(unknown.requests(BLOB)) == 1, "it refuses us: left alone"
        assert sent[known] and sent[home] and not sent[known] & sent[home]


# -- mirrors that pull through -----------------------------------------------------------------------------------------


def test_a_mirror_that_is_still_fetching_is_waited_for() -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack, 1, replace(QUICK, mirror_fill=5.0))
        blob = hosts.blob
        hosts.mirrors[0].script = {(BLOB, number): Full200() for number in range(1, 5)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: read(blob, number * 1000), range(8)))
        assert hosts.asked() == [4 + 1 + 8, 0], "one thread asks for one byte now and then; then all read"


def test_a_little_is_taken_from_elsewhere_meanwhile() -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack, 1, replace(QUICK, mirror_fill=5.0))
        blob = hosts.blob
        hosts.mirrors[0].script = {(BLOB, number): Full200() for number in range(1, 6)}
        read(blob, 0, 20_000)
        assert hosts.asked() == [1, 1]
        read(blob, 0, 20_000)
        assert hosts.asked() == [7, 1], "a quarter of a percent of the blob, no more"


def test_a_mirror_that_never_serves_ranges_is_given_up() -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack, 1)
        blob = hosts.blob
        hosts.mirrors[0].script[BLOB, None] = Full200()
        read(blob)
        asked = hosts.asked()[0]
        assert asked <= 8
        for _ in range(3):
            read(blob)
        assert hosts.asked() == [asked, 4]
        assert blob.read_at(0, SIZE) == DATA


@pytest.mark.registry
def test_docker_registry_as_a_pull_through_mirror(registry: DockerRegistry) -> None:
    """The real thing, cold: everything is right, and the image is there when the registry is not."""
    with DockerRegistry() as home:
        with FakeRegistry() as fake, client(fake) as source, client(home.host) as target:
            fake.add_image("repo", "latest", [(TAR, DATA)])
            copy_image(source, target)
        with DockerRegistry(proxy_of=f"http://{home.host}") as mirror:
            registries = Registries(mirrors={home.host: (mirror.host,)})
            timeouts = replace(QUICK, first_byte=5.0, mirror_fill=15.0)
            with client(home.host, timeouts=timeouts, registries=registries) as c:
                source = c.source()
                digest = source.resolve().digest
                blob = source.blob(layers(source)[0])
                with ThreadPoolExecutor(8) as pool:
                    list(pool.map(lambda number: read(blob, number * 1_000_000), range(9)))
                c.source(f"repo@{digest}").resolve()
                home.stop()
                pinned = c.source(f"repo@{digest}")
                read(pinned.blob(layers(pinned)[0]), 77)


# -- insecure hosts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_files, "CONTAINERS_DIR", tmp_path)
    monkeypatch.setattr(host_files, "CONTAINERD_DIRS", (tmp_path / "certs.d",))
    monkeypatch.setattr(host_files, "is_loopback", lambda host: False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
@pytest.mark.parametrize("tls", [True, False])
def test_an_insecure_host_speaks_what_it_speaks(etc: Path, tls: bool) -> None:
    with FakeRegistry(tls=tls) as registry:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        (etc / "registries.conf").write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
        with client(registry, registries=Registries(system_files=True)) as c:
            read(c.layer())


def test_the_authority_of_a_host(etc: Path) -> None:
    with FakeRegistry(tls=True) as registry, FakeRegistry() as home:
        for one in (registry, home):
            one.add_image("repo", "latest", [(TAR, DATA)])
        folder = etc / "certs.d" / home.host
        folder.mkdir(parents=True)
        (folder / "ca.pem").write_bytes(certificate()[0])
        hosts = f'server = "{home.url}"\n[host."{registry.url}"]\n'
        with client(home, registries=Registries(system_files=True)) as c:
            (folder / "hosts.toml").write_text(hosts)
            read(c.layer())
            assert registry.log == [], "nobody knows who signed its certificate"
        with client(home, registries=Registries(system_files=True)) as c:
            (folder / "hosts.toml").write_text(hosts + 'ca = "ca.pem"\n')
            read(c.layer())
            assert len(registry.requests(BLOB)) == 2
            assert len(home.requests(BLOB)) == 1


def test_errors_of_readers_name_no_mirror_secrets(hosts: Hosts) -> None:
    blob = hosts.blob
    for registry in (hosts.home, *hosts.mirrors):
        registry.script[BLOB, None] = Status(403, body=b"canary")
    with pytest.raises(AuthError) as caught:
        read(blob)
    assert "canary" not in str(caught.value)
    assert isinstance(caught.value, AuthError)
