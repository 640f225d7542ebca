"""Where the images of a reference can be had: our configuration, registries.conf(5), containerd's hosts.toml."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptfs.errors import UnavailableError, UsageError
from ckptfs.model.oci import Reference
from ckptfs.settings import Registries
from ckptfs.sources import host_files
from ckptfs.sources.places import Place, Trust, places_of

DIGEST = "sha256:" + "a" * 64
Places = Callable[..., tuple[Place, ...]]


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /etc: containers/registries.conf, containerd/certs.d."""
    monkeypatch.setattr(host_files, "CONTAINERS_DIR", tmp_path / "containers")
    monkeypatch.setattr(host_files, "CONTAINERD_DIRS", (tmp_path / "containerd", tmp_path / "docker"))
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(
    etc: Path, text: str, reference: str = "quay.io/team/app:1", file: str = "containers/registries.conf"
) -> tuple[Place, ...]:
    write(etc / file, text)
    environment = {"HOME": str(etc / "home")}
    return places_of(Reference.parse(reference), Registries(system_files=True), environment=environment)


def names(places: tuple[Place, ...]) -> list[str]:
    return [f"{place.host}/{place.repository}" for place in places]


# -- our own -----------------------------------------------------------------------------------------------------------


def test_nothing_configured(etc: Path) -> None:
    for registries in (Registries(), Registries(system_files=True)):
        (place,) = places_of(Reference.parse("quay.io/team/app"), registries, environment={"HOME": str(etc)})
        assert place == Place("quay.io", "team/app")


@pytest.mark.parametrize(
    ("mirror", "expected"),
    [
        ("mirror.example", Place("mirror.example", "library/busybox")),
        ("https://mirror.example:5000/hub/", Place("mirror.example:5000", "hub/library/busybox")),
        ("http://mirror.example", Place("mirror.example", "library/busybox", "http")),
        ("127.0.0.1:5000", Place("127.0.0.1:5000", "library/busybox", "http")),
        ("plain.example", Place("plain.example", "library/busybox", "http")),
    ],
)
def test_mirrors_of_our_configuration(mirror: str, expected: Place) -> None:
    registries = Registries(frozenset({"plain.example"}), {"docker.io": (mirror,)})
    found, home = places_of(Reference.parse("docker.io/busybox"), registries)
    assert (found.host, found.repository, found.scheme) == (expected.host, expected.repository, expected.scheme)
    assert found.namespace == "docker.io"
    assert found.pulls and not found.resolves, "a tag is for the registry itself to say"
    assert home.address == "registry-1.docker.io" and home.resolves


def test_mirrors_that_may_say_what_a_tag_is() -> None:
    registries = Registries(mirrors={"quay.io": ("a", "b")}, mirror_tags=True)
    *mirrors, _ = places_of(Reference.parse("quay.io/x"), registries)
    assert [place.host for place in mirrors] == ["a", "b"]
    assert all(place.resolves for place in mirrors)


def test_our_mirrors_come_in_place_of_the_files(etc: Path) -> None:
    write(
        etc / "containers/registries.conf", '[[registry]]\nlocation = "quay.io"\n[[registry.mirror]]\nlocation = "m"\n'
    )
    registries = Registries(mirrors={"quay.io": ("own.example",)}, system_files=True)
    places = places_of(Reference.parse("quay.io/x"), registries, environment={"HOME": str(etc)})
    assert names(places) == ["own.example/x", "quay.io/x"]


# -- registries.conf(5) ------------------------------------------------------------------------------------------------


def test_mirrors_in_order_then_the_registry(etc: Path) -> None:
    places = found(
        etc,
        """
        [[registry]]
        prefix = "quay.io/team"
        location = "internal.example/q"
        [[registry.mirror]]
        location = "one.example:5000/cache"
        [[registry.mirror]]
        location = "two.example"
        insecure = true
        """,
    )
    assert names(places) == ["one.example:5000/cache/app", "two.example/app", "internal.example/q/app"]
    assert [place.scheme for place in places] == ["https", "", "https"]
    assert places[1].trust == Trust(verify=False)
    assert all(place.pulls and place.resolves and not place.namespace for place in places)


