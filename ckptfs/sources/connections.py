"""Connections: urllib3's pools with a stopwatch in every receive and a guard on where a connection may end.

Owns the pools (one per Reach, kept warm, shared by the process) and TLS. urllib3's timeouts are per recv(2), so a peer
that sends one byte a second would never time out; here the time spent waiting is summed up inside recv_into, for
headers and bodies alike. Knows no HTTP semantics; used by transport.py only.
"""

import contextlib
import functools
import http.client
import io
import logging
import os
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NameResolutionError, NewConnectionError
from urllib3.util.ssl_ import create_urllib3_context

from ckptfs.errors import UsageError
from ckptfs.settings import KiB
from ckptfs.sources import happy_eyeballs
from ckptfs.sources.origin import Origin, Reach
from ckptfs.sources.places import SYSTEM_TRUST, Trust

# urllib3 logs whole URLs, signatures of storage services included, from DEBUG to WARNING; transport.py logs instead.
logging.getLogger("urllib3").setLevel(logging.CRITICAL + 1)

_KEPT = 16  # idle connections kept per host; the fetcher uses up to Sizes.jobs + Sizes.background_jobs at once
_HOSTS = 32
_NARROW = (socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * KiB)
# containers-certs.d(5): the registry's CA as *.crt, our certificate as *.cert with *.key beside it
CERTIFICATE_DIRS = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))


class RefusedAddress(OSError):
    """A name that was checked before led to an address that is out of reach (DNS rebinding)."""


class Watch:
    """`quota` bytes must arrive in every `window` seconds of waiting; time that the caller takes does not count."""

    __slots__ = ("_count", "_quota", "_waited", "_window")

    def __init__(self, window: float, quota: int, waited: float = 0.0) -> None:
        """`waited`: seconds of the first window that have passed already."""
        self._window = window
        self._quota = quota
        self._waited = waited
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


_TIMEVAL = struct.Struct("@ll")
# More than the buffer of a response is only asked for where so much of the body is left: all of it may be waited for
_BUFFERED = max(io.DEFAULT_BUFFER_SIZE, 32 * KiB)
NO_QUOTA = 1 << 62  # a Watch with it measures the whole time: for headers


class WatchedSocket(socket.socket):
    """Once `block` was called, until the next request, the kernel keeps the time of its receives.

    A socket with a timeout of Python's own is asked with an ioctl, a poll and a recv each time, and gives the
    interpreter's lock away three times; a blocking one once (4 % of what 1 GB costs, from loopback).
    """

    watch: Watch | None = None
    _armed = 0.0  # seconds that the kernel waits

    def block(self) -> None:
        self.settimeout(None)  # urllib3 sets another before it sends the next request
        self._armed = 0.0

    def wait(self, seconds: float) -> None:
        """How long the next receive may take; by the time of the kernel up to a tenth longer."""
        if self.gettimeout() is not None:
            self.settimeout(seconds)
        elif not 0.9 * self._armed < seconds <= self._armed:
            timeval = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6) or 1)
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            self._armed = seconds

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        whole = self.watch is not None and self.gettimeout() is None and len(buffer) > _BUFFERED
        receive = functools.partial(super().recv_into, flags=socket.MSG_WAITALL if whole else 0)
        try:
            return _receive(self, receive, buffer)
        except BlockingIOError:  # EAGAIN: socket(7), SO_RCVTIMEO
            raise TimeoutError("timed out") from None


class WatchedTLSSocket(ssl.SSLSocket):
    watch: Watch | None = None

    def wait(self, seconds: float) -> None:
        self.settimeout(seconds)

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        return _receive(self, super().recv_into, buffer)


def _receive(sock: WatchedSocket | WatchedTLSSocket, recv_into: Callable[[Any], int], buffer: Any) -> int:
    watch = sock.watch
    if watch is None:
        return recv_into(buffer)
    sock.wait(watch.patience())
    began = time.monotonic()
    count = recv_into(buffer)
    watch.received(count, time.monotonic() - began)
    return count


def watch(sock: object, window: float, quota: int, waited: float = 0.0) -> None:
    """From now on the peer of `sock` has to be that fast."""
    if isinstance(sock, WatchedSocket | WatchedTLSSocket):
        sock.watch = Watch(window, quota, waited)
        if isinstance(sock, WatchedSocket):
            sock.block()


class _Response(http.client.HTTPResponse):
    """A chunk of a negative size would be read to its end, whatever was asked for: into memory, without a bound."""

    def _read_next_chunk_size(self) -> int:
        size = super()._read_next_chunk_size()  # type: ignore[misc]  # http.client has no hook for it
        if size < 0:
            raise ValueError  # as for one that is no number
        return int(size)


