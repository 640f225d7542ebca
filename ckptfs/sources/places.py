"""Places: at which hosts, and under which names there, the images of a reference can be had. Mirrors first.

Puts together what the user has configured for ckptfs (Settings.registries) and what podman or containerd have
(host_files.py). Sends nothing. Called by registry.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from ckptfs.model.oci import Reference
from ckptfs.settings import Registries
from ckptfs.sources.origin import is_loopback

DOCKER_HUB = "docker.io"
_HUB_NAMES = (DOCKER_HUB, "index.docker.io")
_HUB_ADDRESS = "registry-1.docker.io"


class Trust(NamedTuple):
    """Whose certificates a host may show. `certificates`: ours, (certificate, key) in files, key None if in the same.

    verify   False: any certificate will do.
    """

    verify: bool = True
    authorities: tuple[Path, ...] = ()
    certificates: tuple[tuple[Path, Path | None], ...] = ()


SYSTEM_TRUST = Trust()


class Place(NamedTuple):
    """A repository at a host.

    scheme     "http", "https", or "" for an insecure host: TLS with any certificate, or plain HTTP.
    root       path of the API (distribution-spec: /v2).
    namespace  told to the host as ?ns=, so that a mirror of several registries knows which one is meant.
    pulls      manifests by digest and blobs are asked for here.
    resolves   tags, too: its answer says which image a tag is.
    """

    host: str
    repository: str
    scheme: str = "https"
    root: str = "/v2"
    namespace: str = ""
    pulls: bool = True
    resolves: bool = True
    trust: Trust = SYSTEM_TRUST

    @property
    def address(self) -> str:
        """host[:port] to connect to."""
        return _HUB_ADDRESS if self.host == DOCKER_HUB else self.host


def places_of(
    reference: Reference,
    registries: Registries,
    *,
    plain_http: bool = False,
    environment: Mapping[str, str] | None = None,
) -> tuple[Place, ...]:
    """Where to ask for `reference`, in this order; the last one is the registry itself.

    plain_http   the registry itself speaks http. UsageError for files that cannot be understood.
    """
    name = hub_name(reference)
    mirrors: tuple[Place, ...] = ()
    origin = place_of(name)
    if registries.system_files:
        from ckptfs.sources.host_files import configured_places

        mirrors, origin = configured_places(name, by_digest=reference.digest is not None, environment=environment)
    host = name.partition("/")[0]
    if host in registries.mirrors:
        mirrors = tuple(_mirror(place, name, registries) for place in registries.mirrors[host])
    if plain_http or {origin.host, reference.host} & registries.plain_http:
        origin = origin._replace(scheme="http")
    return (*mirrors, origin)


def hub_name(reference: Reference) -> str:
    """host/repository; for docker.io with what its users leave out."""
    if reference.host not in _HUB_NAMES:
        return f"{reference.host}/{reference.repository}"
    repository = reference.repository
    return f"{DOCKER_HUB}/{repository if '/' in repository else f'library/{repository}'}"


def place_of(name: str) -> Place:
    """`name` is host[:port]/repository. Plain HTTP where nothing leaves this machine."""
    host, _, repository = name.partition("/")
    return Place(host, repository, "http" if is_loopback(host) else "https")


def _mirror(place: str, name: str, registries: Registries) -> Place:
    """A mirror of our own configuration: host[:port] or a URL, with a path where it keeps repositories under one."""
    parts = urlsplit(place if "://" in place else f"//{place}")
    registry, _, repository = name.partition("/")
    prefix = parts.path.strip("/")
    found = place_of(f"{parts.netloc}/{prefix}/{repository}" if prefix else f"{parts.netloc}/{repository}")
    scheme = parts.scheme or ("http" if parts.netloc in registries.plain_http else found.scheme)
    return found._replace(scheme=scheme, namespace=registry, resolves=registries.mirror_tags)
