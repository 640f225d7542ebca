"""`ckptfs mount` and `umount` as a user sees them: the daemon that stays, the parent that waits until a read works.

The parent forks before anything heavy is imported, or has forked already (standby.py), and only listens on a pipe: the
child resolves, mounts, reads a byte through the kernel and says so. A child that fails says why on the same pipe, and
the parent exits with its code.
"""

import contextlib
import gc
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Self

from ckptfs import standby
from ckptfs.control.client import (
    MountFiles,
    ask,
    ensure_runtime_dir,
    known_mounts,
    locked_names,
    prune_logs,
    read_state,
)
from ckptfs.control.lock import FileLock
from ckptfs.control.ready import notify
from ckptfs.errors import CkptfsError, MountError, UnavailableError, rebuilt, told
from ckptfs.fuse.mountpoint import canonical, detach, mount_at, overlays_over, prepare
from ckptfs.hardening import close_inherited, harden, reuse_memory
from ckptfs.interrupts import lines
from ckptfs.model.oci import Reference
from ckptfs.redaction import log_to_stderr
from ckptfs.settings import Settings, Timeouts

log = logging.getLogger(__name__)

_ENDED_BY = (signal.SIGINT, signal.SIGTERM)
_ENDS = Timeouts().daemon_end
_ALL = "`ckptfs status` without a directory shows all mounts"
_DEAD = "dead; run: ckptfs umount {}"


class MountRequest(NamedTuple):
    """What the command line asked for. `started`: in monotonic seconds, see `command_start`."""

    reference: Reference
    mountpoint: str
    started: float
    view: Literal["checkpoint", "raw", "rootfs"] = "checkpoint"
    cache_dir: Path = Path()
    cache_key: bytes | None = None
    offline: bool = False
    ephemeral: bool = False
    strict: bool = False
    prefetch: bool = True
    background: bool = True
    publish_index: bool = False
    base: Reference | None = None
    allow_other: bool = False
    plain_http: bool = False
    record: Path | None = None
    transfer_rate: float = 0.0  # see engine/reader.py
    stats: Path | None = None
    metrics: tuple[str, int] | None = None  # IP address and port to serve metrics at
    ready_fd: int | None = None
    figures: bool = False  # whether who waits is told a whole status, 2 µs for each chunk; else that it is ready
    settings: Settings = Settings()

    def __repr__(self) -> str:
        return f"MountRequest({self.reference}, {self.mountpoint!r}, …)"  # without `cache_key`


class StoreRequest(NamedTuple):
    """What `ckptfs store` asked for: an additional layer store (store_daemon.py). Names as in a MountRequest."""

    mountpoint: str
    started: float
    cache_dir: Path = Path()
    cache_key: bytes | None = None
    offline: bool = False
    strict: bool = False
    background: bool = True
    allow_other: bool = False
    plain_http: bool = False
    metrics: tuple[str, int] | None = None
    ready_fd: int | None = None
    figures: bool = False
    settings: Settings = Settings()

    def __repr__(self) -> str:
        return f"StoreRequest({self.mountpoint!r}, …)"  # without `cache_key`


Request = MountRequest | StoreRequest
Announce = Callable[[dict[str, Any]], None]  # tells whoever waits that a read has worked; see `MountRequest.figures`


def mount(request: Request) -> dict[str, Any]:
    """Mount in a daemon; returns what it announces once a read has worked, raises what kept it from that."""
    return begin(request).wait()


def begin(request: Request) -> "Pending":
    """Start the daemon of a mount and do not wait: several get ready at the same time."""
    with _Claim(request) as claim:
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
    claim = _Lock(canonical(request.mountpoint), lock)
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
    with _Claim(request) as claim:
        _run(request, claim, announce)


def umount(directory: str, *, force: bool = False) -> None:
    """Stop the daemon of the mount, or detach a dead mount; MountError when there is no ckptfs mount.

    One that other file systems stand on (a container's root on a layer store) is stopped only with `force`.
    """
    path = canonical(directory)
    mounted = mount_at(path)
    if mounted is not None and not mounted.ours:
        how = f"run: umount {shlex.quote(path)}"
        raise MountError(f"{path} is a {mounted.fstype} mount, not one of ckptfs", hint=how)
    if not force and mounted is not None and (above := overlays_over(path)):
        raise MountError(
            f"{path} is in use: it is below {len(above)} overlay mounts, the first on {above[0]}",
            hint="stop the containers and unmount the images that use it, or give --force",
        )
    ensure_runtime_dir()
    lock = _Lock(path)
    lock.open()  # before the daemon is told: it holds this one until it has ended, who mounts here next has another
    with contextlib.closing(lock):
        try:
            ask(lock.files, "stop")
        except UnavailableError:
            if mounted is not None:
                detach(path)
            if lock.take():
                lock.remove()
            elif mounted is not None:  # it was stopped; its files are its own to remove, or of whoever finds it dead
                log.warning("%s is unmounted; its daemon does not answer, and ends once it runs again", path)
            if mounted is None:
                raise MountError(f"nothing is mounted on {path}", hint="`ckptfs status` shows the mounts") from None
            return
        deadline = time.monotonic() + _ENDS
        while lock.current() and not lock.take():
            if time.monotonic() > deadline:
                detach(path)
                return
            time.sleep(0.01)
        lock.remove()


# What a daemon of an earlier version, which still runs, does not say.
_OLDER: dict[str, Any] = {"seconds": 0.0, "background": True, "metrics": None, "layers": [], "roles": {}, "reading": []}


