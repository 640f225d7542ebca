"""Staying with a restored container until it ends, or until somebody wants it to end.

Owns the signals of this process from the start of a restore on, the relaying of the container's output, and the two
ways to stop it: its stop signal first, SIGKILL after a while.
"""

import contextlib
import ctypes
import errno
import logging
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from ckptfs.interrupts import heard
from ckptfs.processes import wait_gone
from ckptfs.restore.lazy_pages import LazyPages
from ckptfs.restore.runtimes import children

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
_PIECE = 64 * 1024


def become_subreaper() -> None:
    """Restored processes become our children when criu or the runtime has ended, so we learn how they end."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Relay:
    """What comes in at `source` goes out at `target` (None: nowhere); both are descriptors.

    Never waits, though the target may be one that blocks: it is shared with whoever started us, so it stays as it is.
    """

    def __init__(self, source: int, target: int | None) -> None:
        self._source = source
        self._target = target
        self._rest = memoryview(b"")  # what is yet to be passed on

    @property
    def wants(self) -> tuple[int, int]:
        """The descriptor, and what of it poll(2) must see, before `pump` is to be called."""
        if self._target is not None and self._rest:
            return self._target, select.POLLOUT
        return self._source, select.POLLIN

    def pump(self) -> bool:
        """One read or one write; False at the end."""
        if self._target is not None and self._rest:
            self._write(self._target)
            return True
        try:
            data = os.read(self._source, _PIECE)
        except OSError:  # EIO: the last holder of a terminal is gone
            return False
        if self._target is not None:
            self._rest = memoryview(data)
        return bool(data)

    def drain(self, patience: float) -> None:
        """Pass on what was said until now, unless nobody takes any of it for `patience` seconds."""
        while _ready([self.wants], patience * 1000 if self._rest else 0) and self.pump():
            pass

    def _write(self, target: int) -> None:
        try:
            # What poll(2) calls writable takes this much without blocking: pipe(7), "PIPE_BUF".
            self._rest = self._rest[os.write(target, self._rest[: select.PIPE_BUF]) :]
        except BlockingIOError:
            pass  # another writer was faster
        except OSError as error:  # the container goes on, heard or not
            self._target, self._rest = None, memoryview(b"")
            if error.errno != errno.EPIPE:  # that one: whoever watched has left
                log.warning("what the container says is no longer passed on: %s", error.strerror)


class Watch:
    """Waits for the container `pid`. `stop_signal` is its own; `patience` are the seconds from that to SIGKILL.

    `daemons`: children of this process that are somebody else's to wait for.
    """

    def __init__(
        self, pid: int, stop_signal: int, patience: float, relays: list[Relay], daemons: Collection[int] = ()
    ) -> None:
        self._pid = pid
        self._keep = {pid, *daemons}
        self._stop_signal = stop_signal
        self._patience = patience
        self._relays = relays
        self._signals: list[int] = []
        self._asked = False  # it has got its stop signal
        self._kill_at = math.inf  # by the monotonic clock

    def run(self, lazy: LazyPages | None, running: Callable[[], None], resident: Callable[[], None]) -> int | None:
        """Until the container has ended; returns its exit code, 128 + N for signal N, None where nobody can know.

        `running` is called once signals stop the container instead of this process, `resident` when all pages are in.
        UnavailableError when they cannot be had.
        """
        relays = list(self._relays)
        with contextlib.ExitStack() as stack:
            container = stack.enter_context(_pidfd(self._pid))
            wakeup = stack.enter_context(_collected(self._signals, signal.SIGCHLD))
            wanted = {container, wakeup}
            daemon = stack.enter_context(_pidfd(lazy.pid)) if lazy is not None else -1
            if lazy is not None:
                wanted.add(daemon)
            running()
            while True:
                turns = {relay.wants[0]: relay for relay in relays}  # at a target that they share, one at a time
                events = [(one, select.POLLIN) for one in wanted] + [relay.wants for relay in turns.values()]
                ready = _ready(events, self._patience_left())
                for descriptor in ready & turns.keys():
                    if not turns[descriptor].pump():
                        relays.remove(turns[descriptor])
                if container in ready:
                    break
                if daemon in ready and lazy is not None:
                    wanted.remove(daemon)
                    lazy.require()
                    resident()
                if wakeup in ready:
                    os.read(wakeup, _PIECE)
                    self._reap()
                self._stop(container)
            for relay in relays:
                relay.drain(self._patience)
        return _exit_code(self._pid)

    def _reap(self) -> None:
        """Orphans of the container that have ended: whoever it was that got them before, here it is us."""
        for pid in children(os.getpid()) - self._keep:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _stop(self, container: int) -> None:
        """What signals ask for: the container's own signal, SIGKILL after a while, or at once when a second one comes.

        Never waits: a container that has more to say while it ends must find somebody who listens.
        """
        if not self._signals:
            return
        if not self._asked:
            self._asked = True
            self._kill_at = time.monotonic() + self._patience
            _send(container, self._stop_signal)
        if len(self._signals) > 1 or time.monotonic() >= self._kill_at:
            self._kill_at = math.inf
            _send(container, signal.SIGKILL)

    def _patience_left(self) -> float | None:
        """Milliseconds until SIGKILL is due; None: it is not."""
        left = self._kill_at - time.monotonic()
        return None if left == math.inf else max(left, 0.0) * 1000


def wait_resident(pid: int, lazy: LazyPages) -> bool:
    """Until the container has all its pages, or has ended without; False when a signal came first.

    UnavailableError when its pages cannot be had.
    """
    signals: list[int] = []
    with contextlib.ExitStack() as stack:
        container = stack.enter_context(_pidfd(pid))
        daemon = stack.enter_context(_pidfd(lazy.pid))
        wanted = (container, daemon, stack.enter_context(_collected(signals)))
        ready = _ready([(one, select.POLLIN) for one in wanted], None)
        if daemon in ready and container not in ready:
            lazy.require()
    return not signals


class Console:
    """Where a runtime sends the terminal of a container that has one: a socket in `directory`.

    `path` is for the runtime: addresses of sockets have 107 bytes (unix(7)), however deep the directory lies.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._directory}/console")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        self._master = -1

    def master(self) -> int:
        """The terminal's other end; to be called when the runtime has restored."""
        sender, _ = self._listener.accept()
        with sender:
            _, descriptors, _, _ = socket.recv_fds(sender, 4096, 1)
        self._master = descriptors[0]
        return self._master

    def close(self) -> None:
        self._listener.close()
        os.close(self._directory)
        if self._master != -1:
            os.close(self._master)


