"""What registries do that docker-registry does not: how they refuse, what they leave out, and where they send us."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptfs.errors import AuthError, LimitExceeded, UnavailableError, UsageError
from ckptfs.model.oci import OCI_INDEX, OCI_MANIFEST, Digest
from ckptfs.push.image_files import LayerFiles
from ckptfs.settings import KiB, Registries
from ckptfs.sources import host_files
from ckptfs.sources.connections import Pools
from ckptfs.sources.credentials import Credentials
from tests.support.chunked import PAGES, add_chunked
from tests.support.fake_registry import FakeRegistry, Full200, Redirect, Silent, Status
from tests.support.faulty import DATA, TAR, secure_source
from tests.support.registry_faults import Fault
from tests.support.sources import USER, Client, client, layers
from tests.support.tools import wait_for

EMPTY = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": str(Digest.of(b"{}")), "size": 2}
KIND = "application/x.note"


def attach(c: Client, note: str = "", credentials: Credentials | None = None) -> Digest:
    """An artifact whose subject is repo:latest; its digest."""
    image = c.source(credentials=credentials).resolve()
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": KIND,
        "config": EMPTY,
        "layers": [EMPTY],
        "subject": {"mediaType": OCI_MANIFEST, "digest": str(image.digest), "size": len(image.raw)},
        "annotations": {"note": note},
    }
    return c.target(credentials=credentials).put_manifest(json.dumps(document).encode(), OCI_MANIFEST, "")


def attached(c: Client, credentials: Credentials | None = None) -> list[Digest]:
    source = c.source(credentials=credentials)
    return [entry.digest for entry in source.referrers(source.resolve().digest, KIND)]


# -- what is attached to an image --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [
        Status(400),
        Status(403),
        Status(405),
        Status(406),
        Status(429),
        Status(501),
        Status(200, body=b"<html>Sign in</html>"),
        Status(200, body=b"{}"),
    ],
)
def test_no_answer_but_a_list_says_what_is_attached(refusal: Fault) -> None:
    """GHCR answers 303 to a page for people, which is HTML, or 429; registry.k8s.io leads to a login."""
    with FakeRegistry(referrers=False) as registry, FakeRegistry({("/referrers/", None): refusal}) as pages:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        with client(registry) as c:
            found = attach(c)
            assert attached(c) == [found], "by its tag"
            registry.script["/referrers/", None] = refusal
            assert attached(c) == [found]
            registry.script["/referrers/", None] = Redirect(pages.url, status=303)
            assert attached(c) == [found]


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_list_that_is_forbidden_forbids_nothing_else(auth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ECR says 403 where a policy lacks a right; and a token server may give the same token again."""
    with FakeRegistry({("/referrers/", None): Status(403)}, auth=auth) as registry, client(registry) as c:  # type: ignore[arg-type]
        if auth == "bearer":
            token = registry.token_for("repository:repo:pull")
            monkeypatch.setattr(registry, "token_for", lambda scope: token)
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = c.source(credentials=USER)
        (layer,) = layers(source)
        assert source.referrers(source.resolve().digest) == ()
        assert source.blob(layer).read_at(5, 100) == DATA[5:105]


def test_a_list_that_wants_another_right_forbids_nothing_else() -> None:
    """ACR: what is attached is metadata, which a token for pulling may not see."""
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        scope = "repository:repo:metadata_read"
        wider = f'Bearer realm="{registry.realm}",service="fake",scope="{scope}",error="insufficient_scope"'
        registry.script["/referrers/", None] = Status(401, headers={"WWW-Authenticate": wider})
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = c.source(credentials=USER)
        (layer,) = layers(source)
        assert source.referrers(source.resolve().digest) == ()
        assert source.blob(layer).read_at(5, 100) == DATA[5:105]


WANTED = 'Bearer realm="{}",service="fake",scope="repository:repo:metadata_read"'


@pytest.mark.parametrize("challenge", ['Basic realm="{}"', WANTED])
def test_a_list_that_wants_a_login_is_all_that_wants_one(challenge: str) -> None:
    """Nobody has to log in for anything else, and the token server gives strangers none."""
    with FakeRegistry() as registry, client(registry) as c:
        refusal = Status(401, headers={"WWW-Authenticate": challenge.format(registry.realm)})
        registry.script["/referrers/", None] = refusal
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = c.source()
        (layer,) = layers(source)
        assert source.referrers(source.resolve().digest) == ()
        assert source.blob(layer).read_at(5, 100) == DATA[5:105]


