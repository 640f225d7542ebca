"""Challenges, tokens and where credentials come from."""

import base64
import json
import logging
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import AuthError, UsageError
from ckptfs.sources import credentials
from ckptfs.sources.auth import Challenge, parse_challenges
from ckptfs.sources.credentials import Credentials, find_credentials
from tests.support.fake_registry import FakeRegistry, Status
from tests.support.sources import USER, client

TAR = "application/vnd.oci.image.layer.v1.tar"

# -- challenges --------------------------------------------------------------------------------------------------------


def test_a_bearer_challenge() -> None:
    text = 'Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull,push"'
    parameters = {
        "realm": "https://auth.example/token",
        "service": "registry.example",
        "scope": "repository:a/b:pull,push",
    }
    assert parse_challenges([text]) == (Challenge("bearer", parameters),)


def test_several_challenges_in_one_field_and_in_several() -> None:
    found = parse_challenges(['Negotiate, basic realm="x, y", BEARER Realm=z ,error="invalid_token"', "Digest a=b"])
    assert found == (
        Challenge("negotiate", {}),
        Challenge("basic", {"realm": "x, y"}),
        Challenge("bearer", {"realm": "z", "error": "invalid_token"}),
        Challenge("digest", {"a": "b"}),
    )


def test_quotes_are_taken_off_and_the_first_of_two_values_counts() -> None:
    assert parse_challenges([r'Basic realm="a \"b\" \\c", realm="d"']) == (Challenge("basic", {"realm": r'a "b" \c'}),)


def test_what_is_not_understood_is_left_out() -> None:
    assert parse_challenges(["", "realm=x", ",,,"]) == ()
    assert parse_challenges(['Negotiate YII=, Bearer realm="r", oops="unclosed'])[1] == Challenge(
        "bearer", {"realm": "r"}
    )


@given(st.lists(st.text(max_size=60), max_size=3))
def test_any_header_is_parsed(fields: list[str]) -> None:
    parse_challenges(fields)


# -- credentials -------------------------------------------------------------------------------------------------------


def auth(name: str, password: str = "password") -> dict[str, str]:
    return {"auth": base64.b64encode(f"{name}:{password}".encode()).decode()}


class Home:
    """A home directory with auth files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {"HOME": str(path)}

    def write(self, name: str, document: object) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    def user(self, host: str = "h.example:5000", repository: str = "a/b/c") -> str | None:
        found = find_credentials(host, repository, self.environment)
        return found.username if found else None


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_nothing_is_anonymous(home: Home) -> None:
    assert home.user() is None


def test_files_in_their_order(home: Home) -> None:
    home.environment |= {
        "REGISTRY_AUTH_FILE": str(home.path / "explicit.json"),
        "XDG_RUNTIME_DIR": str(home.path / "run"),
        "DOCKER_CONFIG": str(home.path / "docker"),
    }
    names = {
        "explicit.json": "explicit",
        "run/containers/auth.json": "runtime",
        ".config/containers/auth.json": "config",
        "docker/config.json": "docker-config",
        ".docker/config.json": "docker",
    }
    for name, user in names.items():
        home.write(name, {"auths": {"h.example:5000": auth(user)}})
    for name, user in names.items():
        assert home.user() == user
        (home.path / name).unlink()
    assert home.user() is None


def test_the_logins_of_podman_without_a_runtime_directory(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of root in a service and mostly with sudo: /run/containers/UID/auth.json."""
    monkeypatch.setattr(credentials, "RUNTIME_DIR", home.path / "run")
    home.write(".docker/config.json", {"auths": {"h.example:5000": auth("docker")}})
    assert home.user() == "docker"
    home.write(f"run/{os.getuid()}/auth.json", {"auths": {"h.example:5000": auth("podman")}})
    assert home.user() == "podman"
    home.environment["XDG_RUNTIME_DIR"] = str(home.path / "runtime")
    assert home.user() == "docker"


