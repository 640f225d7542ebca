"""What other tools of this machine have configured for registries: registries.conf(5) and containerd's hosts.toml.

Translates both into Places: prefixes matched and rewritten, mirrors in order, insecure hosts, capabilities, CAs. A file
that cannot be understood is an error, for it may say that a registry must not be used. Reads files; sends nothing.
Not taken over: credential helpers, short names and search lists, extra headers. Called by places.py.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ckptfs.errors import UnavailableError, UsageError
from ckptfs.sources.origin import is_loopback
from ckptfs.sources.places import DOCKER_HUB, Place, Trust, place_of

CONTAINERS_DIR = Path("/etc/containers")
CONTAINERD_DIRS = (Path("/etc/containerd/certs.d"), Path("/etc/docker/certs.d"))
_FILE_BYTES = 1 << 20
_HINT = "mend it, or set system_mirrors = false in the configuration of ckptfs"

Table = dict[str, Any]


def configured_places(
    name: str, *, by_digest: bool, environment: Mapping[str, str] | None = None
) -> tuple[tuple[Place, ...], Place]:
    """(mirrors in order, the registry itself) for `name`, host[:port]/repository.

    by_digest   the reference has a digest: mirrors for tags only are left out. UsageError, and UnavailableError where
                registries.conf blocks the registry.
    """
    environment = os.environ if environment is None else environment
    entry = _registry_entry(name, environment)
    if entry is not None:
        mirrors, origin = _containers_places(entry, name, by_digest)
        if mirrors or origin != place_of(name):
            return mirrors, origin
    for folder in _containerd_folders(name.partition("/")[0]):
        return _containerd_places(folder / "hosts.toml", name)
    return (), place_of(name)


# -- containers-registries.conf(5) -----------------------------------------------------------------------------------


def _registry_entry(name: str, environment: Mapping[str, str]) -> Table | None:
    """The [[registry]] with the longest prefix that `name` has; of equal ones the last."""
    found: tuple[int, Table] | None = None
    for path in _registries_files(environment):
        document = _toml(path, b"[[registry]]")
        entries = document.get("registry", [])
        if not isinstance(entries, list):
            raise UsageError(f"{path}: registry is not a list of tables", hint=_HINT)
        for entry in entries:
            prefix = _text(entry, "prefix", path) or _text(entry, "location", path)
            matched = _matched(prefix, name)
            if matched and (found is None or len(prefix) >= found[0]):
                found = (len(prefix), {**entry, "prefix": prefix, "path": path})
    return found[1] if found else None


def _registries_files(environment: Mapping[str, str]) -> Iterator[Path]:
    own = Path(environment.get("HOME") or os.path.expanduser("~")) / ".config" / "containers"
    explicit = environment.get("CONTAINERS_REGISTRIES_CONF")
    if explicit:
        yield Path(explicit)
    else:
        yield next((f for f in (own / "registries.conf",) if f.exists()), CONTAINERS_DIR / "registries.conf")
    for folder in (CONTAINERS_DIR, own):
        yield from sorted((folder / "registries.conf.d").glob("*.conf"))


def _matched(prefix: str, name: str) -> int:
    """How much of `name` the prefix covers: whole components only; `*.example.com` covers any host below."""
    if prefix.startswith("*."):
        host = name.partition("/")[0].partition(":")[0]
        return len(host) if host.endswith(prefix[1:]) and len(host) > len(prefix) - 1 else 0
    rest = name[len(prefix) :]
    return len(prefix) if prefix and name.startswith(prefix) and rest[:1] in ("", "/", ":") else 0


def _containers_places(entry: Table, name: str, by_digest: bool) -> tuple[tuple[Place, ...], Place]:
    path: Path = entry["path"]
    if _flag(entry, "blocked", path):
        raise UnavailableError(
            f"{path} blocks {entry['prefix']}", hint="podman would not use it either", permanent=True
        )
    listed = entry.get("mirror", [])
    if not isinstance(listed, list):
        raise UsageError(f"{path}: mirror is not a list of tables", hint=_HINT)
    mirrors = []
    for mirror in listed:
        modes = _text(mirror, "pull-from-mirror", path) or "all"
        if _flag(entry, "mirror-by-digest-only", path):
            modes = "digest-only"
        if modes not in ("all", "digest-only", "tag-only"):
            raise UsageError(f"{path}: pull-from-mirror = {modes!r} is not known", hint=_HINT)
        if not (by_digest and modes == "tag-only"):
            place = _rewritten(mirror, entry["prefix"], name, path)
            mirrors.append(place._replace(resolves=modes != "digest-only"))
    return tuple(mirrors), _rewritten(entry, entry["prefix"], name, path)


def _rewritten(entry: Table, prefix: str, name: str, path: Path) -> Place:
    """`name` with its matched prefix replaced by the entry's location."""
    location = _text(entry, "location", path).rstrip("/")
    place = place_of(location + name[_matched(prefix, name) :] if location else name)
    if not place.repository:
        raise UsageError(f"{path}: {location!r} leaves no repository of {name}", hint=_HINT)
    if _flag(entry, "insecure", path) and not is_loopback(place.host):
        return place._replace(scheme="", trust=Trust(verify=False))
    return place


