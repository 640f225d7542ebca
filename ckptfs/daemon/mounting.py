"""`ckptfs mount` as a user sees it: the daemon that stays, the parent that waits until a read works.

The parent forks before anything heavy is imported, or has forked already (standby.py), and only listens on a pipe: the
child resolves, mounts, reads a byte through the kernel and says so. A child that fails says why on the same pipe, and
the parent exits with its code.
"""

import contextlib
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ckptfs.control.client import MountFiles
from ckptfs.control.ready import notify
from ckptfs.daemon import standby
from ckptfs.daemon.claim import Claim, Lock
from ckptfs.daemon.requests import Announce, MountRequest, Request, StoreRequest
from ckptfs.errors import CkptfsError, MountError, rebuilt, told
from ckptfs.fuse.mountpoint import canonical, detach, mount_at
from ckptfs.hardening import close_inherited, harden, reuse_memory
from ckptfs.interrupts import lines
from ckptfs.redaction import log_to_stderr
from ckptfs.settings import Timeouts

log = logging.getLogger(__name__)

_ENDED_BY = (signal.SIGINT, signal.SIGTERM)
_ENDS = Timeouts().daemon_end


def mount(request: Request) -> dict[str, Any]:
    """Mount in a daemon; returns what it announces once a read has worked, raises what kept it from that."""
    return begin(request).wait()


def begin(request: Request) -> "Pending":
    """Start the daemon of a mount and do not wait: several get ready at the same time."""
    with Claim(request) as claim:
        reader, writer = os.pipe()
        waiting = standby.take()
        if waiting is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died; another one will do
                waiting.send((request, logging.getLogger().level), claim.fd, writer)
                os.close(writer)
                return Pending(reader, waiting.pid, claim.path)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            child = standby.start(*_ENDED_BY)  # blocked until the child no longer has our handlers
        except MountError:
            claim.remove()
            raise
        if child == 0:
            os.close(reader)
            _become_daemon(claim.files.log, (claim.fd, writer, request.ready_fd))
            _serve(request, claim, writer)
        os.close(writer)
        return Pending(reader, child, claim.path)


def serve_from_standby(message: tuple[Request, int], lock: int, writer: int) -> NoReturn:
    """In a daemon that has waited for this: what `begin` does behind its fork."""
    request, level = message
    claim = Lock(canonical(request.mountpoint), lock)
    _become_daemon(claim.files.log, (lock, writer, request.ready_fd))
    log_to_stderr(level)
    _serve(request, claim, writer)


def mount_foreground(request: Request, show: Announce | None = None) -> None:
    """Mount and stay until unmounted or signalled. `show` gets what is announced as well."""

    def announce(status: dict[str, Any]) -> None:
        notify("READY=1")
        if show is not None:
            show(status)

    standby.dismiss()
    with Claim(request) as claim:
        _run(request, claim, announce)


def _become_daemon(log_file: Path, keep: Collection[int | None]) -> None:
    """A session of its own, no terminal, stderr into the mount's log file; signals end it until it serves."""
    for number in _ENDED_BY:  # who forks us may have them raise, which imports do not survive
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDED_BY)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    out = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(null)
    os.close(out)
    close_inherited({0, 1, 2, *keep})
    os.chdir("/")


def _serve(request: Request, claim: Lock, writer: int) -> NoReturn:
    """The daemon's whole life; never returns. The parent waits at the pipe `writer` for it to be ready or to fail."""
    code = 0
    waiting = os.fdopen(writer, "wb", buffering=0)

    def announce(status: dict[str, Any]) -> None:
        try:
            waiting.write(json.dumps(status).encode() + b"\n")
        except BrokenPipeError:  # who began the mount was killed, and nobody else knows of it
            os.kill(os.getpid(), signal.SIGTERM)
        waiting.close()

    try:
        _run(request, claim, announce, logs=True)
    except BaseException as error:
        message = told(error)
        code = message["code"]
        if not waiting.closed:  # else nobody waits, and the descriptor's number may be another file's
            with contextlib.suppress(OSError):
                waiting.write(json.dumps(message).encode() + b"\n")
    finally:
        logging.shutdown()
        os._exit(code)


class Pending:
    """A mount whose daemon has been started. `pid` is the daemon's, a child of this process."""

    def __init__(self, reader: int, pid: int, path: str) -> None:
        self.pid = pid
        self._reader = reader
        self._path = path
        self._files = MountFiles.of(path)

    def wait(self) -> dict[str, Any]:
        """What it announces once a read has worked; raises what kept the daemon from that. To be called once."""
        try:
            line = next(lines(self._reader), b"")
        except KeyboardInterrupt:
            self.end()
            raise
        os.close(self._reader)
        self._reader = -1
        if not line:
            _, status = os.waitpid(self.pid, 0)
            how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit code {os.WEXITSTATUS(status)}"
            raise MountError(f"the daemon ended before the mount was ready ({how})", hint=f"see {self._files.log}")
        message = json.loads(line)
        if "error" in message:
            os.waitpid(self.pid, 0)
            self._files.log.unlink(missing_ok=True)  # all that it says is said here
            raise rebuilt(message)
        return dict(message)

    def cancel(self) -> None:
        """Ask the daemon to end and do not wait; `end` must still be called."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def end(self) -> None:
        """End the mount, ready or not; nothing of it stays. For the process that has begun it."""
        from ckptfs.processes import wait_gone  # not for a mount that stays

        if self._reader != -1:
            os.close(self._reader)
            self._reader = -1
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            if os.waitpid(self.pid, os.WNOHANG)[0] == 0:
                os.kill(self.pid, signal.SIGTERM)
                if not wait_gone(self.pid, _ENDS):  # it hangs in the kernel, or in what should drain
                    os.kill(self.pid, signal.SIGKILL)
                    os.waitpid(self.pid, 0)
        if (left := mount_at(self._path)) is not None and left.ours:
            detach(self._path)
        with contextlib.suppress(MountError), Lock(self._path) as lock:
            lock.remove()
        self._files.log.unlink(missing_ok=True)


def _run(request: Request, claim: Lock, announce: Announce, *, logs: bool = False) -> None:
    """Serve the mount in this process. `logs`: there is a log, which is to say what it ended with."""
    gc.disable()  # until start-up is over
    reuse_memory()
    harden()
    ended_well = False
    try:
        if isinstance(request, StoreRequest):
            from ckptfs.daemon.serve_store import run

            run(request, claim.path, claim.files, announce)
        else:
            _serve_image(request, claim, announce)
        ended_well = True
    except BaseException as error:
        if logs:  # one that says nothing is removed
            log.error("%s", error, exc_info=None if isinstance(error, CkptfsError) else error)
        raise
    finally:
        claim.remove(keep_log=not ended_well)


def _serve_image(request: MountRequest, claim: Lock, announce: Announce) -> None:
    """The first request runs while trio, pyfuse3 … are imported (130 ms)."""
    from ckptfs.sources import Source, open_source
    from ckptfs.sources.early import EarlySource
    from ckptfs.telemetry import NetworkCounters

    counters = NetworkCounters()
    reach = partial(open_source, settings=request.settings, counters=counters, plain_http=request.plain_http)
    source: Source = reach(request.reference)
    if not request.offline and request.reference.digest is None:
        source = EarlySource(source)
    from ckptfs.daemon.serve_image import run

    run(request, source, reach, counters, claim.path, claim.files, announce)
