"""Rows N5 to N7, N16, S1 and S2 of the reliability plan: tokens, redirects, signed URLs, and what is said of them."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptfs.errors import AuthError, CkptfsError, UnavailableError
from ckptfs.sources.credentials import Credentials
from ckptfs.sources.origin import Reach
from tests.support.fake_registry import (
    FakeRegistry,
    Redirect,
    Reset,
    Silent,
    Status,
    Truncate,
    WrongRange,
)
from tests.support.faulty import BLOB, DATA, TAR, Faulty, Record, secure_source
from tests.support.registry_faults import Fault
from tests.support.sources import QUICK, Client, client, layers

# -- N5, N6: tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.row("N5")
def test_one_refresh_for_all_readers(record_property: Record) -> None:
    life, seconds = 1.0, float(os.environ.get("CKPTFS_SOAK_TOKENS", "4"))  # scripts/soak: 30
    with FakeRegistry(auth="bearer", token_life=life) as registry, client(registry) as c:
        faulty = Faulty(registry, c, DATA[:100_000])
        end = time.monotonic() + seconds

        def read(number: int) -> int:
            count = 0
            while time.monotonic() < end:
                assert faulty.blob.read_at(number, 100) == DATA[number : number + 100]
                count += 1
                time.sleep(0.1)
            return count

        with ThreadPoolExecutor(64) as pool:
            reads = sum(pool.map(read, range(64)))
        tokens = len(registry.requests("/token"))
        first_use: dict[int, float] = {}
        order = {f"Bearer {token}": number for number, token in enumerate(registry.tokens)}
        late = []  # how long after the first request with a newer token one with an older token came
        for access in registry.requests(BLOB):
            sent = order[access.headers["authorization"]]
            first_use.setdefault(sent, access.time)
            late += [access.time - began for number, began in first_use.items() if number > sent]
        figure = f"{reads} reads, 0 errors, {tokens} token requests in {seconds / life:.0f} lives"
        record_property("figure", f"{figure}; old token {len(late)} times, at most {max(late, default=0):.3f} s late")
        assert seconds / life - 1 <= tokens <= seconds / (0.9 * life) + 1, "renewed when a tenth of their life is left"
        assert max(late, default=0.0) <= 0.1, "only what was on its way already"


@pytest.mark.row("N6")
def test_revoked_credentials(record_property: Record) -> None:
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        faulty = Faulty(registry, c)
        registry.denying = True
        registry.expire_tokens()
        began = time.monotonic()
        for offset in range(5):
            with pytest.raises(AuthError, match="podman login"):
                faulty.blob.read_at(offset, 10)
        took = time.monotonic() - began
        record_property("figure", f"5 errors in {took:.2f} s, 1 token request")
        assert took < 1.0
        assert len(registry.requests("/token")) == 1


@pytest.mark.row("N6")
def test_a_registry_that_forbids_although_tokens_are_given(faulty: Faulty) -> None:
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        faulty = Faulty(registry, c)
        registry.script[BLOB, None] = Status(403)
        for offset in range(5):
            with pytest.raises(AuthError):
                faulty.blob.read_at(offset, 10)
        assert len(registry.requests("/token")) == 1


def test_a_registry_that_refuses_every_token() -> None:
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        faulty = Faulty(registry, c)
        challenge = f'Bearer realm="{registry.realm}",service="fake",scope="repository:repo:pull"'
        registry.script[BLOB, None] = Status(401, headers={"WWW-Authenticate": challenge})
        for offset in range(5):
            with pytest.raises(AuthError, match="own token server"):
                faulty.blob.read_at(offset, 10)
        assert len(registry.requests("/token")) == 3


# -- N7, S2, N16: redirects --------------------------------------------------------------------------------------------


@pytest.mark.row("N7")
def test_expired_signatures_are_renewed(record_property: Record) -> None:
    with FakeRegistry(auth="bearer") as registry, FakeRegistry(storage_of=registry) as storage, client(registry) as c:
        faulty = Faulty(registry, c)
        registry.script[BLOB, None] = Redirect(storage.url, life=0.3)
        end, reads = time.monotonic() + 1.0, 0
        while time.monotonic() < end:
            assert faulty.blob.read_at(reads, 1000) == DATA[reads : reads + 1000]
            reads += 1
            time.sleep(0.02)
        record_property("figure", f"{reads} reads, 0 errors, {faulty.asked} resolutions in 3 lives of a signature")
        assert 3 <= faulty.asked <= 5


@pytest.mark.row("N7")
@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_place_that_names_another_is_asked_for_again(faulty: Faulty, status: int) -> None:
    with FakeRegistry(storage_of=faulty.registry) as old, FakeRegistry(storage_of=faulty.registry) as new:
        faulty.registry.script[BLOB, None] = Redirect(old.url)
        assert faulty.blob.read_at(0, 10) == DATA[:10]
        old.script["blobs/", None] = Redirect(new.url, status=status)
        for offset in range(5):
            assert faulty.blob.read_at(offset, 10) == DATA[offset : offset + 10]
        assert faulty.asked == 2, "and where the registry's redirects end is kept anew"


@pytest.mark.row("N7")
def test_a_signature_that_stays_refused_is_an_error(faulty: Faulty) -> None:
    with FakeRegistry(storage_of=faulty.registry) as storage:
        faulty.registry.script[BLOB, None] = Redirect(storage.url, life=-1)
        with pytest.raises(AuthError):
            faulty.blob.read_at(0, 10)


def test_bytes_that_were_wrong_are_fetched_from_a_place_named_anew(faulty: Faulty) -> None:
    with FakeRegistry(storage_of=faulty.registry) as storage:
        faulty.registry.script[BLOB, None] = Redirect(storage.url)
        for _ in range(3):
            faulty.blob.read_at(0, 10)
        assert faulty.asked == 1
        faulty.blob.read_at(0, 10, attempt=1)
        assert faulty.asked == 2


@pytest.mark.row("S2")
def test_credentials_stay_with_their_origin(record_property: Record) -> None:
    with FakeRegistry(auth="bearer") as registry, FakeRegistry(storage_of=registry) as storage, client(registry) as c:
        faulty = Faulty(registry, c)
        with FakeRegistry({(BLOB, None): Redirect(storage.url)}) as second, FakeRegistry() as first:
            first.script[BLOB, None] = Redirect(second.url)
            registry.script[BLOB, None] = Redirect(first.url)
            assert faulty.blob.read_at(3, 50_000) == DATA[3:50_003]
            abroad = [*first.log, *second.log, *storage.log]
        assert len(abroad) == 3
        assert [name for access in abroad for name in access.headers if name in ("authorization", "cookie")] == []
        assert all(access.range == (3, 50_002) for access in abroad)
        assert "authorization" in registry.log[-1].headers
        record_property("figure", "no credential in 3 requests to other origins; 6th hop and downgrade refused")


@pytest.mark.row("S2")
@pytest.mark.parametrize(("hops", "allowed"), [(5, True), (6, False)])
def test_the_number_of_hops(faulty: Faulty, hops: int, allowed: bool) -> None:
    for hop in range(1, hops + 1):
        faulty.registry.script[BLOB, hop] = Redirect(faulty.registry.url)
    if allowed:
        assert faulty.blob.read_at(0, 10) == DATA[:10]
    else:
        with pytest.raises(UnavailableError, match="more than 5 times"):
            faulty.blob.read_at(0, 10)
        assert faulty.asked == 6


@pytest.mark.row("S2")
def test_no_way_from_https_to_http(trusted: Client, secure: FakeRegistry) -> None:
    with FakeRegistry(storage_of=secure) as storage:
        secure.script[BLOB, None] = Redirect(storage.url)
        source = secure_source(trusted)
        with pytest.raises(UnavailableError, match="from https to http"):
            source.blob(layers(source)[0]).read_at(0, 10)
        assert storage.log == []


@pytest.mark.row("N16")
@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fe80::1]/x",
        "http://0.0.0.0/x",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://user:canary@127.0.0.1/x",
        "//[",
        "",
    ],
)
def test_redirects_that_are_not_followed(faulty: Faulty, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda sock, address: opened.append(address))
    faulty.registry.script[BLOB, None] = Status(307, headers={"Location": url})
    with pytest.raises(UnavailableError) as caught:
        faulty.blob.read_at(0, 10)
    assert not caught.value.retryable
    assert "canary" not in str(caught.value)
    assert opened == []


@pytest.mark.row("N16")
@pytest.mark.parametrize(
    "realm",
    [
        "http://169.254.169.254/token",
        "https://169.254.169.254/token",
        "https://[fe80::1]/token",
        "http://[::ffff:169.254.169.254]/token",
        "file:///etc/passwd",
    ],
)
def test_token_servers_that_are_not_asked(realm: str, faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a registry that is itself inside; what one outside may not name, tests/unit/test_origin.py says."""
    faulty.registry.script[BLOB, None] = Status(
        401, headers={"WWW-Authenticate": f'Bearer realm="{realm}",service="x"'}
    )
    home, opened = int(faulty.registry.host.rpartition(":")[2]), []
    connect = socket.socket.connect

    def noted(sock: socket.socket, address: tuple[str, int]) -> None:
        if address[1] != home:
            opened.append(address)
            raise OSError("not in a test")
        connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    with pytest.raises(CkptfsError) as caught:
        faulty.blob.read_at(0, 10)
    assert opened == []
    assert not caught.value.retryable