def end_orphans(known: set[int]) -> None:
    """Kill what is left of a restored tree, also of one half restored: all our children but the `known` ones."""
    while orphans := children(os.getpid()) - known:
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_gone(pid, 5.0)


@contextlib.contextmanager
def _collected(signals: list[int], *waking: int) -> Iterator[int]:
    """Signals go into the list instead of interrupting; yields a descriptor that is readable when there are some.

    `waking` are others by which it gets readable, and nothing else.
    """
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda n, _: signals.append(n)) for number in heard(*SIGNALS)}
    before |= {number: signal.signal(number, lambda *_: None) for number in waking}
    try:
        yield reader
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(reader)
        os.close(writer)


def _ready(wanted: Iterable[tuple[int, int]], milliseconds: float | None) -> set[int]:
    """Which of these (descriptor, event of poll(2)) are ready; None waits for ever. Broken ones are ready, too."""
    poll = select.poll()
    for descriptor, event in wanted:
        poll.register(descriptor, event)
    return {descriptor for descriptor, _ in poll.poll(milliseconds)}


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    """A descriptor that is ready when the process has ended; it may have, and an engine may have reaped it."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        descriptor, writer = os.pipe()
        os.close(writer)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _send(container: int, number: int) -> None:
    """To a process by its descriptor: its number may be another's by now."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(container, number)


def _exit_code(pid: int) -> int | None:
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return None
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