# -- containerd: docs/hosts.md ---------------------------------------------------------------------------------------


def _containerd_folders(host: str) -> Iterator[Path]:
    """The directory of `host` that has a hosts.toml; `_default` is for all others. At most one."""
    name, colon, port = host.rpartition(":")
    spellings = [f"{name}_{port}_"] if colon and port.isdigit() else []
    for base in CONTAINERD_DIRS:
        for spelling in (*spellings, host, "_default"):
            if os.path.isfile(base / spelling / "hosts.toml"):  # /etc/docker is closed to users in places
                yield base / spelling
                return


def _containerd_places(path: Path, name: str) -> tuple[tuple[Place, ...], Place]:
    document = _toml(path)
    hosts = document.get("host", {})
    if not isinstance(hosts, dict):
        raise UsageError(f"{path}: host is not a table", hint=_HINT)
    mirrors = tuple(_containerd_place(url, settings, name, path) for url, settings in hosts.items())
    server = _text(document, "server", path)
    origin = _containerd_place(server, document, name, path) if server else place_of(name)
    # what the registry itself may be asked for does not depend on who else there is
    return tuple(m for m in mirrors if m.pulls or m.resolves), origin._replace(pulls=True, resolves=True)


def _containerd_place(url: str, settings: Any, name: str, path: Path) -> Place:
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: {url} is not a table", hint=_HINT)
    registry, _, repository = name.partition("/")
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
    except ValueError:  # brackets around what is no address
        parts = urlsplit("")
    if parts.scheme not in ("", "http", "https") or not parts.hostname or "@" in parts.netloc:
        raise UsageError(f"{path} names a host that is not an http(s) URL without a password", hint=_HINT)
    host = DOCKER_HUB if parts.netloc == "registry-1.docker.io" else parts.netloc
    root = parts.path.rstrip("/")
    if not _flag(settings, "override_path", path) and not root.endswith("/v2"):
        root += "/v2"
    capabilities = settings.get("capabilities", ["pull", "resolve"])
    if not isinstance(capabilities, list):
        raise UsageError(f"{path}: capabilities is not a list", hint=_HINT)
    return Place(
        host,
        repository,
        parts.scheme or place_of(f"{host}/").scheme,
        root=root,
        namespace="" if host == registry else registry,
        pulls="pull" in capabilities,
        resolves="resolve" in capabilities,
        trust=_trust(settings, path),
    )


def _trust(settings: Table, path: Path) -> Trust:
    """ca: a file or several; client: certificates, or pairs of certificate and key; relative to the file."""
    authorities, client = settings.get("ca", []), settings.get("client", [])
    pairs: list[tuple[Path, Path | None]] = []
    for item in client if isinstance(client, list) else [client]:
        both = item if isinstance(item, list) else [item]
        if not 1 <= len(both) <= 2 or not all(isinstance(file, str) for file in both):
            raise UsageError(f"{path}: client names no certificates", hint=_HINT)
        pairs.append((path.parent / both[0], path.parent / both[1] if both[1:] and both[1] else None))
    files = authorities if isinstance(authorities, list) else [authorities]
    if not all(isinstance(file, str) for file in files):
        raise UsageError(f"{path}: ca names no files", hint=_HINT)
    trust = Trust(not _flag(settings, "skip_verify", path), tuple(path.parent / file for file in files), tuple(pairs))
    for file in (*trust.authorities, *(file for pair in pairs for file in pair)):
        if file is not None and not os.path.isfile(file):
            raise UsageError(f"{path} names {file}, which is no file", hint=_HINT)
    return trust


# -- TOML ------------------------------------------------------------------------------------------------------------


def _toml(path: Path, needed: bytes = b"") -> Table:
    """The document; {} where there is none or it does not hold the bytes `needed` (parsing costs 5 ms)."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint=_HINT) from None
    if needed not in raw:
        return {}
    import tomllib

    try:
        return tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is not a TOMLDecodeError
        raise UsageError(f"{path} is not TOML: {error}", hint=_HINT) from None


def _text(table: Any, key: str, path: Path) -> str:
    value = table.get(key, "") if isinstance(table, dict) else None
    if not isinstance(value, str):
        raise UsageError(f"{path}: {key} is not a string", hint=_HINT)
    return value


def _flag(table: Table, key: str, path: Path) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(f"{path}: {key} is neither true nor false", hint=_HINT)
    return value
