"""A small registry over real TCP that misbehaves on a script, and remembers what it was asked.

    with FakeRegistry({("blobs/", 1): Truncate(40)}) as registry:
        registry.add_image("repo", "latest", [(TAR, data)])
        ...  # registry.reference("repo:latest")
        assert registry.requests("GET", "blobs/")[1].range == (40, 99)

A script maps (part of "METHOD /path", n) to a fault: the n-th request (from 1) whose line holds that part gets it; with
n None every one. `script` may be changed while it runs. Serves pull and push of the distribution spec, tokens, basic
authentication, referrers. Never used for speed.
"""

import json
import re
import secrets
import socket
import ssl
import struct
import threading
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Mapping, Sequence
from http.server import ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal, Self

from ckptfs.model.oci import ANNOTATION_REF_NAME, OCI_MANIFEST, Digest
from tests.support.certificates import server_context
from tests.support.registry_faults import (
    Access,
    Claims,
    Endless,
    ExpireToken,
    Fault,
    Flip,
    Full200,
    Paused,
    Redirect,
    Reset,
    Silent,
    Status,
    TooLong,
    Trickle,
    Truncate,
    WrongRange,
)
from tests.support.registry_routes import Handler

__all__ = [
    "Access",
    "Claims",
    "Endless",
    "ExpireToken",
    "FakeRegistry",
    "Flip",
    "Full200",
    "Paused",
    "Redirect",
    "Reset",
    "Silent",
    "Status",
    "TooLong",
    "Trickle",
    "Truncate",
    "WrongRange",
]

CONFIG = "application/vnd.oci.image.config.v1+json"
Script = dict[tuple[str, int | None], Fault]


