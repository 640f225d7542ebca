"""The mount's side of its control socket: one request and one answer per connection, owner only."""

import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import trio

from ckptfs.control.client import MountFiles

log = logging.getLogger(__name__)

_REQUEST_BYTES = 64 * 1024
_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid (unix(7))


class ControlServer:
    """Answers on a mount's socket. `commands` maps a name to a function that returns a JSON-able answer."""

    def __init__(self, files: MountFiles, commands: dict[str, Callable[[dict[str, Any]], Any]]) -> None:
        self._files = files
        self._commands = commands

    async def run(self) -> None:
        self._files.socket.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o177)
        try:
            with self._files.address() as address:
                listener.bind(address)
        finally:
            os.umask(old)
        listener.listen(16)
        await trio.serve_listeners(self._serve, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(10), contextlib.suppress(trio.BrokenResourceError):
                raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
                _, uid, _ = _PEERCRED.unpack(raw)
                if uid not in (0, os.geteuid()):
                    return
                await stream.send_all(json.dumps(self._answer(await _line(stream))).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            command = self._commands[request["command"]]
        except (ValueError, KeyError, TypeError, RecursionError):  # the last: brackets in brackets
            return {"error": f"unknown command; there are {', '.join(sorted(self._commands))}"}
        try:
            return {"answer": command(request)}
        except Exception as error:  # a bug: it must not end the mount
            log.exception("%s failed unexpectedly", request["command"])
            return {"error": f"internal error: {type(error).__name__}"}


async def _line(stream: trio.SocketStream) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < _REQUEST_BYTES:
        piece = await stream.receive_some(4096)
        if not piece:
            break
        data += piece
    return data
