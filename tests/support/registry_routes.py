"""The routes of FakeRegistry: pull, push, tokens and referrers of the distribution spec, and its faults performed."""

import hashlib
import json
import re
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

from ckptfs.model.oci import OCI_INDEX, OCI_MANIFEST, Digest
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

if TYPE_CHECKING:
    from tests.support.fake_registry import FakeRegistry


class Handler(BaseHTTPRequestHandler):
    """The routes of the distribution spec."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any
    fault: Fault | None
    registry: "FakeRegistry"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.fault = None
        self.registry = self.server.registry
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        access = Access(time.monotonic(), self.command, url.path, url.query, headers, self.client_address[1])
        self.fault = self.registry.note(access)
        if isinstance(self.fault, ExpireToken):
            self.registry.expire_tokens()
        elif isinstance(self.fault, Silent):
            self.registry.closing.wait()
            self.close_connection = True
            return
        elif isinstance(self.fault, Reset) and self.command == "GET" and not self.fault.after:
            self._reset()
            return
        elif isinstance(self.fault, Endless):
            self._body()
            self._endless(self.fault.code, self.fault.size)
            return
        elif isinstance(self.fault, Status):
            self._body()
            extra = {"Retry-After": str(self.fault.retry_after)} if self.fault.retry_after is not None else {}
            self._reply(self.fault.code, self.fault.body, {**extra, **self.fault.headers})
            return
        elif isinstance(self.fault, Redirect):
            self._body()
            end = time.time() + self.fault.life
            target = self.fault.url or f"{self.fault.to}{url.path}?Expires={end:.3f}&Signature=canary-signature"
            self._reply(self.fault.status, b"", {"Location": target})
            return
        self._route(url.path)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _route(self, path: str) -> None:
        if path == "/token":
            self._token()
            return
        match = re.match(r"/v2/(?P<name>.+?)/(?P<kind>manifests|blobs/uploads|blobs|referrers)/(?P<rest>[^/]*)$", path)
        if match is None:
            self._reply(200 if path == "/v2/" else 404)
            return
        self.name, kind, rest = match["name"], match["kind"], match["rest"]
        action = "pull" if self.command in ("GET", "HEAD") and kind != "blobs/uploads" else "push"
        header = self.headers.get("Authorization", "")
        if self.registry.is_storage:
            if float(self.query.get("Expires", "inf")) < time.time():
                self._reply(403, b"<Error><Code>AccessDenied</Code></Error>")
                return
        elif self.registry.auth and not self.registry.admits(header, self.name, action):
            self._body()
            self._challenge("pull" if action == "pull" else "pull,push")
            return
        handle = {"manifests": self._manifest, "blobs": self._blob, "blobs/uploads": self._upload}
        handle.get(kind, self._referrers)(rest)

    # -- pull ----------------------------------------------------------------------------------------------------------

    def _manifest(self, name: str) -> None:
        if self.command == "PUT":
            raw = self._body()
            kind = self.headers.get("Content-Type", OCI_MANIFEST)
            digest = self.registry.add_manifest(self.name, raw, kind, "" if ":" in name else name)
            subject = json.loads(raw).get("subject") if self.registry.referrers else None
            extra = {"OCI-Subject": subject["digest"]} if subject else {}
            self._reply(201, b"", {"Docker-Content-Digest": str(digest), **extra})
            return
        found = self.registry.manifests.get((self.name, name))
        if found is None:
            known = any(repository == self.name for repository, _ in self.registry.manifests)
            self._error(404, "MANIFEST_UNKNOWN" if known else "NAME_UNKNOWN")
            return
        raw, kind = found
        known = (one for (_, one), same in self.registry.manifests.items() if same == found and ":" in one)
        told = name if ":" in name else next(known, str(Digest.of(raw)))
        self._reply(200, raw, {"Content-Type": kind, "Docker-Content-Digest": told})

    def _blob(self, digest: str) -> None:
        data = self.registry.blobs.get(digest)
        owned = self.registry.is_storage or (self.name, digest) in self.registry.owned
        if data is None or not owned:
            self._error(404, "BLOB_UNKNOWN")
            return
        several = re.fullmatch(r"bytes=(\d+-\d+(?:,\d+-\d+)+)", self.headers.get("Range", ""))
        if several is not None and self.registry.many_ranges:
            self._parts(data, [tuple(map(int, each.split("-"))) for each in several[1].split(",")])
            return
        wanted = re.match(r"bytes=(\d+)-(\d+)$", self.headers.get("Range", ""))
        if wanted is None or isinstance(self.fault, Full200):
            self._reply(200, data, {"Accept-Ranges": "bytes"})
            return
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        if first >= len(data):
            self._error(416, "RANGE_INVALID")
            return
        if isinstance(self.fault, WrongRange):
            first, last = first + self.fault.shift, last + self.fault.shift
        extra = self.fault.extra if isinstance(self.fault, TooLong) else 0
        content = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self._reply(206, data[first : last + 1] + bytes(extra), content)

    def _parts(self, data: bytes, ranges: list[tuple[int, ...]]) -> None:
        """Several ranges, as Go's net/http answers."""
        shift = self.fault.shift if isinstance(self.fault, WrongRange) else 0
        body = b""
        for first, last in ranges:
            place = b"bytes %d-%d/%d" % (first + shift, last + shift, len(data))
            head = b"\r\n--b0undary\r\nContent-Range: %s\r\nContent-Type: application/octet-stream\r\n\r\n" % place
            body += head + data[first + shift : last + shift + 1]
        body = body.removeprefix(b"\r\n") + b"\r\n--b0undary--\r\n"
        self._reply(206, body, {"Content-Type": "multipart/byteranges; boundary=b0undary"})

    def _referrers(self, digest: str) -> None:
        if not self.registry.referrers:
            self._reply(404, b"404 page not found\n")
            return
        entries = []
        for (name, key), (raw, kind) in list(self.registry.manifests.items()):
            document = json.loads(raw)
            if name == self.name and ":" in key and document.get("subject", {}).get("digest") == digest:
                own = document.get("artifactType") or document["config"]["mediaType"]
                entry = {"mediaType": kind, "digest": key, "size": len(raw), "artifactType": own}
                entries.append({**entry, "annotations": document.get("annotations", {})})
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
        self._reply(200, json.dumps(index).encode(), {"Content-Type": OCI_INDEX})

    # -- push ----------------------------------------------------------------------------------------------------------

    def _upload(self, session_id: str) -> None:
        registry = self.registry
        if self.command == "POST":
            self._body()
            mounted = self.query.get("mount", "")
            if (self.query.get("from", ""), mounted) in registry.owned:
                registry.owned.add((self.name, mounted))
                self._reply(201, b"", {"Location": f"/v2/{self.name}/blobs/{mounted}"})
                return
            session_id = secrets.token_hex(8)
            registry.sessions[session_id] = bytearray()
        session = registry.sessions.get(session_id)
        if session is None:
            self._body()
            self._error(404, "BLOB_UPLOAD_UNKNOWN")
        elif self.command == "DELETE":
            del registry.sessions[session_id]
            self._reply(204)
        elif self.command == "PUT":
            data = bytes(session) + self._body()
            del registry.sessions[session_id]
            if str(Digest.of(data)) != self.query.get("digest"):
                self._error(400, "DIGEST_INVALID")
                return
            registry.add_blob(data, self.name)
            self._reply(201, b"", {"Location": f"/v2/{self.name}/blobs/{Digest.of(data)}"})
        else:
            if self.command == "PATCH" and not self._receive_into(session):
                return
            place = f"/v2/{self.name}/blobs/uploads/{session_id}?state={quote(hashlib.md5(session).hexdigest())}"
            last = max(len(session) - 1, 0)
            self._reply(204 if self.command == "GET" else 202, b"", {"Location": place, "Range": f"0-{last}"})

    def _receive_into(self, session: bytearray) -> bool:
        """A PATCH; False where the fault of the hour ended the connection in the middle of it."""
        starts = self.headers.get("Content-Range", "0-0").partition("-")[0]
        if int(starts) != len(session) and "Content-Range" in self.headers:
            self._body()
            self._error(416, "RANGE_INVALID")
            return False
        if isinstance(self.fault, Reset):
            session += self.rfile.read(self.fault.after)
            self._reset()
            return False
        session += self._body()
        return True

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _challenge(self, actions: str) -> None:
        if self.registry.auth == "basic":
            value = 'Basic realm="fake registry"'
        else:
            scope = f',scope="repository:{self.name}:{actions}"' if self.registry.names_scope else ""
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            lacking = ',error="insufficient_scope"' if self.registry.lives(token) else ""
            value = f'Bearer realm="{self.registry.realm}",service="fake"{scope}{lacking}'
        body = b'{"errors":[{"code":"UNAUTHORIZED","message":"canary-error-body"}]}'
        self._reply(401, body, {"WWW-Authenticate": value})

    def _token(self) -> None:
        if self.command == "POST":
            form = {name: values[0] for name, values in parse_qs(self._body().decode()).items()}
            admitted = form.get("refresh_token") in self.registry.identity_tokens
            scope = form.get("scope", "")
        else:
            kind, _, value = self.headers.get("Authorization", "").partition(" ")
            admitted = self.registry.knows(value) if kind == "Basic" else self.registry.anonymous
            scope = " ".join(parse_qs(urlsplit(self.path).query).get("scope", []))
        if self.registry.denying or not admitted:
            self._reply(403 if self.registry.denying else 401, b"canary-error-body")
            return
        answer = {"token": self.registry.token_for(scope), "expires_in": self.registry.token_life}
        self._reply(200, json.dumps(answer).encode())

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _error(self, status: int, code: str) -> None:
        self._reply(status, json.dumps({"errors": [{"code": code, "message": "canary-error-body"}]}).encode())

    def _reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        claims = self.fault.headers if isinstance(self.fault, Claims) else {}
        length = {"Content-Length": str(len(body))} if status != 204 else {}
        self.send_response(status)
        for name, value in {**(headers or {}), **length, **claims}.items():
            self.send_header(name, value)
        self.close_connection = self.close_connection or "Content-Length" in claims
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.fault
        if isinstance(fault, Flip) and body:
            bit = fault.bit % (8 * len(body))
            wrong = bytearray(body)
            wrong[bit // 8] ^= 1 << bit % 8
            body = bytes(wrong)
        if isinstance(fault, Truncate):
            self.wfile.write(body[: fault.after])
            self.close_connection = True
        elif isinstance(fault, Reset):
            self.wfile.write(body[: fault.after])
            self.wfile.flush()
            self._reset()
        elif isinstance(fault, Trickle):
            for at in range(0, len(body), fault.size):
                self.wfile.write(body[at : at + fault.size])
                if self.registry.closing.wait(fault.interval):
                    break
        elif isinstance(fault, Paused):
            for start, stop in pairwise((0, *(stop for stop in fault.stops if stop < len(body)), len(body))):
                self.wfile.write(body[start:stop])
                while stop < len(body) and not fault.go_on.acquire(timeout=0.05):
                    if self.registry.closing.is_set():
                        return
        else:
            self.wfile.write(body)

    def _endless(self, status: int, size: int) -> None:
        self.send_response(status)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while not self.registry.closing.is_set():
            self.wfile.write(b"%x\r\n" % size + b" " * 0x10000 + b"\r\n")

    def _reset(self) -> None:
        """RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
