"""The optional metrics port of a mount: GET /metrics over HTTP, for a Prometheus that scrapes.

Answers with what it is given and nothing else: no other path, no parameter, no body is looked at. Connections, and
bytes and time of each, are bounded; a text is made at most once a second: whoever asks takes nothing from readers. Runs
in the mount's event loop; the daemon starts and ends it.
"""

import logging
import time
from collections.abc import Callable

import trio

from ckptfs.control.exposition import CONTENT_TYPE
from ckptfs.errors import MountError

log = logging.getLogger(__name__)

_CONNECTIONS = 8  # at the same time; further ones are closed at once
_PATIENCE = 5.0  # seconds from a connection's start to its end
_HEAD = 8192  # bytes of a request
_FRESH = 1.0  # seconds for which a text is given again


class MetricsPort:
    """Made by `open_port`; serves while `run` runs."""

    def __init__(self, listeners: list[trio.SocketListener], text: Callable[[], str]) -> None:
        """`text`: what /metrics has."""
        self._listeners = listeners
        self._text = text
        self._open = 0
        self._kept: tuple[float, bytes] = (float("-inf"), b"")

    @property
    def address(self) -> str:
        """host:port, where the port is the one that was taken if any was wanted."""
        host, port = self._listeners[0].socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def run(self) -> None:
        """Until cancelled."""
        await trio.serve_listeners(self._serve, self._listeners)

    async def _serve(self, stream: trio.SocketStream) -> None:
        """One request; a failure is of this connection only."""
        self._open += 1
        try:
            async with stream:
                if self._open <= _CONNECTIONS:
                    with trio.move_on_after(_PATIENCE):
                        await stream.send_all(self._answer(await _head_of(stream)))
        except trio.BrokenResourceError:
            log.debug("a client of the metrics port went away")
        except Exception:
            log.exception("the metrics port could not answer")
        finally:
            self._open -= 1

    def _answer(self, head: bytes) -> bytes:
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"", False)
        method, target, _ = words
        wanted = method == b"GET"
        if target.partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", b"there is only /metrics\n", wanted)
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"", False)
        made, body = self._kept
        if time.monotonic() - made > _FRESH:
            body = self._text().encode()
            self._kept = (time.monotonic(), body)
        return _response("200 OK", body, wanted)


async def open_port(address: tuple[str, int], text: Callable[[], str]) -> MetricsPort:
    """Take the port of an IP address; 0 is any that is free. MountError when it cannot be had."""
    host, port = address
    try:
        return MetricsPort(await trio.open_tcp_listeners(port, host=host), text)
    except OSError as error:
        raise MountError(
            f"the metrics port {host}:{port} cannot be had: {error.strerror}",
            hint="port 0 takes one that is free, and `ckptfs status` tells which",
        ) from None


async def _head_of(stream: trio.SocketStream) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and len(data) < _HEAD:
        piece = await stream.receive_some(_HEAD - len(data))
        if not piece:
            break
        data += piece
    return data


def _response(status: str, body: bytes, with_body: bool) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
