"""Publishing to a repository of a registry (distribution-spec, "Push"): blobs, mounts, manifests, referrers.

Implements push.target.Target. A blob goes up as one stream, as Docker and skopeo send it, because registries are known
to refuse chunks; an interrupted one goes on where the registry says that it stopped. The registry checks each digest.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar
from urllib.parse import urlencode

from ckptfs.errors import AuthError, CkptfsError, FormatError, IntegrityError, NotFoundError
from ckptfs.model.annotations import PROFILE_ARTIFACT
from ckptfs.model.blob import Blob
from ckptfs.model.oci import OCI_INDEX, Descriptor, Digest, Index, Manifest, Reference, parse_document
from ckptfs.settings import MiB, Settings
from ckptfs.sources.auth import PUSH
from ckptfs.sources.credentials import Credentials
from ckptfs.sources.endpoint import Endpoint
from ckptfs.sources.mirrors import Host
from ckptfs.sources.places import places_of
from ckptfs.sources.retry import Attempts
from ckptfs.sources.transport import Reply, Transport
from ckptfs.telemetry import NetworkCounters

log = logging.getLogger(__name__)

T = TypeVar("T")
Sent = Callable[[int], None]  # told of bytes as they leave; negative when some have to be sent again

_EARLIER_PROFILES = 2  # that stay listed beside the newest one, should that be unreadable
_AT_ONCE = 4 * MiB  # blobs up to this size are read into memory and sent with the request that commits them
_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,18})\Z")
_BINARY = {"Content-Type": "application/octet-stream"}
_TAKEN = (200, 201, 202, 204)  # of a PATCH: 202 today, 204 in the specification of Docker (Pulp, go-containerregistry)


class RegistryTarget:
    """The repository of `reference`; its tag and digest do not matter. Threads may share it."""

    def __init__(
        self,
        reference: Reference,
        settings: Settings,
        counters: NetworkCounters,
        *,
        plain_http: bool = False,
        credentials: Credentials | None = None,
        transport: Transport | None = None,
    ) -> None:
        self._reference = reference
        self._settings = settings
        self._transport = transport or Transport(settings, counters)
        place = places_of(reference, settings.registries, plain_http=plain_http)[-1]
        self._host = Host(place, self._transport, credentials, PUSH)
        # A token for a mount needs rights to both repositories: if those are refused, the uploads' token must survive
        self._mounts = Host(place, self._transport, credentials, PUSH)

    @property
    def reference(self) -> Reference:
        return self._reference

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the registry has the blob, with that size."""

        def ask(endpoint: Endpoint, attempts: Attempts) -> bool:
            url = endpoint.url(f"blobs/{descriptor.digest}")
            try:
                reply, _ = endpoint.request("HEAD", url, attempts, what="blob", expect=(200, 404))
            except AuthError:  # by a storage service, to which we were sent with a signature for GET
                one, found = {"Range": "bytes=0-0"}, (200, 206, 404)
                reply, _ = endpoint.request("GET", url, attempts, what="blob", expect=found, headers=one)
            with reply:
                return reply.status == 206 or (reply.status == 200 and reply.length in (None, descriptor.size))

        return self._persist(self._host, ask)

    def mount(self, descriptor: Descriptor, repository: str) -> bool:
        """The registry links the blob, nothing is sent. False where it cannot or we may not read `repository`.

        Whatever it says, the blob can be sent instead: registries answer 400, 403, 405 and 500 to mounts as well.
        """

        def ask(endpoint: Endpoint, attempts: Attempts) -> bool:
            query = urlencode({"mount": str(descriptor.digest), "from": repository})
            url = _with_query(endpoint.url("blobs/uploads/"), query)
            reply, _ = endpoint.request("POST", url, attempts, what="mount", expect=(201, 202), body=b"")
            with reply:
                reply.drain()
                if reply.status == 202:  # an upload session in place of a mount: not wanted
                    with suppress(CkptfsError):  # nor missed
                        session = endpoint.locate(reply.header("Location") or "", reply.url)
                        endpoint.request("DELETE", session, attempts, what="upload", expect=(200, 202, 204))[0].close()
                return reply.status == 201

        try:
            return self._persist(self._mounts, ask)
        except CkptfsError as error:
            log.info("%s; it is sent", error.message)
            return False

    def put_blob(self, descriptor: Descriptor, blob: Blob, sent: Sent) -> None:
        """Send `blob`. IntegrityError when the registry counts another digest than the descriptor's."""
        self._host.ask(lambda endpoint: _Upload(endpoint, descriptor, blob, sent).run())

    def put_manifest(self, raw: bytes, media_type: str, tag: str) -> Digest:
        """A manifest with a subject is entered in the subject's list of referrers where the registry does not do it."""
        digest = Digest.of(raw)

        def ask(endpoint: Endpoint, attempts: Attempts) -> bool:
            reply, _ = endpoint.request(
                "PUT",
                endpoint.url(f"manifests/{tag or digest}"),
                attempts,
                what=f"manifest {tag or digest}",
                expect=(200, 201, 202),
                headers={"Content-Type": media_type},
                body=raw,
                first_byte=self._settings.timeouts.commit,
            )
            with reply:
                reply.drain()
                stored = reply.header("Docker-Content-Digest")
                if stored is not None and stored != str(digest):
                    raise IntegrityError(f"{endpoint.name} stored the manifest as {stored[:80]}, not {digest}")
                return reply.header("OCI-Subject") is not None

        listed = self._persist(self._host, ask)
        document = parse_document(raw, media_type)
        if isinstance(document, Manifest) and document.subject is not None and not listed:
            self._enlist(document, media_type, document.subject.digest)
        return digest

    def _enlist(self, manifest: Manifest, media_type: str, subject: Digest) -> None:
        """The referrers tag schema of the distribution spec: an index tagged sha256-HEX."""
        tag = f"{subject.algorithm}-{subject.hex}"
        kind = manifest.artifact_type or manifest.config.media_type
        entry = Descriptor(media_type, manifest.digest, len(manifest.raw), manifest.annotations, kind)
        known = [m for m in self._listed(tag, subject) if m.digest != entry.digest]
        if kind == PROFILE_ARTIFACT:  # each has what those before it had, and every mount fetches the list
            superseded = [m for m in known if m.artifact_type == kind][:-_EARLIER_PROFILES]
            known = [m for m in known if m not in superseded]
        manifests = [m.to_json() for m in (*known, entry)]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
        self.put_manifest(json.dumps(index, separators=(",", ":")).encode(), OCI_INDEX, tag)

    def _listed(self, tag: str, subject: Digest) -> tuple[Descriptor, ...]:
        def ask(endpoint: Endpoint, attempts: Attempts) -> bytes:
            url = endpoint.url(f"manifests/{tag}")
            reply, _ = endpoint.request("GET", url, attempts, what=tag, headers={"Accept": OCI_INDEX})
            with reply:
                return reply.read(self._settings.limits.manifest_bytes, "list of referrers")

        try:
            document = parse_document(self._persist(self._host, ask), OCI_INDEX)
        except NotFoundError:
            return ()
        if document.digest == subject:  # GitLab takes the tag for the digest
            return ()
        if not isinstance(document, Index):
            name = self._host.place.host
            raise FormatError(f"{name} has something else under the tag {tag}", hint="remove that tag")
        return document.manifests

    def _persist(self, host: Host, ask: Callable[[Endpoint, Attempts], T]) -> T:
        """An outage is waited out, a registry that never answered is not: its name may be wrong."""
        met = self._transport.windows.was_reached(host.endpoint.origin.host)

        def once(attempts: Attempts) -> T:
            return host.ask(lambda endpoint: ask(endpoint, attempts))

        return self._transport.persist(once, self._settings.timeouts.read_deadline, outlast=met)


