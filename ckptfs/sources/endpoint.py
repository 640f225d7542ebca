"""One repository of one registry over HTTP: authorised, redirected by rule, answers judged.

Turns a path under the API's root into a reply with an expected status or into the error that says what is wrong with
it. One try; the loops around it are mirrors.py, blobs.py and upload.py. The Authorization header goes to the registry's
own origin and nowhere else; cookies are never kept.
"""

import copy
from collections.abc import Collection, Mapping
from functools import cached_property
from urllib.parse import quote

from ckptfs.errors import AuthError, CkptfsError, NotFoundError, UnavailableError
from ckptfs.model.oci import parse_json
from ckptfs.sources.auth import Authorizer
from ckptfs.sources.origin import Origin, Reach, Territory
from ckptfs.sources.retry import Attempts
from ckptfs.sources.transport import Body, Reply, Transport

REDIRECTS = (301, 302, 303, 307, 308)
_CHALLENGES = 3  # a token may expire between its renewal and the request, hardly twice
_MISSING = {
    "NAME_UNKNOWN": "has no repository {repository}",
    "MANIFEST_UNKNOWN": "has no {what} in {repository}",
    "BLOB_UNKNOWN": "has no {what} in {repository}",
    "NOT_FOUND": "has no {what} in {repository}",
}


class Endpoint:
    """Requests about `repository` of the registry at `origin`.

    name       the registry's name as the user wrote it, for messages (docker.io is at registry-1.docker.io).
    root       path of the API.
    namespace  the registry that is meant, told to a mirror of several (containerd's ?ns=).
    """

    def __init__(
        self,
        transport: Transport,
        territory: Territory,
        authorizer: Authorizer,
        name: str,
        repository: str,
        *,
        root: str = "/v2",
        namespace: str = "",
    ) -> None:
        self.transport = transport
        self.name = name
        self.repository = repository
        self._territory = territory
        self._authorizer = authorizer
        self._root = root
        self._query = f"?ns={quote(namespace, safe='')}" if namespace else ""

    @property
    def origin(self) -> Origin:
        return self._territory.home

    @cached_property
    def aside(self) -> "Endpoint":
        """The same place for what may be refused there while all else is given: see `Authorizer.aside`."""
        other = copy.copy(self)
        other._authorizer = self._authorizer.aside()
        return other

    def url(self, path: str) -> str:
        """The URL of `path`, relative to ROOT/REPOSITORY/."""
        return f"{self.origin}{self._root}/{self.repository}/{path}{self._query}"

    def locate(self, location: str, base: str) -> str:
        """The absolute URL of what goes on elsewhere (an upload, a list); UnavailableError outside of the registry."""
        target, _ = self._territory.admit(location, base)
        if Origin.of(target) != self.origin:
            raise UnavailableError(f"{self.name} wants to go on at {Origin.of(target).netloc}", permanent=True)
        return target

    def request(
        self,
        method: str,
        url: str,
        attempts: Attempts,
        *,
        what: str,
        expect: Collection[int] = (200,),
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        first_byte: float | None = None,
    ) -> tuple[Reply, Reach | None]:
        """The reply with one of the statuses `expect`, and how far its URL may reach if it came from elsewhere.

        `what` names the thing asked for, in messages. `body` may be sent more than once.
        """
        challenges = 0
        while True:
            authorization = self._authorizer.header(attempts) if Origin.of(url) == self.origin else None
            sent = {**(headers or {}), "Authorization": authorization} if authorization else headers
            reply = self.transport.send(method, url, attempts, headers=sent, body=body, first_byte=first_byte)
            elsewhere: Reach | None = None
            if reply.status in REDIRECTS and method in ("GET", "HEAD"):
                reply, elsewhere = self._follow(reply, attempts, headers, authorization)
            if reply.status in expect:
                return reply, elsewhere
            with reply:
                # ECR and others answer 403 to an expired token
                if elsewhere is None and reply.status in (401, 403):
                    if challenges == _CHALLENGES:
                        raise self._authorizer.rejected()
                    challenges += 1
                    if self._authorizer.challenged(reply, authorization, attempts):
                        reply.drain()
                        continue
                raise self.judge(reply, what)

    def fetch(
        self, url: str, reach: Reach, attempts: Attempts, headers: Mapping[str, str], *, narrow: bool = False
    ) -> Reply:
        """GET a URL that an earlier redirect named: anonymous, any status, no further redirects; see Transport.send."""
        return self.transport.send("GET", url, attempts, headers=headers, reach=reach, narrow=narrow)

    def _follow(
        self,
        reply: Reply,
        attempts: Attempts,
        headers: Mapping[str, str] | None,
        authorization: str | None,
    ) -> tuple[Reply, Reach | None]:
        method = reply.where.split()[0]
        for _ in range(self.transport.settings.limits.redirects):
            with reply:
                location = reply.header("Location")
                if not location:
                    raise UnavailableError(f"{reply.where} redirects to nowhere", permanent=True)
                url, reach = self._territory.admit(location, reply.url)
            home = Origin.of(url) == self.origin
            sent = {**(headers or {}), "Authorization": authorization} if home and authorization else headers
            reply = self.transport.send(method, url, attempts, headers=sent, reach=reach)
            if reply.status not in REDIRECTS:
                return reply, None if home else reach
        with reply:
            hops = self.transport.settings.limits.redirects
            raise UnavailableError(f"{self.name} redirects more than {hops} times", permanent=True)

    def judge(self, reply: Reply, what: str) -> CkptfsError:
        """The error behind a status that was not expected. Bodies are looked at for the spec's error codes only."""
        status = reply.status
        if status == 404:
            text = _MISSING.get(self._code(reply), "has no {what} in {repository}")
            return NotFoundError(
                f"{self.name} {text.format(what=what, repository=self.repository)}", hint="check the reference"
            )
        if status in (401, 403):
            return AuthError(
                f"{self.name} does not give {what} of {self.repository} ({status})",
                hint=f"check the name, or log in with `podman login {self.name}` or `skopeo login {self.name}`",
            )
        if status in (408, 429) or status >= 500:
            return UnavailableError(f"{reply.where} answered {status}", retry_after=reply.retry_after)
        code = self._code(reply)
        hint = "is it the right port, and is it http or https?" if status == 400 and not code else ""
        return UnavailableError(f"{reply.where} answered {status} {code}".rstrip(), hint=hint, permanent=True)

    def _code(self, reply: Reply) -> str:
        """The first error code of the body, if it looks like one; the rest of a body may hold secrets."""
        try:
            document = parse_json(reply.read(self.transport.settings.limits.error_body_bytes, "error"), "error")
        except CkptfsError:
            return ""
        errors = document.get("errors") if isinstance(document, dict) else None
        first = errors[0] if isinstance(errors, list) and errors else None
        code = first.get("code") if isinstance(first, dict) else None
        known = isinstance(code, str) and code in _CODES
        return str(code) if known else ""


# distribution-spec, "Error Codes", and the ones that registries add
_CODES = {
    *_MISSING,
    "BLOB_UPLOAD_INVALID",
    "BLOB_UPLOAD_UNKNOWN",
    "DENIED",
    "DIGEST_INVALID",
    "MANIFEST_BLOB_UNKNOWN",
    "MANIFEST_INVALID",
    "NAME_INVALID",
    "RANGE_INVALID",
    "SIZE_INVALID",
    "TAG_INVALID",
    "TOOMANYREQUESTS",
    "UNAUTHORIZED",
    "UNSUPPORTED",
}
