"""A user's image as a registry of its own on loopback, so that a slow link can stand in front of it.

    python -m ckptfs.bench.relay registry.example/app/ckpt:1

Owns the HTTP between tools that pull (ckptfs, skopeo) and a Source: one image, read-only, no login. The source speaks
to the real registry with the user's credentials, TLS and redirects; none of that could go through a link that only
forwards bytes. Runs in a process of its own (`Relay`), until its standard input ends. Knows nothing of measuring.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self

from ckptfs.errors import CkptfsError, UnavailableError, rebuilt, told
from ckptfs.model.oci import Descriptor, Index, Manifest, Reference, parse_document
from ckptfs.settings import MiB, Registries, Settings
from ckptfs.sources import Source, open_source
from ckptfs.telemetry import NetworkCounters

_PATH = re.compile(r"/v2/(?P<name>[a-z0-9._/-]+)/(?P<kind>manifests|blobs)/(?P<what>[A-Za-z0-9_.:-]+)\Z")
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})\Z")
_PIECE = 1 * MiB  # of a blob that is passed on whole, so that no request holds more
_PATIENCE = 60.0  # seconds until an idle connection is closed


class Relay:
    """A context manager: `address` is "host:port", `repository` and `tag` name the image there."""

    def __init__(self, reference: Reference, *, plain_http: bool = False, registries: Registries | None = None) -> None:
        registries = registries or Registries()
        found = {**registries._asdict(), "plain_http": sorted(registries.plain_http)}
        self._command = [sys.executable, "-m", __name__, str(reference), "--control", "--registries", json.dumps(found)]
        self._command += ["--plain-http"] if plain_http else []
        self._process: subprocess.Popen[str] | None = None
        self.address = ""
        self.repository = reference.repository or "image"
        self.tag = reference.tag or "latest"

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        # Ctrl-C in a terminal is for the command, which ends the relay.
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True, process_group=0)
        assert self._process.stdout is not None
        try:
            line = self._process.stdout.readline()
            if not line:
                raise UnavailableError("the image cannot be served", hint="`ckptfs ls REF` must work")
            said = json.loads(line)
            if "error" in said:
                raise rebuilt(said)
        except BaseException:
            self.__exit__()
            raise
        self.address = said["address"]
        return self

    def __exit__(self, *_: object) -> None:
        if (process := self._process) is not None:
            process.terminate()
            process.__exit__(None, None, None)
            self._process = None


class _Image:
    """What can be asked for: the document of the reference and, once a document was handed out, what it names."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._known: dict[str, Descriptor] = {}
        self.top = source.resolve()
        self._learn(self.top)

    def document(self, name: str) -> Manifest | Index | None:
        """The top document by its digest or by any tag but those of referrers; others by digest."""
        if name == str(self.top.digest) or not name.startswith(("sha256:", "sha512:", "sha256-", "sha512-")):
            return self.top
        with self._lock:
            descriptor = self._known.get(name)
        if descriptor is None:
            return None
        document = parse_document(self._source.fetch(descriptor), descriptor.media_type, descriptor.digest)
        self._learn(document)
        return document

    def blob(self, digest: str) -> Descriptor | None:
        with self._lock:
            return self._known.get(digest)

    def stream(self, descriptor: Descriptor, start: int, end: int) -> Iterator[bytes | memoryview]:
        blob = self._source.blob(descriptor)
        for at in range(start, end, _PIECE):
            yield from blob.stream(at, min(_PIECE, end - at))

    def _learn(self, document: Manifest | Index) -> None:
        named = document.manifests if isinstance(document, Index) else (document.config, *document.layers)
        with self._lock:
            self._known.update((str(one.digest), one) for one in named)


class _Handler(BaseHTTPRequestHandler):
    """distribution-spec, pull: GET and HEAD of manifests and blobs, one range."""

    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE
    disable_nagle_algorithm = True
    image: ClassVar[_Image]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        if self.path.rstrip("/") == "/v2":
            self._send(HTTPStatus.OK, b"{}", body, {"Content-Type": "application/json"})
            return
        asked = _PATH.match(self.path.partition("?")[0])
        try:
            if asked is None:
                self._send(HTTPStatus.NOT_FOUND, b"", body)
            elif asked["kind"] == "manifests":
                self._manifest(asked["what"], body)
            else:
                self._blob(asked["what"], body)
        except CkptfsError as error:
            # After the headers nothing can be said any more; the peer sees that the body is short.
            self.close_connection = True
            print(f"ckptfs: {error}", file=sys.stderr, flush=True)

    def _manifest(self, name: str, body: bool) -> None:
        document = self.image.document(name)
        if document is None:
            self._send(HTTPStatus.NOT_FOUND, b"", body)
            return
        headers = {"Content-Type": document.media_type, "Docker-Content-Digest": str(document.digest)}
        self._send(HTTPStatus.OK, document.raw, body, headers)

    def _blob(self, digest: str, body: bool) -> None:
        descriptor = self.image.blob(digest)
        if descriptor is None:
            self._send(HTTPStatus.NOT_FOUND, b"", body)
            return
        start, end, status = 0, descriptor.size, HTTPStatus.OK
        wanted = _RANGE.match(self.headers.get("Range", ""))
        if wanted is not None:
            start, status = int(wanted[1]), HTTPStatus.PARTIAL_CONTENT
            end = min(int(wanted[2]) + 1 if wanted[2] else end, end)
            if start >= end:
                self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", body)
                return
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Docker-Content-Digest", digest)
        if wanted is not None:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{descriptor.size}")
        self.end_headers()
        if body:
            for piece in self.image.stream(descriptor, start, end):
                self.wfile.write(piece)

    def _send(self, status: HTTPStatus, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Not a line for every request, nor for a puller that tries TLS first."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A puller that hangs up is none of our business; all else is a bug and has to be seen."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints the address, then serves until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m ckptfs.bench.relay", description="An image as a local registry.")
    parser.add_argument("reference", metavar="REF", help="host/repo[:tag][@digest] or oci:DIR[:TAG]")
    parser.add_argument("--plain-http", action="store_true", help="talk HTTP to the registry")
    parser.add_argument("--registries", type=json.loads, default={}, help="what is configured of registries, as JSON")
    parser.add_argument("--control", action="store_true", help="speak JSON, and end when standard input ends")
    options = parser.parse_args(arguments)
    try:
        settings, counters = Settings(registries=_registries(options.registries)), NetworkCounters()
        reference = Reference.parse(options.reference)
        source = open_source(reference, settings=settings, counters=counters, plain_http=options.plain_http)
        handler = type("Handler", (_Handler,), {"image": _Image(source)})
    except CkptfsError as error:
        if options.control:
            print(json.dumps(told(error)), flush=True)
        else:
            print(f"ckptfs: {error}", file=sys.stderr)
        return error.exit_code
    with _Server(("127.0.0.1", 0), handler) as server:
        address = f"127.0.0.1:{server.server_address[1]}"
        print(json.dumps({"address": address}) if options.control else address, flush=True)
        if options.control:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            sys.stdin.read()
            server.shutdown()
        else:
            server.serve_forever()
    return 0


def _registries(found: dict[str, Any]) -> Registries:
    return Registries(**{**found, "plain_http": frozenset(found.get("plain_http", ()))})


if __name__ == "__main__":
    sys.exit(main())