def statuses(directory: str | None, *, detail: bool = False) -> list[dict[str, Any]]:
    """The status of one mount, or of all, dead ones too. `detail`: with layers, roles and what is being read now."""
    if directory is not None:
        return [_status_at(canonical(directory), detail=detail)]
    _sweep()
    found = []
    for files, state in known_mounts():
        try:
            found.append({**_OLDER, **ask(files, "status", detail=detail)})
        except UnavailableError:
            if mount_at(state["mountpoint"]) is None:
                _remove_left(state["mountpoint"])
            else:
                found.append({**state, "state": _DEAD.format(shlex.quote(state["mountpoint"]))})
    return found


def _status_at(path: str, *, detail: bool) -> dict[str, Any]:
    """MountError unless a daemon serves a mount of ours there."""
    files, mounted = MountFiles.of(path), mount_at(path)
    if mounted is None and not files.state.exists():
        raise MountError(f"nothing is mounted on {path}", hint=_ALL)
    if mounted is not None and not mounted.ours:
        raise MountError(f"{path} is a {mounted.fstype} mount, not one of ckptfs", hint=_ALL)
    try:
        return {**_OLDER, **ask(files, "status", detail=detail)}
    except UnavailableError:
        left = mount_at(path)
    if left is None:
        _remove_left(path)
        raise MountError(f"the daemon of {path} is gone")
    if left.user not in (None, os.geteuid()):  # its daemon answers nobody else
        raise MountError(f"{path} is mounted by another user (uid {left.user})", hint="only that user can ask it")
    if not files.lock.exists():  # a daemon that was killed leaves it
        hint = f"ask there; if its daemon is dead, run: ckptfs umount {shlex.quote(path)}"
        raise MountError(f"{path} was mounted in a container, or with another $XDG_RUNTIME_DIR", hint=hint)
    raise MountError(f"the daemon of {path} is " + _DEAD.format(shlex.quote(path)))


def _remove_left(path: str) -> None:
    """What a daemon that is gone has left, unless somebody is about to mount there."""
    with contextlib.suppress(MountError, FileNotFoundError), _Lock(path) as lock:
        lock.remove()


def command_start() -> float:
    """When this command was started, on the monotonic clock (proc_pid_stat(5), field 22; steps of 10 ms)."""
    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


class _Lock(FileLock):
    """The lock of one mount point; held by the daemon as long as it lives. MountError when another has it."""

    def __init__(self, path: str, fd: int = -1) -> None:
        """`fd`: the lock that another process holds for us."""
        self.path = path
        self.files = MountFiles.of(path)
        super().__init__(self.files.lock, fd)

    def __enter__(self) -> Self:
        if not self.acquire():
            raise MountError(f"{self.path} is mounted already", hint=f"run: ckptfs umount {shlex.quote(self.path)}")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()  # a forked daemon holds its own reference

    def remove(self, *, keep_log: bool = True) -> None:
        """The holder has ended: nothing stays behind. Whoever waits for the lock sees that the file is another."""
        if self.current() or not self.files.lock.exists():  # else the files are of who has mounted here since
            self.files.remove(keep_log=keep_log)
            self.files.lock.unlink(missing_ok=True)


class _Claim(_Lock):
    """The right to mount on a directory that can be mounted on; of several at once exactly one gets it."""

    def __init__(self, request: Request) -> None:
        ensure_runtime_dir()
        _sweep()
        prune_logs(request.settings.timeouts.old_log)
        super().__init__(canonical(request.mountpoint))

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            prepare(self.path)
        except BaseException:
            self.remove()
            self.__exit__()
            raise
        return self


def _sweep() -> None:
    """Remove what was left by daemons that were killed, once nothing is mounted there any more: nobody else will."""
    for files in locked_names():
        lock = FileLock(files.lock)
        with contextlib.suppress(OSError):
            lock.open()
            with contextlib.closing(lock):
                if lock.take() and lock.current() and not _is_mounted(files):
                    files.remove()
                    files.lock.unlink()


def _is_mounted(files: MountFiles) -> bool:
    state = read_state(files)  # none before a first read has worked: `umount` finds such a mount without
    return state is not None and mount_at(state["mountpoint"]) is not None


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


def _serve(request: Request, claim: _Lock, writer: int) -> NoReturn:
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
        with contextlib.suppress(MountError), _Lock(self._path) as lock:
            lock.remove()
        self._files.log.unlink(missing_ok=True)


def _run(request: Request, claim: _Lock, announce: Announce, *, logs: bool = False) -> None:
    """Serve the mount in this process. `logs`: there is a log, which is to say what it ended with."""
    gc.disable()  # until start-up is over
    reuse_memory()
    harden()
    ended_well = False
    try:
        if isinstance(request, StoreRequest):
            from ckptfs.store_daemon import run

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


def _serve_image(request: MountRequest, claim: _Lock, announce: Announce) -> None:
    """The first request runs while trio, pyfuse3 … are imported (130 ms)."""
    from ckptfs.sources import Source, open_source
    from ckptfs.sources.early import EarlySource
    from ckptfs.telemetry import NetworkCounters

    counters = NetworkCounters()
    reach = partial(open_source, settings=request.settings, counters=counters, plain_http=request.plain_http)
    source: Source = reach(request.reference)
    if not request.offline and request.reference.digest is None:
        source = EarlySource(source)
    from ckptfs.daemon import run

    run(request, source, reach, counters, claim.path, claim.files, announce)