def test_a_token_is_as_good_as_before_when_a_list_wants_another() -> None:
    with FakeRegistry({("/token", 2): Status(403)}, auth="bearer") as registry, client(registry) as c:
        refusal = Status(401, headers={"WWW-Authenticate": WANTED.format(registry.realm)})
        registry.script["/referrers/", None] = refusal
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = c.source(credentials=USER)
        (layer,) = layers(source)
        assert source.referrers(source.resolve().digest) == ()
        assert source.blob(layer).read_at(5, 100) == DATA[5:105]
        assert len(registry.requests("/token")) == 2


def test_nobody_else_waits_for_the_token_that_a_list_wants() -> None:
    with FakeRegistry({("/token", None): Silent()}) as registry, client(registry) as c, ThreadPoolExecutor(1) as pool:
        refusal = Status(401, headers={"WWW-Authenticate": WANTED.format(registry.realm)})
        registry.script["/referrers/", None] = refusal
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = c.source()
        (layer,) = layers(source)
        asked = pool.submit(source.referrers, source.resolve().digest)
        wait_for("the request for a token", lambda: registry.requests("/token"))
        assert source.blob(layer).read_at(5, 100) == DATA[5:105]
        assert not asked.done()


def test_a_registry_that_takes_the_tag_for_the_digest_has_no_list() -> None:
    """registry.gitlab.com: manifests/sha256-HEX is manifests/sha256:HEX."""
    with FakeRegistry(referrers=False) as registry, client(registry) as c:
        digest = registry.add_image("repo", "latest", [(TAR, DATA)])
        raw, kind = registry.manifests["repo", str(digest)]
        registry.manifests["repo", f"sha256-{digest.hex}"] = (raw, kind)
        assert attached(c) == []
        index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()
        registry.manifests["repo", f"sha256-{Digest.of(index).hex}"] = (index, OCI_INDEX)
        assert c.source().referrers(Digest.of(index)) == ()
        assert attach(c)