def test_a_file_without_the_host_leads_to_the_next(home: Home) -> None:
    home.write(".config/containers/auth.json", {"auths": {"other": auth("wrong")}})
    home.write(".docker/config.json", {"auths": {"h.example:5000": auth("right")}})
    assert home.user() == "right"


def test_the_more_specific_entry_wins(home: Home) -> None:
    entries = {f"h.example:5000{tail}": auth(f"for{tail}") for tail in ("", "/a", "/a/b", "/a/b/c", "/a/b/c/d")}
    home.write(".config/containers/auth.json", {"auths": entries})
    for repository, user in [
        ("a/b/c", "for/a/b/c"),
        ("a/b/x", "for/a/b"),
        ("a/x", "for/a"),
        ("x", "for"),
        ("ab", "for"),
    ]:
        assert home.user(repository=repository) == user


@pytest.mark.parametrize(
    "key", [f"https://h.example:5000{path}" for path in ("", "/v1/", "/v2", "/a/path")] + ["http://h.example:5000"]
)
def test_the_spellings_of_docker(home: Home, key: str) -> None:
    home.write(".docker/config.json", {"auths": {key: auth("docker")}})
    assert home.user() == "docker"


@pytest.mark.parametrize(
    "key",
    [
        "index.docker.io",
        "registry-1.docker.io",
        "https://index.docker.io/v1",
        "https://index.docker.io/v2/",
        "https://registry-1.docker.io",
        "https://docker.io/v1/",
    ],
)
def test_docker_hub_has_many_names(home: Home, key: str) -> None:
    """All of them are docker.io to podman."""
    home.write(".docker/config.json", {"auths": {key: auth("hub")}})
    assert home.user("docker.io", "library/busybox") == "hub"
    assert home.user("h.example") is None


def test_docker_hub_has_a_key_of_its_own(home: Home) -> None:
    home.write(".docker/config.json", {"auths": {"https://index.docker.io/v1/": auth("hub")}})
    assert home.user("docker.io", "library/busybox") == "hub"
    assert home.user("h.example") is None


def test_what_an_entry_may_hold(home: Home) -> None:
    entries = {
        "plain": {"username": "u", "password": "p"},
        "identity": {**auth("", ""), "identitytoken": "i"},
        "bearer": {"registrytoken": "r"},
        "colon": auth("u", "p:q:r"),
        "empty": {},
        "null": None,
    }
    path = home.write(".docker/config.json", {"auths": entries})
    found = {host: find_credentials(host, "r", home.environment) for host in entries}
    origin = str(path)
    assert found["plain"] == Credentials("u", "p", origin=origin)
    assert found["identity"] == Credentials(identity_token="i", origin=origin)
    assert found["bearer"] == Credentials(registry_token="r", origin=origin)
    assert found["colon"] == Credentials("u", "p:q:r", origin=origin)
    assert found["empty"] is found["null"] is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"auths": {"h": {"auth": "%%%"}}}',
        '{"auths": {"h": {"auth": "\u00e9=="}}}',
        '{"auths": {"h": {"username": "\\ud800", "password": "p"}}}',
        '{"auths": {"h": {"identitytoken": "\\udfff"}}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_named(home: Home, text: str) -> None:
    path = home.write(".docker/config.json", text)
    with pytest.raises(UsageError, match=str(path)):
        find_credentials("h", "r", home.environment)


def test_secrets_are_not_shown() -> None:
    assert "canary" not in repr(Credentials("user", "canary", "canary", "canary"))


