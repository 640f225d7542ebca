"""Where a registry may send us: origins, and the rules for redirects and token realms.

A hostile registry must not make this machine talk to its own network (SSRF), must not downgrade to plain HTTP, and must
not make us show credentials to another origin. Resolves names, sends nothing.
"""

import enum
import ipaddress
import socket
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from ckptfs.errors import UnavailableError
from ckptfs.sources.retry import NoAnswer

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[Address]]

_PORTS = {"http": 80, "https": 443}


class Reach(enum.Enum):
    """Which addresses a connection may go to."""

    ANYWHERE = "anywhere"  # the registry that the user named
    SITE = "site"  # private addresses too, but no link-local ones (cloud metadata services)
    PUBLIC = "public"  # addresses of the public internet only

    def admits(self, address: Address) -> bool:
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        address = mapped or address
        if self is Reach.ANYWHERE:
            return True
        if address.is_link_local or address.is_multicast or address.is_unspecified:
            return False
        return self is Reach.SITE or address.is_global


class Origin(NamedTuple):
    """Scheme, host and port: what credentials belong to (RFC 6454)."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> "Origin":
        """UnavailableError unless `url` is an absolute http or https URL without userinfo."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise UnavailableError("the registry names an address that is not a URL", permanent=True) from None
        if parts.scheme not in _PORTS or not host or "@" in parts.netloc:
            scheme = parts.scheme if parts.scheme.isalnum() else "?"
            raise UnavailableError(f"the registry names an address that is not http(s) ({scheme}:)", permanent=True)
        return cls(parts.scheme, host, port or _PORTS[parts.scheme])

    @property
    def netloc(self) -> str:
        """host[:port] as in a URL, without the scheme's own port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}"


def resolve(host: str, port: int) -> list[Address]:
    """The addresses of `host`; NoAnswer when DNS knows none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NoAnswer(f"DNS does not resolve {host}") from None
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


class Territory:
    """What the registry at `home` may send us to."""

    def __init__(self, home: Origin, resolve: Resolve = resolve) -> None:
        self.home = home
        self._resolve = resolve

    @cached_property
    def _abroad(self) -> Reach:
        """A registry that is itself on a private network may name its neighbours."""
        addresses = self._resolve(self.home.host, self.home.port)
        return Reach.PUBLIC if all(Reach.PUBLIC.admits(a) for a in addresses) else Reach.SITE

    def admit(self, url: str, base: str) -> tuple[str, Reach]:
        """The absolute form of `url`, found in an answer from `base`, and where a connection to it may end.

        UnavailableError (permanent) where it must not be followed.
        """
        try:
            target = urljoin(base, url)
        except ValueError:
            raise UnavailableError(f"{self.home.netloc} names an address that is not a URL", permanent=True) from None
        origin = Origin.of(target)
        if Origin.of(base).scheme == "https" and origin.scheme == "http":
            raise UnavailableError(
                f"{self.home.netloc} wants to go from https to http ({origin.netloc}); refused", permanent=True
            )
        if origin.host == self.home.host:
            return target, Reach.ANYWHERE
        reach = self._abroad
        for address in self._resolve(origin.host, origin.port):
            if not reach.admits(address):
                raise UnavailableError(
                    f"{self.home.netloc} wants to go to {origin.netloc}, which is inside a private network; refused",
                    permanent=True,
                )
        return target, reach


def is_loopback(host: str) -> bool:
    """Whether host[:port] names this machine by itself, without DNS: plain HTTP is safe there."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
