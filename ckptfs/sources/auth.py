"""Authorisation: a registry's challenge, the token it sends us for, and one refresh for all threads.

WWW-Authenticate (RFC 9110 11.6.1, RFC 6750), the distribution spec's token endpoint (GET, or POST for identity tokens).
Decides what the Authorization header of the next request is; endpoint.py puts it there. Tokens live in memory only.
"""

import copy
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple
from urllib.parse import urlencode

from ckptfs.errors import AuthError, CkptfsError, FormatError, LimitExceeded, UnavailableError
from ckptfs.model.oci import parse_json
from ckptfs.redaction import conceal
from ckptfs.sources.credentials import Credentials
from ckptfs.sources.origin import Territory
from ckptfs.sources.retry import Attempts
from ckptfs.sources.transport import Reply, Transport

_DEFAULT_LIFE = 60.0  # seconds, where the token endpoint names none (distribution spec)
_REFUSED_FOR = 30.0  # seconds in which a refused login is not tried again
_FAILED_FOR = 1.0  # seconds in which threads that waited for a token request share its failure
_MARGIN = 0.1  # part of a token's life before its end when it is renewed, at most 10 s
PULL = frozenset(("pull",))
PUSH = frozenset(("pull", "push"))
# Compiled when first used (re keeps them): that takes 0.5 ms, and many registries ask for nothing.
_TOKEN = r"[\x21-\x7e]+\Z"
_SCOPE = r"repository:(\S+):([a-z,*]+)\Z"
_NO_RIGHT = "insufficient_scope"  # RFC 6750, 3.1
_CHALLENGE_PART = r"""[\s,]*
    (?: (?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]+) \s*=\s*
        (?: "(?P<quoted>(?:[^"\\]|\\.)*)" | (?P<plain>[!#$%&'*+.^_`|~0-9A-Za-z-]+(?=[\s,]|\Z)) )
      | (?P<scheme>[!#$%&'*+.^_`|~0-9A-Za-z-]+) (?=[\s,]|\Z)
      | (?P<token68>[A-Za-z0-9._~+/-]+=*) (?=[\s,]|\Z) )"""