class _Guarded(HTTPConnection):
    """Checks the address that it reached before a byte is sent, and the time until the headers are complete."""

    reach: Reach
    response_class = _Response

    def _new_conn(self) -> socket.socket:
        # urllib3's own hook for other ways to connect (contrib.socks uses it); raises what urllib3's own does
        seconds = self.timeout
        assert isinstance(seconds, int | float), "every request and `connect` set it"
        try:
            raw = happy_eyeballs.connect(self._dns_host, self.port, seconds, self.socket_options or ())
        except (socket.gaierror, UnicodeError) as error:
            raise NameResolutionError(self.host, self, cast("socket.gaierror", error)) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"no connection to {self.host} within {seconds} s") from error
        except OSError as error:
            raise NewConnectionError(self, f"no connection to {self.host}: {error.strerror}") from error
        sys.audit("http.client.connect", self, self.host, self.port)
        sock = WatchedSocket(fileno=raw.detach())
        sock.settimeout(seconds)
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
            context = options["ssl_context"] = self.contexts(host, port or 443)
            options["cert_reqs"] = context.verify_mode  # urllib3 sets the context's to this
        super().__init__(host, port, **options)

    @property
    def is_connected(self) -> bool:
        """Whether it can be used still: of two connections made at once one has not read its session tickets yet.

        They make the socket readable (TLS 1.3), which urllib3 takes for the end of a connection that was idle.
        """
        sock = self.sock
        if super().is_connected or sock is None:
            return sock is not None
        sock.settimeout(0)  # urllib3 sets another before it sends the next request
        try:
            sock.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            pass
        return False


class _Plain(HTTPConnectionPool):
    def connect(self, seconds: float) -> None:
        """One more connection that waits for a request. Raises what urllib3 raises where there is none."""
        waiting = []  # _get_conn and _put_conn are urllib3's own hooks for other pools; it has the last one put first
        while (connection := self._get_conn()).is_connected:
            waiting.append(connection)
        for other in reversed(waiting):
            self._put_conn(other)
        try:
            connection.timeout = seconds
            connection.connect()
        finally:
            self._put_conn(connection)


class _TLS(_Plain, HTTPSConnectionPool):
    pass


class Pools:
    """Every connection of the process."""

    def __init__(self, certificates: tuple[Path, ...] = CERTIFICATE_DIRS) -> None:
        self._certificates = certificates
        self._lock = threading.Lock()
        self._managers: dict[tuple[Reach, bool], urllib3.PoolManager] = {}
        self._trusted: dict[tuple[str, int], Trust] = {}
        # Loading the system's CAs takes 20 to 40 ms: only when TLS is spoken, and once
        self._default_context = functools.cache(_tls_context)

    def of(self, reach: Reach, *, narrow: bool = False) -> urllib3.PoolManager:
        """The pools whose connections may go as far as `reach`; they are never mixed. `narrow`: with a small window."""
        with self._lock:
            if (reach, narrow) not in self._managers:
                self._managers[reach, narrow] = self._manager(reach, narrow)
            return self._managers[reach, narrow]

    def connect(self, origin: Origin, seconds: float) -> None:
        """Have one more connection to `origin`, for the next request; returns without one where that fails."""
        pool = self.of(Reach.ANYWHERE).connection_from_url(str(origin))
        with contextlib.suppress(HTTPError, OSError):
            cast("_Plain", pool).connect(seconds)

    def trust(self, host: Origin, trust: Trust) -> None:
        """Whose certificates `host` may show; for connections that are made from now on."""
        if trust != SYSTEM_TRUST:
            self._trusted[host.host, host.port] = trust
            if not trust.verify:
                urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

    def close(self) -> None:
        with self._lock:
            for manager in self._managers.values():
                manager.clear()

    def _manager(self, reach: Reach, narrow: bool) -> urllib3.PoolManager:
        plain = type("Guarded", (_Guarded,), {"reach": reach})
        tls = type("GuardedTLS", (_GuardedTLS,), {"reach": reach, "contexts": staticmethod(self._context)})
        options = [*HTTPConnection.default_socket_options, *([_NARROW] if narrow else [])]
        manager = urllib3.PoolManager(
            num_pools=_HOSTS, maxsize=_KEPT, block=False, retries=False, socket_options=options
        )
        manager.pool_classes_by_scheme = {
            "http": type("Pool", (_Plain,), {"ConnectionCls": plain}),
            "https": type("TLSPool", (_TLS,), {"ConnectionCls": tls}),
        }
        return manager

    def _context(self, host: str, port: int) -> ssl.SSLContext:
        names = (f"{host}:{port}", host)
        places = [place for base in self._certificates for name in names if os.path.isdir(place := base / name)]
        trust = self._trusted.get((host, port))
        return _tls_context(trust or SYSTEM_TRUST, *places[:1]) if places or trust else self._default_context()


def _tls_context(trust: Trust = SYSTEM_TRUST, place: Path | None = None) -> ssl.SSLContext:
    """The system's CAs ($SSL_CERT_FILE), and what `trust` and the directory `place` add for one host."""
    context = create_urllib3_context()
    context.load_default_certs()
    context.sslsocket_class = WatchedTLSSocket
    found = sorted(place.glob("*.cert")) if place is not None else []
    for authority in (*trust.authorities, *(sorted(place.glob("*.crt")) if place is not None else ())):
        with _named(authority):
            context.load_verify_locations(authority)
    for certificate, key in (*trust.certificates, *((file, file.with_suffix(".key")) for file in found)):
        with _named(certificate):
            context.load_cert_chain(certificate, key)
    if not trust.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """What is wrong with a certificate that somebody put there says nothing of the network."""
    try:
        yield
    except OSError as error:  # ssl.SSLError is one, of what is no certificate
        why = (
            "it is no certificate in PEM, or its key does not fit"
            if isinstance(error, ssl.SSLError)
            else error.strerror
        )
        raise UsageError(f"{file} cannot be used: {why}", hint="mend it or take it away") from None


@functools.cache
def shared_pools() -> Pools:
    return Pools()
