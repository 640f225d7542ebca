"""One unix socket per mount: status and stop, as one JSON line each way. Owner only (0600 and SO_PEERCRED).

The server side runs in the mount's process; the client side in `ckptfs status` and `umount`. Beside the socket lies a
state file that says what is mounted, so that a mount whose daemon died can still be named.
"""

import contextlib
import hashlib
import json
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from ckptfs.errors import MountError, UnavailableError
from ckptfs.settings import runtime_dir

_REQUEST_BYTES = 64 * 1024
_PEERCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class MountFiles:
    """Where one mount keeps its socket, state, lock and log; named after the mount point."""

    directory: Path
    name: str

    @classmethod
    def of(cls, mountpoint: str) -> "MountFiles":
        return cls(runtime_dir(), hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16])

    @property
    def socket(self) -> Path:
        return self.directory / f"{self.name}.sock"

    @property
    def state(self) -> Path:
        return self.directory / f"{self.name}.json"

    @property
    def lock(self) -> Path:
        return self.directory / f"{self.name}.lock"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def remove(self) -> None:
        """The mount has ended well; the log stays only if it says something."""
        for path in (self.socket, self.state):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if self.log.stat().st_size == 0:
                self.log.unlink()


def ensure_runtime_dir() -> Path:
    """The directory of sockets and state, ours and closed to others; MountError when somebody else made it."""
    directory = runtime_dir()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise MountError(f"{directory} cannot be made: {error.strerror}") from None
    if directory.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise MountError(f"{directory} must be a directory of mode 0700 that you own", hint=f"run: rm -r {directory}")
    return directory


def known_mounts() -> Iterator[tuple[MountFiles, dict[str, Any]]]:
    """Every mount that has left a state file, alive or dead."""
    directory = runtime_dir()
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        try:
            state = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        yield MountFiles(directory, path.stem), state


def write_state(files: MountFiles, state: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=files.directory, prefix=f".{files.name}", delete=False) as file:
        json.dump(state, file)
    os.rename(file.name, files.state)


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
            listener.bind(str(self._files.socket))
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
        except (ValueError, KeyError, TypeError):
            return {"error": f"unknown command; there are {', '.join(sorted(self._commands))}"}
        return {"answer": command(request)}


async def _line(stream: trio.SocketStream) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < _REQUEST_BYTES:
        piece = await stream.receive_some(4096)
        if not piece:
            break
        data += piece
    return data


def ask(files: MountFiles, command: str, *, timeout: float = 10.0, **arguments: Any) -> Any:
    """Blocking client. UnavailableError when nobody answers: the daemon is dead, or never was."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout)
        try:
            client.connect(str(files.socket))
            client.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                piece = client.recv(65536)
                if not piece:
                    break
                data += piece
            reply = json.loads(data)
        except (OSError, ValueError) as error:
            raise UnavailableError(f"the mount's daemon does not answer ({error})") from None
    if "error" in reply:
        raise MountError(str(reply["error"]))
    return reply["answer"]