class _Upload:
    """One blob on its way: an upload session, and how much of the blob the registry has."""

    def __init__(self, endpoint: Endpoint, descriptor: Descriptor, blob: Blob, sent: Sent) -> None:
        self._endpoint = endpoint
        self._descriptor = descriptor
        self._blob = blob
        self._sent = sent
        self._session = ""
        self._position = 0  # bytes that have left, and that `sent` has been told of
        self._commit = endpoint.transport.settings.timeouts.commit

    def run(self) -> None:
        transport = self._endpoint.transport
        attempts = transport.attempts(transport.settings.timeouts.read_deadline, outlast=True)
        acknowledged = 0
        while True:
            try:
                if not self._session:
                    self._begin(attempts)
                if self._descriptor.size > _AT_ONCE:
                    self._send_rest(attempts)
                self._finish(attempts)
                return
            except CkptfsError as error:
                attempts.failed(error)
                self._resume(attempts)
                attempts.progress(max(0, self._position - acknowledged))
                acknowledged = max(acknowledged, self._position)

    def _begin(self, attempts: Attempts) -> None:
        url = self._endpoint.url("blobs/uploads/")
        reply, _ = self._endpoint.request("POST", url, attempts, what=self._what, expect=(202,), body=b"")
        self._accept(reply)

    def _send_rest(self, attempts: Attempts) -> None:
        """PATCH with everything that the registry has not got yet."""
        left = self._descriptor.size - self._position
        if not left:
            return
        headers = {**_BINARY, "Content-Length": str(left)}
        if self._position:
            headers["Content-Range"] = f"{self._position}-{self._descriptor.size - 1}"
        reply, _ = self._endpoint.request(
            "PATCH",
            self._session,
            attempts,
            what=self._what,
            expect=_TAKEN,
            headers=headers,
            body=_Rest(self._pieces, self._position),
            first_byte=self._commit,
        )
        self._accept(reply)

    def _finish(self, attempts: Attempts) -> None:
        """PUT with the digest, which the registry checks."""
        small = self._descriptor.size <= _AT_ONCE
        body = self._blob.read_at(0, self._descriptor.size) if small else b""
        reply, _ = self._endpoint.request(
            "PUT",
            _with_query(self._session, urlencode({"digest": str(self._descriptor.digest)})),
            attempts,
            what=self._what,
            expect=(201, 204, 400),
            headers=_BINARY,
            body=body,
            first_byte=self._commit,
        )
        with reply:
            if reply.status == 400:
                error = self._endpoint.judge(reply, self._what)
                if "DIGEST_INVALID" in error.message:
                    raise IntegrityError(f"{self._endpoint.name} received {self._what} with another digest")
                raise error
            reply.drain()
        self._tell(self._descriptor.size)

    def _resume(self, attempts: Attempts) -> None:
        """Ask how much arrived; begin anew where the registry has lost the session or will not say."""
        offset = None
        if self._session and self._descriptor.size > _AT_ONCE:
            try:
                reply, _ = self._endpoint.request(
                    "GET", self._session, attempts, what=self._what, expect=(202, 204, 400, 404, 416)
                )
                with reply:
                    offset = _received(reply, self._descriptor.size)
                    if offset is not None:
                        self._accept(reply)
            except CkptfsError as error:
                log.debug("%s: %s", self._what, error.message)
        if offset is None:
            self._session, offset = "", 0
        self._tell(offset)

    def _pieces(self, start: int) -> Iterator[bytes | memoryview]:
        self._tell(start)  # a body that is sent again, after a 401
        for piece in self._blob.stream(start, self._descriptor.size - start):
            yield piece
            self._tell(self._position + len(piece))

    def _tell(self, position: int) -> None:
        if position != self._position:
            self._sent(position - self._position)
        self._position = position

    def _accept(self, reply: Reply) -> None:
        """The session goes on at the Location of each answer."""
        with reply:
            reply.drain()
            self._session = self._endpoint.locate(reply.header("Location") or "", reply.url)

    @property
    def _what(self) -> str:
        return f"blob {self._descriptor.digest}"


class _Rest:
    """A body that can be iterated again."""

    def __init__(self, pieces: Callable[[int], Iterator[bytes | memoryview]], start: int) -> None:
        self._pieces = pieces
        self._start = start

    def __iter__(self) -> Iterator[bytes | memoryview]:
        return self._pieces(self._start)


def _with_query(url: str, query: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{query}"


def _received(reply: Reply, size: int) -> int | None:
    """How many of `size` bytes an upload session has, by its Range header, 0-LAST; None where it does not say.

    0-0 is one byte, or none (docker-registry): not worth a guess.
    """
    match = _RANGE.match((reply.header("Range") or "").strip()) if reply.status in (202, 204) else None
    return int(match[1]) + 1 if match and 0 < int(match[1]) < size else None