@pytest.mark.parametrize(
    ("prefix", "matches"),
    [
        ("quay.io", True),
        ("quay.io/team", True),
        ("quay.io/team/app", True),
        ("quay.io/te", False),
        ("quay.io/team/app/more", False),
        ("uay.io", False),
        ("*.io", True),
        ("*.quay.io", False),
        ("*.example", False),
    ],
)
def test_prefixes_match_whole_components(etc: Path, prefix: str, matches: bool) -> None:
    places = found(etc, f'[[registry]]\nprefix = "{prefix}"\n[[registry.mirror]]\nlocation = "m.example/x"\n')
    assert (places[0].host == "m.example") is matches


def test_the_longest_prefix_wins_and_later_files_win_over_earlier(etc: Path) -> None:
    write(etc / "containers/registries.conf.d/1.conf", '[[registry]]\nprefix = "quay.io/team"\nlocation = "second"\n')
    write(etc / "home/.config/containers/registries.conf.d/1.conf", '[[registry]]\nlocation = "quay.io"\n')
    (place,) = found(etc, '[[registry]]\nprefix = "quay.io/team"\nlocation = "first"\n')
    assert place.host == "second"


def test_a_users_own_file_comes_in_place_of_the_systems(etc: Path) -> None:
    write(
        etc / "home/.config/containers/registries.conf", '[[registry]]\nprefix = "quay.io"\nlocation = "own.example"\n'
    )
    (place,) = found(etc, '[[registry]]\nprefix = "quay.io"\nlocation = "system.example"\n')
    assert place.host == "own.example"


@pytest.mark.parametrize(
    ("setting", "by_tag", "by_digest"),
    [
        ("", (2, True), 2),
        ('pull-from-mirror = "digest-only"', (2, False), 2),
        ('pull-from-mirror = "tag-only"', (2, True), 1),
    ],
)
def test_what_a_mirror_may_be_asked_for(etc: Path, setting: str, by_tag: tuple[int, bool], by_digest: int) -> None:
    text = f'[[registry]]\nlocation = "quay.io"\n[[registry.mirror]]\nlocation = "m.example"\n{setting}\n'
    places = found(etc, text)
    assert (len(places), places[0].resolves) == by_tag
    assert len(found(etc, text, f"quay.io/team/app@{DIGEST}")) == by_digest
    only = text.replace("[[registry.m", "mirror-by-digest-only = true\n[[registry.m")
    assert not found(etc, only.replace(setting, ""))[0].resolves


def test_a_blocked_registry(etc: Path) -> None:
    with pytest.raises(UnavailableError, match=r"blocks quay\.io") as caught:
        found(etc, '[[registry]]\nlocation = "quay.io"\nblocked = true\n')
    assert not caught.value.retryable


def test_insecure_registry_without_mirrors(etc: Path) -> None:
    (place,) = found(etc, '[[registry]]\nlocation = "quay.io"\ninsecure = true\n')
    assert (place.scheme, place.trust.verify) == ("", False)


def test_docker_hub_is_matched_by_its_full_names(etc: Path) -> None:
    text = '[[registry]]\nprefix = "docker.io/library"\nlocation = "hub.example/lib"\n'
    assert names(found(etc, text, "docker.io/busybox:1")) == ["hub.example/lib/busybox"]
    assert names(found(etc, text, "index.docker.io/busybox:1")) == ["hub.example/lib/busybox"]
    assert names(found(etc, text, "docker.io/other/busybox:1")) == ["docker.io/other/busybox"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[registry]]\nlocation = 5\n", "location is not a string"),
        ('[[registry]]\nlocation = "quay.io"\ninsecure = "yes"\n', "neither true nor false"),
        ('[[registry]]\nlocation = "quay.io"\nmirror = 5\n', "mirror is not a list"),
        ("[[registry]]\nlocation = 1" + "0" * 5000, "is not TOML"),
        ('[[registry]]\nlocation = "quay.io', "is not TOML"),
        ('[[registry]]\nlocation = "quay.io"\n[[registry.mirror]]\nlocation="m"\npull-from-mirror="x"\n', "not known"),
    ],
)
def test_files_that_cannot_be_understood(etc: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"registries.conf.*{words}.*system_mirrors"):
        found(etc, text)


