"""The client's side of a mount's control socket, and the files that a mount leaves in the runtime directory.

Blocking and light: `mount`, `umount` and `status` import it. Beside the socket lies a state file that says what is
mounted, so that a mount whose daemon died can still be named.
"""

import contextlib
import hashlib
import json
import os
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ckptfs.errors import MountError, UnavailableError
from ckptfs.settings import Timeouts, runtime_dir


class MountFiles(NamedTuple):
    """Where one mount keeps its socket, state, lock and log; named after the mount point."""

    directory: Path
    name: str

    @classmethod
    def of(cls, mountpoint: str) -> "MountFiles":
        return cls(runtime_dir(), hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16])

    @property
    def socket(self) -> Path:
        return self.directory / f"{self.name}.sock"

    @contextlib.contextmanager
    def address(self) -> Iterator[str]:
        """The socket for bind(2) and connect(2), whose addresses have 107 bytes (unix(7)), however deep it lies."""
        directory = os.open(self.directory, os.O_PATH | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{directory}/{self.socket.name}"
        finally:
            os.close(directory)

    @property
    def state(self) -> Path:
        return self.directory / f"{self.name}.json"

    @property
    def lock(self) -> Path:
        return self.directory / f"{self.name}.lock"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def remove(self, *, keep_log: bool = True) -> None:
        """The mount has ended. `keep_log`: it did not end well; what its log says, if anything, can still be read."""
        for path in (self.socket, self.state):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if not keep_log or self.log.stat().st_size == 0:
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
        how = f"run: rm -r {shlex.quote(str(directory))}"
        raise MountError(f"{directory} must be a directory of mode 0700 that you own", hint=how)
    return directory


def prune_logs(age: float) -> None:
    """Remove the logs of mounts that are gone and that nobody has read for `age` seconds."""
    directory = runtime_dir()
    for log in directory.glob("*.log"):
        files = MountFiles(directory, log.stem)
        with contextlib.suppress(OSError):
            if not files.lock.exists() and time.time() - log.stat().st_mtime > age:
                log.unlink()


def known_mounts() -> Iterator[tuple[MountFiles, dict[str, Any]]]:
    """Every mount that has left a state file, alive or dead."""
    directory = runtime_dir()
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        files = MountFiles(directory, path.stem)
        state = read_state(files)
        if state is not None:
            yield files, state


def locked_names() -> Iterator[MountFiles]:
    """Everything that has a lock, alive or dead: mounts that were never ready, too."""
    directory = runtime_dir()
    for path in directory.glob("*.lock"):
        yield MountFiles(directory, path.stem)


def read_state(files: MountFiles) -> dict[str, Any] | None:
    """What `write_state` wrote; None where there is nothing, or nothing whole."""
    try:
        return dict(json.loads(files.state.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_state(files: MountFiles, state: dict[str, Any]) -> None:
    """Whole or not at all. The directory is ours alone, and so is the mount: nobody else writes this. MountError."""
    new = files.directory / f".{files.name}.{os.getpid()}"
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
            json.dump(state, file)
        os.rename(new, files.state)
    except OSError as error:
        new.unlink(missing_ok=True)
        how = "make room for a file of a few hundred bytes"
        raise MountError(f"{files.directory} cannot be written to: {error.strerror}", hint=how) from None


def ask(files: MountFiles, command: str, **arguments: Any) -> Any:
    """Blocking client. UnavailableError when nobody answers: the daemon is dead, or never was."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(Timeouts().daemon)
        try:
            with files.address() as address:
                client.connect(address)
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