def helper(home: Home, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    program = home.write(f"bin/docker-credential-{name}", f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{home.path / 'bin'}:/usr/bin:/bin")


def test_credential_helpers(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(home, monkeypatch, "one", """[ "$1" = get ] && echo '{"Username": "one", "Secret": "s-'$(cat)'"}'""")
    helper(home, monkeypatch, "two", """cat >&2; echo '{"Username": "<token>", "Secret": "identity"}'""")
    document = {
        "credHelpers": {"h.example:5000": "one", "https://index.docker.io/v1/": "one"},
        "credsStore": "two",
        "auths": {"inline": auth("inline"), "h.example:5000": {}},
    }
    home.write(".docker/config.json", document)
    origin = "docker-credential-one"

    def find(host: str) -> Credentials | None:
        return find_credentials(host, "r", home.environment)

    assert find("h.example:5000") == Credentials("one", "s-h.example:5000", origin=origin)
    assert find("docker.io") == Credentials("one", "s-https://index.docker.io/v1/", origin=origin)
    home.write(".config/containers/auth.json", {"credHelpers": {"docker.io": "one"}})
    assert find("docker.io") == Credentials("one", "s-docker.io", origin=origin), "as podman calls it"
    assert find("other") == Credentials(identity_token="identity", origin="docker-credential-two")
    assert find("inline") == Credentials("inline", "password", origin=str(home.path / ".docker/config.json"))


@pytest.mark.parametrize(
    "script",
    [
        "echo credentials not found in native keychain; exit 1",
        "echo not JSON",
        "echo []",
        "echo '{\"Username\": 1}'",
        """printf '{"Username": "\\\\ud800", "Secret": "s"}'""",
    ],
)
def test_a_helper_without_an_answer_is_anonymous(home: Home, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    helper(home, monkeypatch, "bad", script)
    home.write(".docker/config.json", {"credsStore": "bad"})
    assert home.user() is None


def test_a_missing_helper_is_a_warning(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    home.write(".docker/config.json", {"credsStore": "none-such"})
    assert home.user() is None
    assert "docker-credential-none-such, which is not installed" in caplog.text


@pytest.mark.parametrize("name", ["../evil", "a b", "", "-x"])
def test_a_helper_is_a_program_name(home: Home, name: str) -> None:
    home.write(".docker/config.json", {"credHelpers": {"h.example:5000": name}})
    with pytest.raises(UsageError):
        home.user()


# -- tokens ------------------------------------------------------------------------------------------------------------


def image(registry: FakeRegistry) -> None:
    registry.add_image("repo", "latest", [(TAR, bytes(1000))])


def test_an_anonymous_token() -> None:
    with FakeRegistry(auth="bearer", anonymous=True) as registry, client(registry) as c:
        image(registry)
        assert c.layer().read_at(10, 5) == bytes(5)
        token = registry.requests("/token")
        assert len(token) == 1
        assert "authorization" not in token[0].headers
        assert "service=fake" in token[0].query and "scope=repository%3Arepo%3Apull" in token[0].query


def test_a_password_is_shown_to_the_token_server_only() -> None:
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        image(registry)
        c.layer(credentials=USER).read_at(0, 1)
        assert {access.path == "/token" for access in registry.log} == {True, False}
        for access in registry.log:
            sent = access.headers.get("authorization", "Bearer")
            assert sent.startswith("Basic" if access.path == "/token" else "Bearer")


def test_basic_authentication() -> None:
    with FakeRegistry(auth="basic") as registry, client(registry) as c:
        image(registry)
        assert c.layer(credentials=USER).read_at(0, 1) == b"\0"
        assert [access.headers.get("authorization") for access in registry.log] == [None, USER.basic, USER.basic]


def test_an_identity_token_is_exchanged() -> None:
    credentials = Credentials(identity_token="identity")
    with FakeRegistry(auth="bearer", identity_tokens=("identity",)) as registry, client(registry) as c:
        image(registry)
        c.layer(credentials=credentials).read_at(0, 1)
        assert [access.method for access in registry.requests("/token")] == ["POST"]


def test_a_bearer_token_from_the_file_is_sent_as_it_is() -> None:
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        image(registry)
        token = registry.token_for("repository:repo:pull")
        c.layer(credentials=Credentials(registry_token=token)).read_at(0, 1)
        assert registry.requests("/token") == []


@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_refused_credentials_say_how_to_log_in(kind: str) -> None:
    wrong = Credentials("user", "canary-password-of-old", origin="/home/x/auth.json")
    with FakeRegistry(auth=kind) as registry, client(registry) as c:  # type: ignore[arg-type]
        image(registry)
        with pytest.raises(AuthError, match=f"podman login {registry.host}") as caught:
            c.source(credentials=wrong).resolve()
        assert "/home/x/auth.json" in str(caught.value)
        assert "canary" not in str(caught.value)


def test_a_user_without_credentials_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "DOCKER_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    with FakeRegistry(auth="basic") as registry, client(registry) as c:
        image(registry)
        with pytest.raises(AuthError, match="anonymous"):
            c.source().resolve()


def test_the_users_own_files_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with FakeRegistry(auth="basic") as registry, client(registry) as c:
        image(registry)
        path = Home(tmp_path).write("auth.json", {"auths": {f"{registry.host}/repo": auth("user", "canary-password")}})
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
        c.source().resolve()


def test_a_refusal_is_not_tried_again_for_half_a_minute() -> None:
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        image(registry)
        source = c.source(credentials=Credentials("user", "wrong"))
        for _ in range(5):
            with pytest.raises(AuthError):
                source.resolve()
        assert len(registry.requests("/token")) == 1


def test_many_threads_wait_for_one_token() -> None:
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        image(registry)
        blob = c.layer(credentials=USER)
        registry.log.clear()
        registry.expire_tokens()
        together = threading.Barrier(16)

        def read(_: int) -> bytes:
            together.wait()
            return blob.read_at(0, 8)

        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(read, range(16))) == {bytes(8)}
        assert len(registry.requests("/token")) == 1


def test_a_token_is_renewed_before_it_expires() -> None:
    with FakeRegistry(auth="bearer", token_life=0.3) as registry, client(registry) as c:
        image(registry)
        blob = c.layer(credentials=USER)
        registry.log.clear()
        for _ in range(10):
            blob.read_at(0, 8)
            threading.Event().wait(0.1)
        renewals = len(registry.requests("/token"))
        assert 3 <= renewals <= 5
        assert len(registry.log) == 10 + renewals, "no request was refused"


def test_a_push_asks_for_more_and_keeps_what_it_had() -> None:
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        image(registry)
        target = c.target(credentials=USER)
        layer = c.source(credentials=USER).resolve()
        digest = target.put_manifest(layer.raw, layer.media_type, "again")
        assert digest == layer.digest
        assert "scope=repository%3Arepo%3Apull%2Cpush" in registry.requests("/token")[-1].query


@pytest.mark.row("N16")
def test_a_realm_on_the_metadata_service_is_not_visited() -> None:
    realm = "http://169.254.169.254/latest/meta-data"
    with FakeRegistry(auth="bearer", realm=realm) as registry, client(registry) as c:
        image(registry)
        with pytest.raises(Exception, match="private network"):
            c.source(credentials=USER).resolve()
        assert c.counters.requests == 1


def test_a_token_server_that_answers_nonsense() -> None:
    for body in (b"", b"{}", b"[]", b'{"token": 1}', b'{"token": "a\\r\\nb"}', b"x" * 100_000):
        script = {("/token", None): Status(200, body=body)}
        with FakeRegistry(script, auth="bearer") as registry, client(registry) as c:
            image(registry)
            with pytest.raises(Exception, match="token"):
                c.source(credentials=USER).resolve()


def test_no_secret_reaches_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = Credentials("user", "canary-password")
    users = {"user": "canary-password"}
    with FakeRegistry(auth="bearer", users=users) as registry, client(registry) as c:
        image(registry)
        c.layer(credentials=secret).read_at(0, 10)
        for token in registry.tokens:
            assert token not in caplog.text
        assert registry.host in caplog.text
        assert "canary" not in caplog.text
