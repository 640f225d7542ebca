"""A repository of a registry as a Source (distribution-spec): manifests, small documents, blobs, referrers.

Whatever has a digest may come from a mirror; a tag does only where the configuration says so, and what is attached to
an image is known by the registry itself.
A manifest is asked for at once, without a ping of /v2/: one round trip where no token is needed. Every document is
checked against its digest before it is parsed.
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from ckptfs.errors import AuthError, FormatError, IntegrityError, LimitExceeded, UnavailableError
from ckptfs.model.blob import Blob
from ckptfs.model.oci import MANIFEST_TYPES, OCI_INDEX, Descriptor, Digest, Index, Manifest, Reference, parse_document
from ckptfs.settings import Settings
from ckptfs.sources.blobs import RegistryBlob
from ckptfs.sources.credentials import Credentials
from ckptfs.sources.documents import check_document, check_limit
from ckptfs.sources.endpoint import Endpoint
from ckptfs.sources.mirrors import Host, ask
from ckptfs.sources.places import places_of
from ckptfs.sources.retry import Attempts
from ckptfs.sources.transport import Reply, Transport
from ckptfs.telemetry import NetworkCounters

T = TypeVar("T")

_ACCEPT = {"Accept": ", ".join(MANIFEST_TYPES)}
_NEXT = r'<([^<>]*)>\s*;[^,]*\brel="?next\b'  # of a Link header (RFC 8288)


class RegistrySource:
    """The image at `reference`. Threads may share it."""

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
        self._limits = settings.limits
        self._deadline = settings.timeouts.resolve_deadline
        self._transport = transport or Transport(settings, counters)
        *mirrors, home = places_of(reference, settings.registries, plain_http=plain_http)
        self._home = Host(home, self._transport, credentials)
        self._hosts = [*(Host(place, self._transport) for place in mirrors), self._home]

    @property
    def reference(self) -> Reference:
        return self._reference

    def resolve(self) -> Manifest | Index:
        """One GET. NotFoundError tells a missing repository from a missing tag where the registry does."""
        reference = self._reference
        wanted = f"digest {reference.digest}" if reference.digest else f"tag {reference.tag!r}"
        return parse_document(*self._manifest(str(reference.digest or reference.tag), reference.digest, wanted))

    def connect(self) -> None:
        """Have one more connection to where the first blobs will be asked for; no request is made."""
        host = next(host for host in self._hosts if host.place.pulls)
        self._transport.connect(host.endpoint.origin)

    def document(self, name: str) -> Manifest | Index:
        """Another manifest of the repository, by tag or digest."""
        digest = Digest.parse(name) if ":" in name else None
        return parse_document(*self._manifest(name, digest, f"manifest {name}"))

    def fetch(self, descriptor: Descriptor) -> bytes:
        check_limit(descriptor, self._limits)
        if descriptor.media_type in MANIFEST_TYPES:
            raw, *_ = self._manifest(str(descriptor.digest), descriptor.digest, f"manifest {descriptor.digest}")
            check_document(raw, descriptor, self._home.place.host)
            return raw
        return self._checked_blob(descriptor)

    def blob(self, descriptor: Descriptor) -> Blob:
        pulling = [host for host in self._hosts if host.place.pulls]
        return RegistryBlob(pulling, self._transport, descriptor)

    def referrers(self, digest: Digest, artifact_type: str = "") -> tuple[Descriptor, ...]:
        """What was attached to the manifest `digest`: the referrers API, or the tag sha256-HEX of registries without.

        An empty tuple where there is nothing, and where there is no way to ask.
        """
        found = self._attached(digest, f"referrers/{digest}")
        if found is None:
            found = self._attached(digest, f"manifests/{digest.algorithm}-{digest.hex}")
        return tuple(m for m in found or () if artifact_type in ("", m.artifact_type))

    def _attached(self, digest: Digest, path: str) -> Sequence[Descriptor] | None:
        """What the index at `path` lists, in however many pages; None where there is none.

        Registries without the API refuse it in any way there is, or send us to a web page (GHCR); GitLab takes the tag
        for the digest and answers with the subject. No answer but an index of something else is one.
        """

        def get(endpoint: Endpoint, attempts: Attempts) -> Sequence[Descriptor] | None:
            found: list[Descriptor] = []
            url, left = endpoint.url(path), self._limits.manifest_bytes
            for _ in range(self._limits.referrer_pages):
                reply, _ = endpoint.aside.request(
                    "GET",
                    url,
                    attempts,
                    what=f"the referrers of {digest}",
                    expect=(200, 400, 404, 405, 429, 501),
                    headers={"Accept": OCI_INDEX},
                )
                with reply:
                    if reply.status != 200:
                        reply.drain()
                        return None
                    raw = reply.read(left, "list of referrers")
                    following = re.search(_NEXT, reply.header("Link") or "")
                    url = endpoint.locate(following[1], reply.url) if following else ""
                document = parse_document(raw, OCI_INDEX)
                if not isinstance(document, Index) or document.digest == digest:
                    return None
                found += document.manifests
                if not url:
                    return found
                left -= len(raw)
            raise LimitExceeded(f"{endpoint.name} lists the referrers of {digest} on too many pages")

        try:
            return ask([self._home], self._transport, get, self._deadline)
        except (AuthError, FormatError, UnavailableError) as error:
            if error.retryable or isinstance(error, LimitExceeded):
                raise
            return None

    def _manifest(self, name: str, digest: Digest | None, what: str) -> tuple[bytes, str, Digest | None]:
        """The bytes of manifests/NAME, their media type, and the digest that the registry knows them by; checked."""

        def get(endpoint: Endpoint, attempts: Attempts) -> tuple[bytes, str, Digest | None]:
            url = endpoint.url(f"manifests/{name}")
            reply, _ = endpoint.request("GET", url, attempts, what=what, headers=_ACCEPT)
            with reply:
                raw = reply.read(self._limits.manifest_bytes, "manifest")
                if reply.length is not None and reply.length != len(raw):
                    raise IntegrityError(f"{reply.where}: the body ended early")
                told = _digest_header(reply)
                for expected in (digest, told):
                    if expected is not None:
                        expected.check(raw, f"{endpoint.name}: manifest {name}")
                return raw, reply.header("Content-Type") or "", digest or told

        hosts = [host for host in self._hosts if (host.place.resolves if digest is None else host.place.pulls)]
        return self._twice(lambda attempt: ask(hosts, self._transport, get, self._deadline))

    def _checked_blob(self, descriptor: Descriptor) -> bytes:
        blob = self.blob(descriptor)

        def read(attempt: int) -> bytes:
            raw = blob.read_at(0, descriptor.size, attempt=attempt)
            check_document(raw, descriptor, self._home.place.host)
            return raw

        return self._twice(read)

    def _twice(self, read: Callable[[int], T]) -> T:
        """Bytes can be damaged on the way: the second time the error counts."""
        try:
            return read(0)
        except IntegrityError:
            return read(1)


def _digest_header(reply: Reply) -> Digest | None:
    """Docker-Content-Digest, None where it is absent or makes no sense."""
    value = reply.header("Docker-Content-Digest")
    try:
        return Digest.parse(value) if value else None
    except FormatError:
        return None
