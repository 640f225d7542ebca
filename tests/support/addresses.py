"""Names with several addresses, and addresses that are dark."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest


@contextmanager
def dark(address: str, port: int = 0) -> Iterator[int]:
    """A port that answers no SYN, for the queue of its socket is full."""
    with socket.create_server((address, port), backlog=0) as server, ExitStack() as stack:
        place = server.getsockname()
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(place)
        yield place[1]


def resolve(monkeypatch: pytest.MonkeyPatch, name: str, *addresses: str) -> None:
    """From now on the resolver says that `name` is at these IPv4 addresses, in this order."""
    known = socket.getaddrinfo

    def lookup(host: str, port: int, *args: object, **options: object) -> object:
        if host != name:
            return known(host, port, *args, **options)  # type: ignore[arg-type]
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (found, port)) for found in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