class Challenge(NamedTuple):
    """One way in that a server offers: "Bearer realm=…, service=…, scope=…". Names are lower-case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(fields: Iterable[str]) -> tuple[Challenge, ...]:
    """All challenges of WWW-Authenticate fields, as many as are understood before the first error."""
    part_of = re.compile(_CHALLENGE_PART, re.VERBOSE).match
    found: list[tuple[str, dict[str, str]]] = []
    for text in fields:
        at = 0
        while at < len(text) and (part := part_of(text, at)) is not None:
            at = part.end()
            if part["scheme"]:
                found.append((part["scheme"].lower(), {}))
            elif part["name"] and found:
                quoted = part["quoted"]
                value = part["plain"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                found[-1][1].setdefault(part["name"].lower(), value)
    return tuple(Challenge(scheme, parameters) for scheme, parameters in found)


class _Token(NamedTuple):
    header: str
    renew_at: float


class Authorizer:
    """The Authorization header for one repository of one registry. Shared by threads.

    credentials   asked for at the first challenge, and again when the registry refuses what it was given (helpers hand
                  out passwords that expire).
    actions       what a token is for, at least: of the repository that a challenge names first, or else of ours.
    beside        sends what this one sends until a request here is challenged. What becomes of that does not touch it.
    """

    def __init__(
        self,
        transport: Transport,
        territory: Territory,
        name: str,
        credentials: Callable[[], Credentials | None],
        actions: frozenset[str] = PULL,
        beside: "Authorizer | None" = None,
    ) -> None:
        self._transport = transport
        self._territory = territory
        self._name = name  # host/repository, for messages
        self._find = credentials
        self._actions = actions
        self._beside = beside
        self._lock = threading.Lock()
        self._who = ""  # whose credentials were used, for messages
        self._challenge: Challenge | None = None
        self._scopes: dict[str, set[str]] = {}
        self._token: _Token | None = None
        self._shared_failure: tuple[float, CkptfsError] | None = None
        self._forbidden_until = float("-inf")

    def header(self, attempts: Attempts) -> str | None:
        """What to send now; a token that is about to expire is renewed first. None before any challenge.

        AuthError for 30 s after a refusal.
        """
        with self._lock:
            token = self._token
            if token is None and self._beside is not None:
                return self._beside.header(attempts)
            if token is not None and self._transport.clock.now() < token.renew_at:
                return token.header  # what it was refused for may have been one thing of many
            self._raise_shared_failure()
            return self._acquire(attempts).header if token is not None else None

    def aside(self) -> "Authorizer":
        """For what may be refused where all else is given: this one's token, and then one of its own."""
        return Authorizer(self._transport, self._territory, self._name, self._find, self._actions, beside=self)

    def challenged(self, reply: Reply, used: str | None, attempts: Attempts) -> bool:
        """A 401 or 403 came for a request with the header `used`: have a better one, or raise AuthError.

        False where it is not worth another try: a 403 so soon after the last one is not about an expired token.
        """
        challenges = parse_challenges(reply.headers("WWW-Authenticate"))
        with self._lock:
            if self._token is not None and self._token.header != used:
                return True  # another thread has renewed it meanwhile
            self._raise_shared_failure()
            if reply.status == 403:
                now = self._transport.clock.now()
                if used is None or self._challenge is None or now < self._forbidden_until:
                    return False
                self._forbidden_until = now + _REFUSED_FOR
            offered = {challenge.scheme: challenge for challenge in reversed(challenges)}
            challenge = offered.get("bearer") or offered.get("basic") or self._challenge
            if challenge is None:
                schemes = ", ".join(sorted(offered)) or "nothing"
                raise self._refused(f"{self._name} asks for authentication and offers {schemes}, not bearer or basic")
            self._challenge = challenge
            known = self._scope_values()
            self._widen(challenge.parameters.get("scope", ""))
            lacking = reply.status == 401 and challenge.parameters.get("error") == _NO_RIGHT
            if lacking and self._token is not None and known == self._scope_values():
                may_not = f"{self._who} may not {' and '.join(sorted(self._actions))}"
                raise self._kept(self._refused(f"{self._name}: {may_not}, or there is no such repository"))
            # A 403 to a token that is as good as new forbids one thing; everything else may still be had with it
            return self._acquire(attempts, used if reply.status == 401 else None).header != used

    def rejected(self) -> AuthError:
        """The registry refuses token after token: the error to raise, now and for the next 30 s."""
        with self._lock:
            return self._kept(self._refused(f"{self._name} refuses the tokens of its own token server"))

    def _kept(self, error: AuthError) -> AuthError:
        self._shared_failure = (self._transport.clock.now() + _REFUSED_FOR, error)
        return error

    def _widen(self, scopes: str) -> None:
        """One token for all that was ever asked of us: pull first, push and mounts from elsewhere later.

        Registries that name no scope (Quay, Artifactory) mean what the request was about, as docker and podman take it.
        """
        needed = self._actions
        if not scopes and not self._scopes:
            scopes = f"repository:{self._name.partition('/')[2]}:{','.join(sorted(needed))}"
        for scope in scopes.split():
            match = re.match(_SCOPE, scope)
            name, actions = (match[1], needed.union(match[2].split(","))) if match else (scope, ())
            self._scopes.setdefault(name, set()).update(actions)
            needed = needed if not match else frozenset()  # other repositories are where blobs are mounted from

    def _scope_values(self) -> list[str]:
        return [
            f"repository:{name}:{','.join(sorted(actions))}" if actions else name
            for name, actions in self._scopes.items()
        ]

    def _acquire(self, attempts: Attempts, used: str | None = None) -> _Token:
        """The next header, under the lock: whoever else needs it waits here instead of asking too."""
        challenge = self._challenge
        assert challenge is not None
        self._token = None
        try:
            credentials = self._find()
            self._who = f"the credentials from {_origin(credentials)}" if credentials is not None else "anonymous users"
            if credentials is not None:
                conceal(credentials.password, credentials.identity_token, credentials.registry_token)
            if credentials is not None and credentials.registry_token:
                token = _Token(f"Bearer {credentials.registry_token}", float("inf"))
            elif challenge.scheme == "basic":
                if credentials is None or not credentials.username:
                    raise self._refused(f"{self._name} does not let anonymous users in")
                token = _Token(credentials.basic, float("inf"))
            else:
                token = self._request_token(challenge, credentials, attempts)
            conceal(token.header.partition(" ")[2])
            if token.header == used:
                raise self._refused(f"{self._name} refused the credentials from {_origin(credentials)}")
        except CkptfsError as error:
            hold = _FAILED_FOR if error.retryable else _REFUSED_FOR
            self._shared_failure = (self._transport.clock.now() + hold, error)
            raise
        self._shared_failure = None
        self._token = token
        return token

    def _request_token(self, challenge: Challenge, credentials: Credentials | None, attempts: Attempts) -> _Token:
        realm = challenge.parameters.get("realm", "")
        url, reach = self._territory.admit(realm, str(self._territory.home))
        query = [("service", challenge.parameters["service"])] if "service" in challenge.parameters else []
        began = self._transport.clock.now()
        if credentials is not None and credentials.identity_token:
            form = [("grant_type", "refresh_token"), ("client_id", "ckptfs"), *query]
            form += [("scope", " ".join(self._scope_values())), ("refresh_token", credentials.identity_token)]
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            body = urlencode(form).encode()
            reply = self._transport.send("POST", url, attempts, headers=headers, body=body, reach=reach)
        else:
            query += [("scope", scope) for scope in self._scope_values()]
            target = url + ("&" if "?" in url else "?") + urlencode(query) if query else url
            headers = {"Authorization": credentials.basic} if credentials is not None else {}
            reply = self._transport.send("GET", target, attempts, headers=headers, reach=reach)
        with reply:
            if reply.status == 429 or reply.status >= 500:
                raise UnavailableError(f"{reply.where} answered {reply.status}")
            if reply.status != 200:
                who = f"refused the credentials from {_origin(credentials)}" if credentials else "gives anonymous none"
                raise self._refused(f"{self._name}: the token server {who} ({reply.status})")
            return self._parse_token(reply, began)

    def _parse_token(self, reply: Reply, began: float) -> _Token:
        try:
            answer = parse_json(reply.read(self._transport.settings.limits.token_bytes, "token"), "token")
        except LimitExceeded:
            raise
        except FormatError:
            raise UnavailableError(f"{reply.where}: the answer is no token") from None
        value = answer.get("token") or answer.get("access_token") if isinstance(answer, dict) else None
        if not isinstance(answer, dict) or not isinstance(value, str) or not re.match(_TOKEN, value):
            raise UnavailableError(f"{reply.where}: the answer is no token")
        life = answer.get("expires_in")
        seconds = float(life) if isinstance(life, int | float) and 0 < life < 1e9 else _DEFAULT_LIFE
        return _Token(f"Bearer {value}", began + seconds - min(_MARGIN * seconds, 10.0))

    def _refused(self, message: str) -> AuthError:
        host = self._name.partition("/")[0]
        return AuthError(message, hint=f"log in with `podman login {host}` or `skopeo login {host}`")

    def _raise_shared_failure(self) -> None:
        if self._shared_failure is None:
            return
        until, error = self._shared_failure
        if self._transport.clock.now() < until:
            # a new object: one exception raised by many threads would grow one endless traceback
            raise copy.copy(error)
        self._shared_failure = None


def _origin(credentials: Credentials | None) -> str:
    return credentials.origin or "the command" if credentials is not None else "nobody"
