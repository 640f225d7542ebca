"""The daemon of a mount, forked before the command line is read: two cores import at the same time.

Reading a command line costs 50 ms of imports that the daemon does not need, and the daemon's own take 160 ms. So
`mount` and `restore` fork it first thing. It begins to import and waits for a request; if none comes (a usage error, a
mount that is refused) it ends with its parent. Owns the hand-over; what is handed over is the matter of mounting.py.
"""

import gc
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from ckptfs.errors import MountError

_SWITCH = 0.0005  # seconds that imports keep the interpreter from the thread that asks the registry; 5 ms is usual
_MESSAGE = 1 << 20  # bytes at most of a request: dozens of mirrors are a few thousand


class Standby(NamedTuple):
    """A daemon that waits. It gets one request, or ends when the parent does."""

    pid: int
    channel: socket.socket

    def send(self, request: Any, *descriptors: int) -> None:
        """Pickled, to our own child; the descriptors are its own afterwards."""
        with self.channel:
            socket.send_fds(self.channel, [pickle.dumps(request)], list(descriptors))


_waiting: Standby | None = None


def fork(arguments: Sequence[str]) -> None:
    """Begin a daemon that waits for `take`. To be called while there is one thread, and nothing to be printed yet.

    `arguments`: the command's, unread; they tell what is worth being imported before the request comes.
    """
    global _waiting
    gc.disable()  # imports make much that stays
    import ckptfs.daemon.mounting  # noqa: F401  # both need it: once, before the fork

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        pid = start()
    except MountError:  # a mount may be refused anyway, or need no daemon; else it will say so itself
        ours.close()
        theirs.close()
        return
    if pid == 0:
        ours.close()
        _wait(theirs, asks=_asks_a_registry(arguments))
    theirs.close()
    gc.freeze()  # else the interpreter walks through all of it when we exit: 4 ms
    gc.enable()  # but not in the daemon, before its start-up is over
    _waiting = Standby(pid, ours)


def start(*blocked: int) -> int:
    """fork(2), with these signals blocked in the child. MountError where a limit on tasks is reached."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    child = -1
    try:
        child = os.fork()
    except OSError as error:
        how = "see pids.max of the cgroup and `ulimit -u`"
        raise MountError(f"no daemon can be started: {error.strerror}", hint=how) from None
    finally:
        if child:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return child


def take() -> Standby | None:
    """The daemon that waits, once; None when there is none, or it has died."""
    global _waiting
    found, _waiting = _waiting, None
    return found


def dismiss() -> None:
    """End the daemon that waits: for who begins none, or before a fork whose child will, and could not wait for it."""
    if (waiting := take()) is not None:
        waiting.channel.close()
        os.kill(waiting.pid, signal.SIGKILL)
        os.waitpid(waiting.pid, 0)


def _asks_a_registry(arguments: Sequence[str]) -> bool:
    """Whether a tag has to be asked for. A guess: a wrong one costs some milliseconds, no more."""
    return not any("@sha" in word or word.startswith(("oci:", "archive:")) or word == "--offline" for word in arguments)


def _wait(channel: socket.socket, *, asks: bool) -> NoReturn:
    """The daemon until its request comes, and then as whatever the request makes of it."""
    try:
        sys.setswitchinterval(_SWITCH)  # until hardening.settle
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; we shall see the end of the channel
        if asks:
            import ckptfs.sources.registry  # urllib3, before trio: the first request runs while that is imported
        else:
            import ckptfs.daemon.serve_image  # noqa: F401  # what a mount out of the cache needs; a registry when something is missing
        from ckptfs.daemon.mounting import serve_from_standby

        data, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE, 2)
        channel.close()
        if data:
            serve_from_standby(pickle.loads(data), *descriptors)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