def test_files_with_nothing_for_us_are_not_parsed(etc: Path) -> None:
    (place,) = found(etc, 'unqualified-search-registries = ["docker.io"]\nthis is not TOML')
    assert place == Place("quay.io", "team/app")


# -- containerd's hosts.toml -------------------------------------------------------------------------------------------


def test_hosts_in_order_then_the_server(etc: Path) -> None:
    (etc / "containerd/quay.io").mkdir(parents=True)
    for name in ("ca.pem", "client.cert", "client.key"):
        (etc / "containerd/quay.io" / name).touch()
    one, two, three, home = found(
        etc,
        """
        server = "https://upstream.example"
        [host."https://one.example:5000"]
        capabilities = ["pull"]
        ca = "ca.pem"
        client = [["client.cert", "client.key"]]
        [host."http://two.example/deep"]
        capabilities = ["pull", "resolve"]
        [host."three.example/api"]
        override_path = true
        skip_verify = true
        [host."https://push.example"]
        capabilities = ["push"]
        """,
        file="containerd/quay.io/hosts.toml",
    )
    folder = etc / "containerd/quay.io"
    pair = (folder / "client.cert", folder / "client.key")
    trust = Trust(authorities=(folder / "ca.pem",), certificates=(pair,))
    assert one == Place("one.example:5000", "team/app", namespace="quay.io", resolves=False, trust=trust)
    assert two == Place("two.example", "team/app", "http", root="/deep/v2", namespace="quay.io")
    assert three == Place("three.example", "team/app", root="/api", namespace="quay.io", trust=Trust(verify=False))
    assert home == Place("upstream.example", "team/app", namespace="quay.io")


def test_directories_of_hosts(etc: Path) -> None:
    text = '[host."https://{}.example"]\n'
    write(etc / "docker/_default/hosts.toml", text.format("default"))
    assert found(etc, "")[0].host == "default.example"
    write(etc / "containerd/quay.io:8443/hosts.toml", text.format("colon"))
    assert found(etc, "", "quay.io:8443/x")[0].host == "colon.example"
    write(etc / "containerd/quay.io_8443_/hosts.toml", text.format("underlined"))
    assert found(etc, "", "quay.io:8443/x")[0].host == "underlined.example"


def test_a_directory_that_may_not_be_looked_into(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/etc/docker is closed to users where an older dockerd has made it."""
    look = os.stat

    def closed(path: str | Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if str(path).startswith(str(etc / "docker")):
            raise PermissionError(13, "Permission denied", path)
        return look(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "stat", closed)
    assert names(found(etc, "")) == ["quay.io/team/app"]


def test_podmans_mirrors_come_before_containerds(etc: Path) -> None:
    write(etc / "containerd/quay.io/hosts.toml", '[host."https://containerd.example"]\n')
    text = '[[registry]]\nlocation = "quay.io"\n[[registry.mirror]]\nlocation = "podman.example"\n'
    assert names(found(etc, text)) == ["podman.example/team/app", "quay.io/team/app"]
    assert names(found(etc, "")) == ["containerd.example/team/app", "quay.io/team/app"]


def test_docker_hub_by_its_two_names(etc: Path) -> None:
    text = 'server = "https://registry-1.docker.io"\n[host."https://m.example"]\n'
    _, home = found(etc, text, "docker.io/busybox", "containerd/docker.io/hosts.toml")
    assert home == Place("docker.io", "library/busybox")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[host."ftp://m"]', "not an http"),
        ('[host."https://user:pw@m"]', "without a password"),
        ('[host."https://m"]\ncapabilities = "pull"', "not a list"),
        ('[host."https://m"]\nca = "absent.pem"', "absent.pem, which is no file"),
        ('[host."https://m"]\nclient = [["a", "b", "c"]]', "names no certificates"),
        ('host = "m"', "not a table"),
        ('[host."http://[::1"]', "not an http"),
    ],
)
def test_hosts_that_cannot_be_understood(etc: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        found(etc, text, file="containerd/quay.io/hosts.toml")
    assert "user:pw" not in str(caught.value)