def paged(registry: FakeRegistry, digests: list[Digest], link: Callable[[int], str]) -> None:
    """The API lists one of `digests` on each page; `link` is what names the page of a number."""
    for number, digest in enumerate(digests, 1):
        entry = {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": 2, "artifactType": KIND}
        page = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
        following = {"Link": link(number + 1)} if number < len(digests) else {}
        registry.script["GET /v2/repo/referrers", number] = Status(
            200, body=json.dumps(page).encode(), headers=following
        )


@pytest.mark.parametrize(
    "link",
    [
        '</v2/repo/referrers/x?page={}>; rel="next"',
        "<{url}/v2/repo/referrers/x?page={}>;rel=next",
        '<?page={}>; title="a"; rel="next"',
    ],
)
def test_a_list_of_several_pages_is_read_to_its_end(link: str) -> None:
    digests = [Digest.of(bytes([number])) for number in range(3)]
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        paged(registry, digests, lambda number: link.format(number, url=registry.url))
        assert attached(c) == digests
        assert [a.query for a in registry.requests("/referrers/")] == ["", "page=2", "page=3"]


def test_a_list_has_so_many_pages_and_no_more() -> None:
    most = c_limit = Client("127.0.0.1:1").settings.limits.referrer_pages
    for count in (most, most + 1):
        digests = [Digest.of(bytes([number])) for number in range(count)]
        with FakeRegistry() as registry, client(registry) as c:
            registry.add_image("repo", "latest", [(TAR, DATA)])
            paged(registry, digests, lambda number: f"<?page={number}>; rel=next")
            if count == c_limit:
                assert attached(c) == digests
            else:
                with pytest.raises(LimitExceeded, match="too many pages"):
                    attached(c)


# -- uploads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 500])
def test_a_mount_that_is_refused_is_an_upload(status: int) -> None:
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = c.source()
        (layer,) = layers(source)
        registry.script["POST /v2/other/blobs/uploads/", 1] = Status(status)
        registry.script["POST /v2/other/blobs/uploads/", None] = Status(status)
        target = c.target("other:x")
        assert not target.mount(layer, "repo")
        registry.script.clear()
        target.put_blob(layer, source.blob(layer), lambda count: None)
        assert target.has(layer)


def test_a_mount_at_a_server_that_is_told_which_registry_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hosts.toml's `server` has another name than the registry: ?ns= goes with every request."""
    monkeypatch.setattr(host_files, "CONTAINERD_DIRS", (tmp_path,))
    monkeypatch.setattr(host_files, "CONTAINERS_DIR", tmp_path / "none")
    with FakeRegistry() as registry:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        (tmp_path / "home.example").mkdir()
        (tmp_path / "home.example" / "hosts.toml").write_text(f'server = "{registry.url}"\n')
        with client("home.example", registries=Registries(system_files=True)) as c:
            (layer,) = layers(c.source())
            assert c.target("other:x").mount(layer, "repo")
        assert all("ns=home.example" in access.query for access in registry.log)


@pytest.mark.parametrize("fault", [Status(403), Status(500), Status(501)])
def test_a_session_in_place_of_a_mount_need_not_be_ended(fault: Fault) -> None:
    with FakeRegistry({("DELETE", None): fault}) as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        (layer,) = layers(c.source())
        assert not c.target("other:x").mount(layer, "nowhere")
        assert len(registry.requests("POST")) == 1
        elsewhere = Status(202, headers={"Location": "http://203.0.113.1/upload"})
        registry.script["POST", None] = elsewhere
        assert not c.target("other:x").mount(layer, "nowhere")


def test_a_storage_service_that_refuses_head_has_the_blob() -> None:
    """The registry sends us there with a signature for GET, whatever it was asked."""
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        with FakeRegistry({("HEAD", None): Status(403)}, storage_of=registry) as storage:
            (layer,) = layers(c.source())
            registry.script["/blobs/sha256", None] = Redirect(storage.url)
            assert c.target().has(layer)
            assert [(a.method, a.range) for a in storage.log] == [("HEAD", None), ("GET", (0, 0))]
            storage.blobs.pop(str(layer.digest))
            assert not c.target().has(layer)


def test_a_request_that_took_too_long_is_made_again() -> None:
    with FakeRegistry({("manifests/", 1): Status(408)}) as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        assert c.source().resolve()


@pytest.mark.parametrize("status", [200, 201, 204])
def test_a_patch_is_taken_with_any_success(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulp and go-containerregistry say 204, as the old specification did."""
    from tests.support.registry_routes import Handler

    reply = Handler._reply

    def other(self: Handler, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        reply(self, status if (self.command, code) == ("PATCH", 202) else code, body, headers)

    monkeypatch.setattr(Handler, "_reply", other)
    with FakeRegistry() as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = c.source()
        (layer,) = layers(source)
        target = c.target("other:x")
        target.put_blob(layer, source.blob(layer), lambda count: None)
        assert target.has(layer) and len(registry.requests("PATCH")) == 1


@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_pushing_to_an_insecure_host_speaks_what_it_speaks(
    tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_files, "CONTAINERS_DIR", tmp_path)
    monkeypatch.setattr(host_files, "is_loopback", lambda host: False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with FakeRegistry(tls=tls) as registry, FakeRegistry() as origin:
        (tmp_path / "registries.conf").write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
        origin.add_image("repo", "latest", [(TAR, DATA)])
        with client(origin) as other, client(registry, registries=Registries(system_files=True)) as c:
            source = other.source()
            (layer,) = layers(source)
            target = c.target()
            assert not target.has(layer) and not target.mount(layer, "nowhere")
            target.put_blob(layer, source.blob(layer), lambda count: None)
            assert c.target().put_manifest(source.resolve().raw, OCI_MANIFEST, "latest")


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_a_challenge_without_a_scope_is_about_the_repository() -> None:
    """Quay and Artifactory leave it out; docker and podman ask for what they need."""
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        registry.names_scope = False
        registry.add_image("a/repo", "latest", [(TAR, DATA)])
        source = c.source("a/repo:latest", USER)
        (layer,) = layers(source)
        assert source.blob(layer).read_at(0, 10) == DATA[:10]
        assert [a.query for a in registry.requests("/token")] == ["service=fake&scope=repository%3Aa%2Frepo%3Apull"]
        target = c.target("other:x", USER)
        target.put_blob(layer, source.blob(layer), lambda count: None)
        assert target.has(layer)


def test_a_push_asks_for_all_that_it_needs_at_once() -> None:
    """Registries tell by 403 that a token lacks the right to push, or by a challenge that says nothing of it."""
    with FakeRegistry(auth="bearer") as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        source = c.source(credentials=USER)
        (layer,) = layers(source)
        target = c.target("other:x", USER)
        registry.log.clear()
        assert not target.has(layer)
        target.put_blob(layer, source.blob(layer), lambda count: None)
        (token,) = [a for a in registry.requests("/token") if "other" in a.query]
        assert "scope=repository%3Aother%3Apull%2Cpush" in token.query


def test_what_anonymous_users_may_not_have_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Docker Hub gives everybody a token, which is good for nothing where the repository is private or missing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "DOCKER_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    with FakeRegistry(auth="bearer", anonymous=True) as registry, client(registry) as c:
        monkeypatch.setattr(registry, "admits", lambda *_: False)
        with pytest.raises(AuthError, match="anonymous users may not pull, or there is no such repository") as caught:
            c.source().resolve()
        assert "podman login" in str(caught.value)
        assert len(registry.requests("/token")) == 1


# -- documents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["application/json", "text/plain; charset=utf-8", "application/octet-stream"])
def test_documents_that_nobody_says_the_type_of(kind: str) -> None:
    """`mediaType` is optional in OCI's documents, and static file servers know no better."""
    with FakeRegistry() as registry, client(registry) as c:
        digest = registry.add_image("repo", "one", [(TAR, DATA)])
        raw, _ = registry.manifests["repo", str(digest)]
        image = json.dumps({key: value for key, value in json.loads(raw).items() if key != "mediaType"}).encode()
        entry = {"mediaType": OCI_MANIFEST, "digest": str(Digest.of(image)), "size": len(image)}
        index = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
        registry.add_manifest("repo", image, kind, "image")
        registry.add_manifest("repo", index, kind, "index")
        assert c.source("repo:image").resolve().media_type == OCI_MANIFEST
        assert c.source("repo:index").resolve().media_type == OCI_INDEX


# -- certificates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ca.crt", "client.cert"])
def test_a_certificate_that_is_none_is_named(name: str, tmp_path: Path) -> None:
    """It is no outage, and waiting does not help."""
    with FakeRegistry(tls=True) as registry, client(registry) as c:
        folder = tmp_path / registry.host
        folder.mkdir()
        (folder / name).write_text("not PEM")
        c.transport._pools = c.pools = Pools((tmp_path,))
        with pytest.raises(UsageError, match=f"{name} cannot be used") as caught:
            secure_source(c).resolve()
        assert not caught.value.retryable and c.counters.requests <= 1


# -- ranges ------------------------------------------------------------------------------------------------------------


def test_a_registry_without_ranges_is_named_with_a_way_out() -> None:
    """`ckptfs pull` reads ranges as well: that the image can be pulled whole was no help."""
    with FakeRegistry({("GET /v2/repo/blobs/", None): Full200()}) as registry, client(registry) as c:
        registry.add_image("repo", "latest", [(TAR, DATA)])
        blob = c.layer()
        for _ in range(2):  # found out, and remembered
            with pytest.raises(UnavailableError, match=f"{registry.host} sends whole blobs.*skopeo copy .* oci:DIR"):
                blob.read_at(1000, 100_000)


def test_a_push_reads_from_the_front_what_it_cannot_have_in_parts(tmp_path: Path) -> None:
    """A zstd:chunked layer is a zstd stream as well, and its digest vouches for all of it."""
    with FakeRegistry({("GET /v2/repo/blobs/", None): Full200()}) as registry, client(registry) as c:
        add_chunked(registry, {PAGES: DATA}, 64 * KiB)
        source = c.source()
        with LayerFiles([source.blob(layer) for layer in layers(source)], tmp_path, c.settings) as files:
            (pages,) = (file for file in files.files() if file.path == PAGES)
            assert pages.open is not None
            payload, buffer, found = pages.open(), memoryview(bytearray(64 * KiB)), bytearray()
            while count := payload.readinto(buffer):
                found += buffer[:count]
            assert found == DATA
        assert c.counters.bytes < 2 * len(DATA)
