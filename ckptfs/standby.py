"""The daemon of a mount, forked before the command line is read: two cores import at the same time.

Reading a command line costs 50 ms of imports that the daemon does not need, and the daemon's own take 160 ms. So
`mount` and `restore` fork it first thing. It imports what speaks to registries and waits for a request; if none comes
(a usage error, a mount that is refused) it ends with its parent. Owns the hand-over; what is handed over is the matter
of mounting.py.
"""

import gc
import os
import pickle
import signal
import socket
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

_MESSAGE = 1 << 20  # bytes at most of a request: dozens of mirrors are a few thousand


@dataclass(frozen=True, slots=True)
class Standby:
    """A daemon that waits. It gets one request, or ends when the parent does."""

    pid: int
    channel: socket.socket

    def send(self, request: Any, *descriptors: int) -> None:
        """Pickled, to our own child; the descriptors are its own afterwards."""
        with self.channel:
            socket.send_fds(self.channel, [pickle.dumps(request)], list(descriptors))


_waiting: Standby | None = None


def fork() -> None:
    """Begin a daemon that waits for `take`. To be called while there is one thread, and nothing to be printed yet."""
    global _waiting
    gc.disable()  # imports make much that stays
    import ckptfs.mounting  # noqa: F401  # both need it: once, before the fork

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _wait(theirs)
    theirs.close()
    gc.enable()  # but not in the daemon, before its start-up is over
    _waiting = Standby(pid, ours)


def take() -> Standby | None:
    """The daemon that waits, once; None when there is none, or it has died."""
    global _waiting
    found, _waiting = _waiting, None
    return found


def _wait(channel: socket.socket) -> NoReturn:
    """The daemon until its request comes, and then as whatever the request makes of it."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; we shall see the end of the channel
        import ckptfs.sources.registry  # noqa: F401  # urllib3, before trio: the first request runs while that is imported
        from ckptfs.mounting import serve_from_standby

        data, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE, 2)
        channel.close()
        if data:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            serve_from_standby(pickle.loads(data), *descriptors)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
