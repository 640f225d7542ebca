"""Who we are to a registry: the files that `podman login` and `docker login` write, and credential helpers.

containers-auth.json(5) and Docker's config.json. Looked up only after a registry has asked (auth.py), because a helper
may take seconds, and concealed there. Secrets never get into messages, logs or reprs.
"""

import base64
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ckptfs.errors import UsageError

log = logging.getLogger(__name__)

_HELPER_TIME = 15.0  # seconds; cloud helpers ask a service of their own
_HELPER_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z"
_IDENTITY = "<token>"  # user name that says that the secret is an identity token (docker-credential-helpers)
_DOCKER_HUB = "https://index.docker.io/v1/"  # the key under which Docker keeps docker.io
_HUB_NAMES = ("docker.io", "index.docker.io", "registry-1.docker.io")  # all of which podman takes for it
# Where podman, skopeo and buildah keep logins without $XDG_RUNTIME_DIR: in a service, and mostly those of root
RUNTIME_DIR = Path("/run/containers")


class Credentials(NamedTuple):
    """A user name and password, or an identity token to be exchanged, or a bearer token to be sent as it is."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""
    origin: str = ""  # where they were found, for messages

    def __repr__(self) -> str:
        return f"Credentials({self.username!r}, …, origin={self.origin!r})"

    @property
    def basic(self) -> str:
        """The value of a basic Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


def find_credentials(host: str, repository: str, environment: Mapping[str, str] | None = None) -> Credentials | None:
    """What this user has for `host` (as in the reference: host[:port]); the more specific entry of a file wins.

    None for anonymous. UsageError where a file is there and cannot be understood.
    """
    for path in _files(os.environ if environment is None else environment):
        found = _from_file(path, host, repository)
        if found is not None:
            return found
    return None


def _files(environment: Mapping[str, str]) -> Iterator[Path]:
    home = Path(environment.get("HOME") or os.path.expanduser("~"))
    if explicit := environment.get("REGISTRY_AUTH_FILE"):
        yield Path(explicit)
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "containers" / "auth.json"
    elif os.access(own := RUNTIME_DIR / str(os.getuid()), os.X_OK):
        yield own / "auth.json"
    yield Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "containers" / "auth.json"
    if docker := environment.get("DOCKER_CONFIG"):
        yield Path(docker) / "config.json"
    yield home / ".docker" / "config.json"


def _from_file(path: Path, host: str, repository: str) -> Credentials | None:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error.strerror)
        return None
    try:
        document = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a JSON object", hint="mend it or log in again")
    helpers = _object(document, "credHelpers")
    for server in dict.fromkeys((_server(host), host)):  # docker names docker.io by its URL, podman does not
        helper = helpers.get(server)
        if isinstance(helper, str):
            return _from_helper(helper, server, path)
    entries = _object(document, "auths")
    for key in _keys(entries, host, repository):
        entry = entries.get(key)
        found = _from_entry(entry, path) if isinstance(entry, dict) else None
        if found is not None:
            return found
    store = document.get("credsStore")
    return _from_helper(store, _server(host), path) if isinstance(store, str) and store else None


def _object(document: dict[str, object], name: str) -> dict[str, object]:
    value = document.get(name)
    return value if isinstance(value, dict) else {}


def _keys(entries: Iterable[str], host: str, repository: str) -> Iterator[str]:
    """host/a/b, host/a, host; then the URLs of the host among `entries`, whatever path Docker has given them."""
    parts = repository.split("/")
    for count in range(len(parts), 0, -1):
        yield "/".join([host, *parts[:count]])
    names = _HUB_NAMES if host in _HUB_NAMES else (host,)
    yield from names
    for key in entries:
        scheme, _, rest = key.partition("://")
        if scheme in ("https", "http") and rest.partition("/")[0] in names:
            yield key


def _server(host: str) -> str:
    """What credential helpers know `host` by."""
    return _DOCKER_HUB if host == "docker.io" else host


def _from_entry(entry: dict[str, object], path: Path) -> Credentials | None:
    text = {key: value for key, value in entry.items() if isinstance(value, str)}
    username, password = text.get("username", ""), text.get("password", "")
    try:
        "".join(text.values()).encode()  # JSON can spell half of a surrogate pair, which no header can hold
        if auth := text.get("auth"):
            username, _, password = base64.b64decode(auth, validate=True).decode().partition(":")
            password = password.rstrip("\0")  # Docker itself trims the padding of old clients
    except ValueError:  # binascii.Error and UnicodeError are two of them; b64decode of "é" raises a third
        raise UsageError(f"{path} has an entry that is damaged", hint="log in again") from None
    found = Credentials(
        username, password, text.get("identitytoken", ""), text.get("registrytoken", ""), origin=str(path)
    )
    return found if found.username or found.identity_token or found.registry_token else None


def _from_helper(name: str, server: str, path: Path) -> Credentials | None:
    """docker-credential-NAME get: the server on stdin, JSON on stdout. Its failure means: no credentials here."""
    program = f"docker-credential-{name}"
    if not re.match(_HELPER_NAME, name):
        raise UsageError(f"{path} names a credential helper that is not a program name")
    import subprocess  # 3 ms that a mount without a helper need not wait for

    try:
        done = subprocess.run([program, "get"], input=server.encode(), capture_output=True, timeout=_HELPER_TIME)
    except FileNotFoundError:
        log.warning("%s names %s, which is not installed", path, program)
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("%s failed: %s", program, type(error).__name__)
        return None
    if done.returncode:
        log.debug("%s has nothing for %s", program, server)
        return None
    try:
        answer = json.loads(done.stdout)
        username, secret = str(answer["Username"]), str(answer["Secret"])
        (username + secret).encode()  # as of an entry
    except (ValueError, TypeError, KeyError):
        log.warning("%s gave an answer that is not one", program)
        return None
    if username == _IDENTITY:
        return Credentials(identity_token=secret, origin=program)
    return Credentials(username, secret, origin=program)
