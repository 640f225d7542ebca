"""Mirrors one by one: what each is shown of us, those that pull through, and those that are insecure."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from ckptfs.errors import AuthError
from ckptfs.settings import Registries
from ckptfs.sources import host_files
from tests.support.certificates import certificate
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import FakeRegistry, Full200, Status
from tests.support.faulty import BLOB, DATA, SIZE, TAR
from tests.support.hosts import Hosts, read
from tests.support.sources import QUICK, client, copy_image, layers

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
        hosts = Hosts(stack, 1, QUICK._replace(mirror_fill=5.0))
        blob = hosts.blob
        hosts.mirrors[0].script = {(BLOB, number): Full200() for number in range(1, 5)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: read(blob, number * 1000), range(8)))
        assert hosts.asked() == [4 + 1 + 8, 0], "one thread asks for one byte now and then; then all read"


def test_a_little_is_taken_from_elsewhere_meanwhile() -> None:
    with ExitStack() as stack:
        hosts = Hosts(stack, 1, QUICK._replace(mirror_fill=5.0))
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
            timeouts = QUICK._replace(first_byte=5.0, mirror_fill=15.0)
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