class FakeRegistry:
    """A context manager; `host` is "127.0.0.1:PORT".

    auth         "" for everybody, "basic", or "bearer" with tokens from /token that live for `token_life` seconds.
    anonymous    whether /token gives tokens to nobody in particular.
    users        names and passwords; `identity_tokens` are accepted by POST /token.
    realm        named in challenges in place of the registry's own /token.
    referrers    whether it has the referrers API.
    storage_of   serve the blobs of another FakeRegistry, as an object store does: no authentication, signatures expire.
    tls          speak https with the certificate of tests.support.certificates, which nobody trusts.
    """

    def __init__(
        self,
        script: Mapping[Any, Fault] | None = None,
        *,
        auth: Literal["", "basic", "bearer"] = "",
        anonymous: bool = False,
        users: Mapping[str, str] | None = None,
        identity_tokens: tuple[str, ...] = (),
        token_life: float = 300.0,
        realm: str = "",
        referrers: bool = True,
        storage_of: "FakeRegistry | None" = None,
        tls: bool = False,
    ) -> None:
        self.script: Script = dict(script or {})
        self.auth = auth
        self.anonymous = anonymous
        self.users = dict(users or {"user": "canary-password"})
        self.identity_tokens = identity_tokens
        self.token_life = token_life
        self.referrers = referrers
        self.many_ranges = True  # False: a request for several ranges is answered with the whole blob
        self.names_scope = True  # False: challenges do not say what a token is needed for
        self.denying = False  # True: the token server refuses everybody
        self.is_storage = storage_of is not None
        self.blobs: dict[str, bytes] = storage_of.blobs if storage_of is not None else {}
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}  # by (repository, tag or digest)
        self.owned: set[tuple[str, str]] = set()  # (repository, digest) of blobs
        self.log: list[Access] = []
        self.tokens: dict[str, tuple[float, str]] = {}  # token: (end of life, scope)
        self.sessions: dict[str, bytearray] = {}
        self.closing = threading.Event()
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(self, tls)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"
        self.realm = realm or f"{self.url}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.end()

    # -- contents ------------------------------------------------------------------------------------------------------

    def add_blob(self, data: bytes, repository: str = "repo") -> Digest:
        digest = Digest.of(data)
        self.blobs[str(digest)] = data
        self.owned.add((repository, str(digest)))
        return digest

    def add_manifest(self, repository: str, raw: bytes, media_type: str, tag: str = "") -> Digest:
        digest = Digest.of(raw)
        for name in filter(None, (tag, str(digest))):
            self.manifests[repository, name] = (raw, media_type)
        return digest

    def add_image(
        self,
        repository: str,
        tag: str,
        layers: list[tuple[str, bytes]],
        *,
        config: bytes = b"{}",
        annotations: Mapping[str, str] | None = None,
        layer_annotations: Sequence[Mapping[str, str]] = (),
    ) -> Digest:
        """An OCI image of `layers`, (media type, bytes) each; returns the digest of its manifest."""
        described = [(CONFIG, config), *layers]
        entries = [
            {"mediaType": kind, "digest": str(self.add_blob(data, repository)), "size": len(data)}
            for kind, data in described
        ]
        notes = chain(layer_annotations, repeat({}))
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": entries[0],
            "layers": [{**entry, "annotations": dict(note)} for entry, note in zip(entries[1:], notes, strict=False)],
            "annotations": dict(annotations or {}),
        }
        return self.add_manifest(repository, json.dumps(manifest).encode(), OCI_MANIFEST, tag)

    def add_layout(self, layout: Path, repository: str) -> None:
        """Every image of an OCI layout, under its own tags."""
        for blob in (layout / "blobs" / "sha256").iterdir():
            self.add_blob(blob.read_bytes(), repository)
        for entry in json.loads((layout / "index.json").read_text())["manifests"]:
            tag = entry.get("annotations", {}).get(ANNOTATION_REF_NAME, "")
            self._add_tree(layout, repository, entry, tag)

    def _add_tree(self, layout: Path, repository: str, entry: dict[str, Any], tag: str) -> None:
        raw = self.blobs[entry["digest"]]
        self.add_manifest(repository, raw, entry["mediaType"], tag)
        for inner in json.loads(raw).get("manifests", []):
            self._add_tree(layout, repository, inner, "")

    # -- questions -----------------------------------------------------------------------------------------------------

    def reference(self, name: str) -> str:
        return f"{self.host}/{name}"

    def requests(self, *parts: str) -> list[Access]:
        """The requests so far whose "METHOD /path" holds all of `parts`."""
        return [a for a in list(self.log) if all(part in f"{a.method} {a.path}" for part in parts)]

    def expire_tokens(self) -> None:
        with self._lock:
            self.tokens = {token: (0.0, scope) for token, (_, scope) in self.tokens.items()}

    def reset_connections(self) -> None:
        """RST on every connection that there is, whatever is under way on it."""
        self._server.reset()

    @property
    def accepted(self) -> int:
        """How many connections have been made so far."""
        return self._server.accepted

    # -- for the handler -----------------------------------------------------------------------------------------------

    def note(self, access: Access) -> Fault | None:
        """Log a request; the fault that the script has for it."""
        line = f"{access.method} {access.path}"
        with self._lock:
            self.log.append(access)
            found: Fault | None = None
            for part in {part for part, _ in self.script if part in line}:
                self._seen[part] += 1
                found = self.script.get((part, self._seen[part])) or self.script.get((part, None)) or found
            return found

    def token_for(self, scope: str) -> str:
        token = f"canary-{secrets.token_hex(16)}"
        with self._lock:
            self.tokens[token] = (time.monotonic() + self.token_life, scope)
        return token

    def admits(self, header: str, repository: str, action: str) -> bool:
        kind, _, value = header.partition(" ")
        if self.auth == "basic":
            return kind == "Basic" and self.knows(value)
        end, scope = self.tokens.get(value, (0.0, ""))
        granted = re.search(rf"repository:{re.escape(repository)}:(\S*)", scope)
        return kind == "Bearer" and time.monotonic() < end and granted is not None and action in granted[1].split(",")

    def lives(self, token: str) -> bool:
        return time.monotonic() < self.tokens.get(token, (0.0, ""))[0]

    def knows(self, basic: str) -> bool:
        name, _, password = b64decode(basic).decode().partition(":")
        return self.users.get(name) == password


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, registry: FakeRegistry, tls: bool) -> None:
        self.registry = registry
        self.connections: set[socket.socket] = set()
        self.accepted = 0
        self.context: ssl.SSLContext | None = None
        if tls:
            self.context = server_context()
        super().__init__(("127.0.0.1", 0), Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.accepted += 1
        if self.context is not None:
            connection = self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what the tests are about."""

    def reset(self) -> None:
        for connection in list(self.connections):
            try:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def end(self) -> None:
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.server_close()
