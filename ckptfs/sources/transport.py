"""One HTTP exchange after another: send, judge nothing, receive bodies under a stopwatch, translate what goes wrong.

The only module that calls urllib3 (with connections.py). Retries, redirects and authorisation are above it: retry.py,
endpoint.py, auth.py. Messages and logs name host, path, range and try; never another header, a query string (signatures
live there) or a body.
"""

import logging
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TypeVar
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util import Timeout

from ckptfs import __version__
from ckptfs.errors import CkptfsError, LimitExceeded, UnavailableError
from ckptfs.settings import KiB, Settings
from ckptfs.sources.connections import Pools, RefusedAddress, shared_pools, watch
from ckptfs.sources.origin import Origin, Reach
from ckptfs.sources.places import Trust
from ckptfs.sources.retry import Attempts, Clock, HostWindows, NoAnswer, SystemClock, parse_retry_after
from ckptfs.sources.standing import Standing
from ckptfs.telemetry import NetworkCounters

log = logging.getLogger(__name__)

# Body bytes per read: 64 KiB costs 0.1 ms/MB more, 256 KiB delays a decode by 10 ms at 200 Mbit/s, and what a reset
# connection had received of a piece is lost
PIECE = 128 * KiB
_LONG = 8 * PIECE
_AT_ONCE = 0.002  # seconds for a piece; where they come so fast fewer and larger ones delay nobody and cost less
_PATIENCE = 0.25  # the same where nobody waits for less than a megabyte: three bodies at 200 Mbit/s
_LAST_PIECE = 0.5  # seconds that a body has at least, however long its headers took

T = TypeVar("T")

Body = bytes | Iterable[bytes | memoryview]

_windows = HostWindows()
_standing = Standing()


class NoTLS(UnavailableError):
    """The other side answered a TLS handshake with something else."""


