"""The vocabulary of FakeRegistry: what its script can say, and what its log tells.

Values only; registry_routes.py performs them.
"""

import re
import threading
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """One request: when, what, and with which headers (names in lower case)."""

    time: float
    method: str
    path: str
    query: str
    headers: dict[str, str]
    connection: int

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last byte that were asked for."""
        match = re.match(r"bytes=(\d+)-(\d+)$", self.headers.get("range", ""))
        return (int(match[1]), int(match[2])) if match else None


class Fault:
    """One answer that is not the right one."""


@dataclass(frozen=True)
class Truncate(Fault):
    """Right headers, `after` body bytes, then the connection is closed."""

    after: int


@dataclass(frozen=True)
class Reset(Fault):
    """RST after `after` bytes of the reply's body have been sent, or of the request's body received."""

    after: int = 0


@dataclass(frozen=True)
class Trickle(Fault):
    """The body in portions of `size` bytes, one every `interval` seconds."""

    interval: float
    size: int = 1


@dataclass(frozen=True)
class Paused(Fault):
    """The body up to each of `stops`, where it waits until `go_on` is released once more."""

    stops: tuple[int, ...]
    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


@dataclass(frozen=True)
class Silent(Fault):
    """Accepts the request and says nothing until the registry ends."""


@dataclass(frozen=True)
class Status(Fault):
    """That status; `retry_after` as seconds or as a date; `body` as it is."""

    code: int
    retry_after: int | str | None = None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Flip(Fault):
    """One bit of the body is wrong: bit `bit` of all its bits, counted from the start, modulo their number."""

    bit: int = 12345


@dataclass(frozen=True)
class Full200(Fault):
    """The whole blob with status 200, whatever range was asked for."""


@dataclass(frozen=True)
class WrongRange(Fault):
    """Content-Range and bytes of a place `shift` bytes further on."""

    shift: int = 1


@dataclass(frozen=True)
class TooLong(Fault):
    """`extra` bytes more than asked for, announced by Content-Length."""

    extra: int = 10


@dataclass(frozen=True)
class Claims(Fault):
    """The right body under these headers; a length that is too long ends with the connection."""

    headers: dict[str, str]


@dataclass(frozen=True)
class Endless(Fault):
    """That status and a body without end, in chunks that say that they have `size` bytes."""

    code: int = 200
    size: int = 0x10000


@dataclass(frozen=True)
class Redirect(Fault):
    """307 to the same path of `to` (scheme://host:port), with a signature in the query; `url` in place of both."""

    to: str = ""
    url: str = ""
    life: float = 3600.0  # seconds until the signature expires
    status: int = 307


@dataclass(frozen=True)
class ExpireToken(Fault):
    """Every token that was given out so far is expired from this request on."""
