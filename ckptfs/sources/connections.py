"""Connections: urllib3's pools with a stopwatch in every receive and a guard on where a connection may end.

Owns the pools (one per Reach, kept warm, shared by the process) and TLS. urllib3's timeouts are per recv(2), so a peer
that sends one byte a second would never time out; here the time spent waiting is summed up inside recv_into, for
headers and bodies alike. Knows no HTTP semantics; used by transport.py only.
"""

import functools
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.ssl_ import create_urllib3_context

from ckptfs.sources.origin import Reach

# urllib3 logs whole URLs, signatures of storage services included, from DEBUG to WARNING; transport.py logs instead.
logging.getLogger("urllib3").setLevel(logging.CRITICAL + 1)

_KEPT = 16  # idle connections kept per host; the fetcher uses up to Sizes.jobs + Sizes.background_jobs at once
_HOSTS = 32
# containers-certs.d(5): the registry's CA as *.crt, our certificate as *.cert with *.key beside it
CERTIFICATE_DIRS = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))


class RefusedAddress(OSError):
    """A name that was checked before led to an address that is out of reach (DNS rebinding)."""


class Watch:
    """`quota` bytes must arrive in every `window` seconds of waiting; time that the caller takes does not count."""

    __slots__ = ("_count", "_quota", "_waited", "_window")

    def __init__(self, window: float, quota: int) -> None:
        self._window = window
        self._quota = quota
        self._waited = 0.0
        self._count = 0

    def patience(self) -> float:
        """Seconds that the next receive may take; TimeoutError when there are none left."""
        left = self._window - self._waited
        if left <= 0:
            raise TimeoutError("too few bytes for too long")
        return left

    def received(self, count: int, waited: float) -> None:
        self._waited += waited
        self._count += count
        if self._count >= self._quota:
            self._waited = 0.0
            self._count = 0


NO_QUOTA = 1 << 62  # a Watch with it measures the whole time: for headers


def _receive(sock: "WatchedSocket | WatchedTLSSocket", recv_into: Callable[[Any], int], buffer: Any) -> int:
    watch = sock.watch
    if watch is None:
        return recv_into(buffer)
    sock.settimeout(watch.patience())
    began = time.monotonic()
    count = recv_into(buffer)
    watch.received(count, time.monotonic() - began)
    return count


class WatchedSocket(socket.socket):
    watch: Watch | None = None

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return _receive(self, super().recv_into, buffer)


class WatchedTLSSocket(ssl.SSLSocket):
    watch: Watch | None = None

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        return _receive(self, super().recv_into, buffer)


def watch(sock: object, window: float, quota: int) -> None:
    """From now on the peer of `sock` has to be that fast."""
    if isinstance(sock, WatchedSocket | WatchedTLSSocket):
        sock.watch = Watch(window, quota)


class _Guarded(HTTPConnection):
    """Checks the address that it reached before a byte is sent, and the time until the headers are complete."""

    reach: Reach

    def _new_conn(self) -> socket.socket:
        # urllib3's own hook for other ways to connect (contrib.socks uses it)
        raw = super()._new_conn()
        timeout = raw.gettimeout()
        sock = WatchedSocket(fileno=raw.detach())
        sock.settimeout(timeout)
        address = ip_address(str(sock.getpeername()[0]).partition("%")[0])
        if not self.reach.admits(address):
            sock.close()
            raise RefusedAddress(f"{self.host} is at {address}")
        return sock

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]  # as in urllib3
        if isinstance(self.timeout, int | float):
            watch(self.sock, self.timeout, NO_QUOTA)
        return super().getresponse()


class _GuardedTLS(_Guarded, HTTPSConnection):
    contexts: "Callable[[str, int], ssl.SSLContext]"

    def __init__(self, host: str, port: int | None = None, **options: Any) -> None:
        if options.get("ssl_context") is None:
            options["ssl_context"] = self.contexts(host, port or 443)
        super().__init__(host, port, **options)


class Pools:
    """Every connection of the process."""

    def __init__(self, certificates: tuple[Path, ...] = CERTIFICATE_DIRS) -> None:
        self._certificates = certificates
        self._lock = threading.Lock()
        self._managers: dict[Reach, urllib3.PoolManager] = {}
        # Loading the system's CAs takes 20 to 40 ms: only when TLS is spoken, and once
        self._default_context = functools.cache(_tls_context)

    def of(self, reach: Reach) -> urllib3.PoolManager:
        """The pools whose connections may go as far as `reach`; they are never mixed."""
        with self._lock:
            if reach not in self._managers:
                self._managers[reach] = self._manager(reach)
            return self._managers[reach]

    def close(self) -> None:
        with self._lock:
            for manager in self._managers.values():
                manager.clear()

    def _manager(self, reach: Reach) -> urllib3.PoolManager:
        plain = type("Guarded", (_Guarded,), {"reach": reach})
        tls = type("GuardedTLS", (_GuardedTLS,), {"reach": reach, "contexts": staticmethod(self._context)})
        manager = urllib3.PoolManager(num_pools=_HOSTS, maxsize=_KEPT, block=False, retries=False)
        manager.pool_classes_by_scheme = {
            "http": type("Pool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("TLSPool", (HTTPSConnectionPool,), {"ConnectionCls": tls}),
        }
        return manager

    def _context(self, host: str, port: int) -> ssl.SSLContext:
        names = (f"{host}:{port}", host)
        places = [place for base in self._certificates for name in names if (place := base / name).is_dir()]
        return _tls_context(places[0]) if places else self._default_context()


def _tls_context(place: Path | None = None) -> ssl.SSLContext:
    """The system's CAs ($SSL_CERT_FILE), and what the directory `place` adds for one host."""
    context = create_urllib3_context()
    context.load_default_certs()
    context.sslsocket_class = WatchedTLSSocket
    if place is not None:
        for authority in sorted(place.glob("*.crt")):
            context.load_verify_locations(authority)
        for certificate in sorted(place.glob("*.cert")):
            context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    return context


@functools.cache
def shared_pools() -> Pools:
    return Pools()
