"""TCP to whichever address of a name answers first (RFC 8305, Happy Eyeballs).

One address after another, each for the whole time limit, is how urllib3 connects: a name with one that is dark (IPv6
where no route leads out, a dead node of a round robin) costs every connection that limit, and with two of them more
than a mirror's share. Here attempts overlap, and one limit holds for all. Knows no TLS and no HTTP; used by
connections.py.
"""

import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from typing import Any

_DELAY = 0.25  # seconds that an attempt is alone before the next one begins beside it (RFC 8305, section 8)

_Address = tuple[Any, ...]  # an entry of getaddrinfo: family, type, protocol, name, address
_Options = Iterable[tuple[int, int, int | bytes]]


def connect(host: str, port: int, seconds: float, options: _Options = ()) -> socket.socket:
    """A connected socket, with `options` set before it was connected; it does not block.

    socket.gaierror where the name does not resolve, TimeoutError when no address has taken the connection `seconds`
    after that, OSError of the last one when all have refused.
    """
    waiting = deque(_in_turn(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    trying: dict[int, socket.socket] = {}
    poll, code = select.poll(), errno.EADDRNOTAVAIL
    due = time.monotonic()  # when the next attempt is to begin
    end = due + seconds
    try:
        while waiting or trying:
            now = time.monotonic()
            if now >= end:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            if waiting and now >= due:
                try:
                    sock = _begin(waiting.popleft(), options)
                except OSError as error:  # no route, or none of this family
                    code = error.errno or code
                    continue
                trying[sock.fileno()] = sock
                poll.register(sock, select.POLLOUT)
                due = now + _DELAY
            until = min(due, end) if waiting else end
            for fd, _ in poll.poll(max(until - time.monotonic(), 0.0) * 1000):
                if not (refused := trying[fd].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                    return trying.pop(fd)
                poll.unregister(fd)
                trying.pop(fd).close()
                code, due = refused, now  # nothing more is to be waited for
        raise OSError(code, os.strerror(code))
    finally:
        for sock in trying.values():
            sock.close()


def _begin(entry: _Address, options: _Options) -> socket.socket:
    family, kind, protocol, _, address = entry
    sock = socket.socket(family, kind, protocol)
    try:
        for option in options:
            sock.setsockopt(*option)
        sock.setblocking(False)
        sock.connect(address)
    except BlockingIOError:  # EINPROGRESS
        pass
    except BaseException:
        sock.close()
        raise
    return sock


def _in_turn(found: Sequence[_Address]) -> Iterable[_Address]:
    """In the order of the resolver (RFC 6724), but the families by turns, beginning with the first one's."""
    first = [entry for entry in found if entry[0] == found[0][0]]
    others = [entry for entry in found if entry[0] != found[0][0]]
    return (entry for entry in chain.from_iterable(zip_longest(first, others)) if entry is not None)