class Reply:
    """One answer whose body is still to be received. A context manager: leaving it frees or drops the connection."""

    def __init__(
        self, transport: "Transport", response: urllib3.BaseHTTPResponse, url: str, where: str, patience: float
    ) -> None:
        self._transport = transport
        self._response = response
        self._patience = patience
        self._began: float | None = None
        self.url = url
        self.where = where

    @property
    def status(self) -> int:
        return self._response.status

    def header(self, name: str) -> str | None:
        return self._response.headers.get(name)

    def headers(self, name: str) -> list[str]:
        """All fields of that name, one by one."""
        return self._response.headers.getlist(name)

    @property
    def retry_after(self) -> float | None:
        """Seconds for which the host wants to be left alone."""
        wall = self._transport.clock.wall()
        return parse_retry_after(self.header("Retry-After"), wall, self.header("Date"))

    @property
    def length(self) -> int | None:
        """Content-Length, None where there is none that can be believed."""
        value = (self.header("Content-Length") or "").strip()
        chunked = self.header("Transfer-Encoding") is not None
        return int(value) if value.isascii() and value.isdigit() and len(value) < 19 and not chunked else None

    def pieces(self, length: int, *, patient: bool = False) -> Iterator[bytes]:
        """Exactly `length` body bytes, in pieces of at most 1 MiB. NoAnswer where the body ends early or stalls.

        `patient`: they may take a while (model/blob.py).
        """
        left, most, soon = length, _LONG if patient else PIECE, _PATIENCE if patient else _AT_ONCE
        while left:
            began = time.monotonic()
            piece = self._read(min(left, most))
            if not piece:
                raise NoAnswer(f"{self.where}: the body ended {left} bytes early")
            if time.monotonic() - began < soon:
                most = min(2 * most, _LONG)
            else:
                most = PIECE
            left -= len(piece)
            yield piece

    def read(self, limit: int, what: str) -> bytes:
        """The whole body; LimitExceeded if it is longer than `limit` bytes."""
        if (self.length or 0) > limit:
            raise LimitExceeded(f"{self.where}: the {what} is larger than {limit} bytes")
        parts: list[bytes] = []
        left = limit + 1
        while left and (part := self._read(min(left, PIECE))):
            parts.append(part)
            left -= len(part)
        if not left:
            raise LimitExceeded(f"{self.where}: the {what} is larger than {limit} bytes")
        return b"".join(parts)

    def drain(self) -> None:
        """Receive a body that nobody wants, if it is small, so that the connection can be used again."""
        if (self.length or 0) <= self._transport.settings.limits.error_body_bytes:
            with suppress(CkptfsError):
                self.read(self._transport.settings.limits.error_body_bytes, "body")

    def _read(self, count: int) -> bytes:
        try:
            piece = self._response.read(count)
        except (HTTPError, OSError) as error:
            raise self._transport.translate(error, self.where) from None
        self._transport.counters.received(len(piece))
        return piece

    def close(self) -> None:
        """Back to the pool if the body has been read to its end, else closed."""
        if self._began is None:
            return
        self._transport.counters.ended(self._began)
        self._began = None
        if self._response.length_remaining == 0:
            self._response.drain_conn()
            self._response.release_conn()
        else:
            self._response.close()

    def opened(self, began: float) -> "Reply":
        connection = self._response.connection
        timeouts = self._transport.settings.timeouts
        # The wait for the headers counts: headers after 4.9 s and a trickle then must not take 10 s together
        window = min(timeouts.stall_window, self._patience)
        waited = max(min(time.monotonic() - began, window - _LAST_PIECE), 0.0)
        watch(getattr(connection, "sock", None), window, timeouts.stall_bytes, waited)
        self._began = began
        return self

    def __enter__(self) -> "Reply":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Transport:
    """HTTP for one source: its counters and time limits over the pools and host windows of the process."""

    def __init__(
        self,
        settings: Settings,
        counters: NetworkCounters,
        *,
        pools: Pools | None = None,
        windows: HostWindows | None = None,
        standing: Standing | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings
        self.counters = counters
        self.clock = clock or SystemClock()
        self.windows = windows or _windows
        self.standing = standing or _standing
        self._pools = pools or shared_pools()

    def attempts(self, seconds: float, *, outlast: bool = False) -> Attempts:
        timeouts = self.settings.timeouts
        return Attempts(timeouts, self.windows, self.counters, self.clock, seconds=seconds, outlast=outlast)

    def trust(self, host: Origin, trust: Trust) -> None:
        """Whose certificates `host` may show, from now on and in the whole process."""
        self._pools.trust(host, trust)

    def connect(self, origin: Origin) -> None:
        """Have one more connection to `origin` before there is a request for it."""
        self._pools.connect(origin, self.settings.timeouts.connect)

    def persist(self, ask: Callable[[Attempts], T], seconds: float, *, outlast: bool = False) -> T:
        """What `ask` returns, asked again as often as retry.py allows."""
        attempts = self.attempts(seconds, outlast=outlast)
        while True:
            try:
                return ask(attempts)
            except CkptfsError as error:
                attempts.failed(error)

    def send(
        self,
        method: str,
        url: str,
        attempts: Attempts,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        reach: Reach = Reach.ANYWHERE,
        first_byte: float | None = None,
        narrow: bool = False,
    ) -> Reply:
        """One request, once the host's window is open; the reply whatever its status is.

        NoAnswer where there is none. A body of bytes goes out in small slices, each of which has to leave within the
        connect timeout. A Retry-After in the reply closes the host's window for everybody. `narrow`: on a connection on
        which little can be under way, for a body that will probably not be wanted.
        """
        origin = Origin.of(url)
        timeouts = self.settings.timeouts
        attempts.enter(origin.netloc)
        place = f" {headers['Range']}" if headers and "Range" in headers else ""
        where = f"{method} {origin.netloc}{urlsplit(url).path}{place} (try {attempts.number})"
        patience = attempts.remaining()
        first_byte = min(first_byte or self._patience(origin.netloc, attempts.number), patience)
        # the time to send a body does not count, the time to connect does
        timeout = Timeout(total=None if body else first_byte, connect=min(timeouts.connect, patience), read=first_byte)
        slices = _slices(body) if body else None
        began = self.counters.began()
        try:
            response = self._pools.of(reach, narrow=narrow).urlopen(
                method,
                url,
                body=body if slices is None else slices,
                headers=_headers(headers, body),
                timeout=timeout,
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
            )
        except BaseException as error:
            self.counters.ended(began)
            if isinstance(error, HTTPError | OSError | ValueError):
                raise self.translate(error, where) from None
            raise
        finally:
            if slices is not None:
                slices.close()  # a body that is itself a reply must not stay open
        self.windows.reached(origin.host)
        self.standing.answered(origin.netloc, time.monotonic() - began)
        log.debug("%s: %d", where, response.status)
        reply = Reply(self, response, url, where, patience).opened(began)
        if response.status in (429, 503):
            asked = reply.retry_after
            if asked is not None:
                self.windows.close(origin.netloc, self.clock.now() + asked)
        return reply

    def _patience(self, netloc: str, number: int) -> float:
        """Seconds to the first byte: what is far more than usual for this host, doubled with every try."""
        timeouts = self.settings.timeouts
        usual = self.standing.patience(netloc, timeouts.hedge, timeouts.first_byte)
        return min(usual * 2.0 ** min(number - 1, 16), timeouts.first_byte)

    def translate(self, error: Exception, where: str) -> UnavailableError:
        """urllib3's, ssl's and the system's errors in our words; their own texts may hold a signed URL."""
        host = where.split()[1].partition("/")[0]
        cause: BaseException = error
        while (inner := cause.__cause__ or cause.__context__) is not None and not isinstance(
            cause, NameResolutionError | ssl.SSLError
        ):
            cause = inner
        if isinstance(error, SSLError) or isinstance(cause, ssl.SSLError):
            return _tls_failure(cause, where, host)
        if isinstance(cause, RefusedAddress):
            return UnavailableError(f"{where}: the name leads into a private network; refused", permanent=True)
        if isinstance(error, NameResolutionError):
            name = host.rpartition(":")[0] or host
            temporary = isinstance(error.__cause__, socket.gaierror) and error.__cause__.errno == socket.EAI_AGAIN
            known = temporary or self.windows.was_reached(name)
            return NoAnswer(
                f"{where}: DNS does not resolve {name}", hint="check the name and the network", permanent=not known
            )
        if isinstance(error, ReadTimeoutError):
            return NoAnswer(f"{where}: too slow or silent", at_once=True)
        if isinstance(error, NewConnectionError):
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else "cannot connect"
            return NoAnswer(f"{where}: {reason.lower()}", hint="is the registry running there?")
        if isinstance(error, ConnectTimeoutError):
            return NoAnswer(f"{where}: no connection within the time limit", hint="is the registry reachable?")
        if isinstance(error, ProtocolError | OSError):
            return NoAnswer(f"{where}: the connection broke", at_once=True)
        return NoAnswer(f"{where}: {type(error).__name__}")


def _headers(headers: Mapping[str, str] | None, body: Body | None) -> dict[str, str]:
    out = {"User-Agent": f"ckptfs/{__version__}", **(headers or {})}
    if isinstance(body, bytes):
        out["Content-Length"] = str(len(body))
    return out


def _slices(body: Body) -> Generator[memoryview, None, None]:
    for part in [body] if isinstance(body, bytes) else body:
        view = memoryview(part)
        yield from (view[at : at + PIECE] for at in range(0, len(view), PIECE))


def _tls_failure(cause: BaseException, where: str, host: str) -> UnavailableError:
    if isinstance(cause, ssl.SSLCertVerificationError):
        return UnavailableError(
            f"{where}: the certificate is not valid ({cause.verify_message})",
            hint=f"put the CA of the registry into /etc/containers/certs.d/{host}/ca.crt",
            permanent=True,
        )
    reason = getattr(cause, "reason", None) or type(cause).__name__
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return NoTLS(f"{where}: {host} does not speak TLS", hint="use --plain-http if that is meant", permanent=True)
    return NoAnswer(f"{where}: TLS failed ({reason})")