@pytest.mark.row("N16")
def test_a_name_that_leads_inside_after_it_was_checked(record_property: Record) -> None:
    """DNS rebinding: the connection is closed before a byte is sent."""
    with FakeRegistry() as registry, client(registry) as c:
        attempts = c.transport.attempts(1.0)
        for reach in (Reach.PUBLIC, Reach.PUBLIC):
            with pytest.raises(UnavailableError, match="private network") as caught:
                c.transport.send("GET", f"{registry.url}/v2/", attempts, reach=reach)
            assert not caught.value.retryable
        assert registry.log == []
        record_property("figure", "0 connections for 8 redirects and 5 token servers of a registry inside")


@pytest.mark.row("S1")
def test_nothing_secret_is_said(caplog: pytest.LogCaptureFixture, record_property: Record) -> None:
    """Canaries in the password, tokens, signatures, userinfo and error bodies; everything is logged."""
    caplog.set_level("DEBUG")
    said: list[str] = []
    secret = Credentials("user", "canary-password", origin="auth.json")
    faults: list[Fault] = [
        Status(500, body=b"canary-error-body"),
        Status(404, body=b'{"errors":[{"code":"canary-error-body","message":"canary-error-body"}]}'),
        Status(403, body=b"canary-error-body"),
        Status(307, headers={"Location": "http://user:canary-userinfo@127.0.0.1/x?canary-query"}),
        Status(200, headers={"Content-Encoding": "canary-header"}),
    ]
    users = {"user": "canary-password"}
    hasty = QUICK._replace(read_deadline=0.5, first_byte=0.2)
    with (
        FakeRegistry(auth="bearer", users=users) as registry,
        FakeRegistry(storage_of=registry) as storage,
        client(registry, timeouts=hasty) as c,
    ):
        registry.add_image("repo", "latest", [(TAR, DATA)])
        blob = c.layer(credentials=secret)
        for fault in faults:
            registry.script[BLOB, None] = fault
            with pytest.raises(CkptfsError) as caught:
                blob.read_at(0, 10)
            said.append(str(caught.value))
        registry.script[BLOB, None] = Redirect(storage.url)
        for fault in (Status(500), Status(404), Silent(), Truncate(0), Reset(), WrongRange()):
            storage.script[BLOB, None] = fault
            with pytest.raises(CkptfsError) as caught:
                c.layer(credentials=secret).read_at(0, 10)
            said.append(str(caught.value))
        for token in registry.tokens:
            assert token not in caplog.text
    text = caplog.text + "\n".join(said)
    assert registry.host in text and "Signature" not in text
    assert "canary" not in text
    record_property("figure", f"0 hits in {len(text)} characters of logs and errors")
