"""Blobs of a registry, read in exact ranges: checked headers, resumed bodies, signed URLs kept and re-resolved.

A reader gets the bytes that it asked for or an error; whether they are the right bytes is for the digests above to say.
Made by registry.py, read by engine/ from worker threads.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ckptfs.errors import CkptfsError, IntegrityError, UnavailableError
from ckptfs.model.oci import Descriptor
from ckptfs.settings import MiB
from ckptfs.sources.endpoint import Endpoint
from ckptfs.sources.origin import Reach
from ckptfs.sources.retry import Attempts
from ckptfs.sources.transport import Reply

_WHOLE = 8 * MiB  # a whole blob in place of a range is taken up to this size (200 to a Range request)
_NO_RANGES_FOR = 60.0  # seconds in which a host that ignored Range tries_per_host times is not asked for ranges again
_EXPIRED = (400, 401, 403, 404, 410)  # what storage services answer to a signed URL that is too old
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)\Z")


@dataclass(frozen=True, slots=True)
class _Location:
    """Where a redirect led: a URL of a storage service, mostly signed and short-lived."""

    url: str
    reach: Reach


class RangeSupport:
    """What the blobs of one source have learnt of their server: whether it serves ranges."""

    def __init__(self) -> None:
        self._ignored = 0  # how many answers in a row had no range
        self._until = float("-inf")

    def known_missing(self, now: float) -> bool:
        return now < self._until

    def served(self) -> None:
        self._ignored = 0

    def ignored(self, now: float, tries: int) -> None:
        """Once may be a proxy's slip; `tries` times in a row is how that server is, for a minute."""
        self._ignored += 1
        if self._ignored >= tries:
            self._ignored = 0
            self._until = now + _NO_RANGES_FOR


class RegistryBlob:
    """A model.blob.Blob behind GET /v2/NAME/blobs/DIGEST."""

    def __init__(self, endpoint: Endpoint, descriptor: Descriptor, ranges: RangeSupport) -> None:
        self._endpoint = endpoint
        self._descriptor = descriptor
        self._ranges = ranges
        self._url = endpoint.url(f"blobs/{descriptor.digest}")
        self._location: _Location | None = None

    @property
    def descriptor(self) -> Descriptor:
        return self._descriptor

    @property
    def size(self) -> int:
        return self._descriptor.size

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        return b"".join(self.stream(offset, length, attempt=attempt))

    def stream(self, offset: int, length: int, *, attempt: int = 0) -> Iterator[bytes]:
        """Pieces of at most 128 KiB. UnavailableError after read_deadline without progress."""
        position, end = offset, offset + length
        if offset < 0 or length < 0 or end > self.size:
            raise IntegrityError(f"blob {self._descriptor.digest} has {self.size} bytes, not {end}")
        if attempt:
            self._location = None  # the bytes from there were wrong: let the registry name a place anew
        transport = self._endpoint.transport
        attempts = transport.attempts(transport.settings.timeouts.read_deadline, outlast=True)
        while position < end:
            try:
                with self._open(position, end, attempts) as reply:
                    for piece in self._body(reply, position, end):
                        position += len(piece)
                        attempts.progress(len(piece))
                        yield piece
            except CkptfsError as error:
                self._location = None
                attempts.failed(error)

    def _open(self, first: int, end: int, attempts: Attempts) -> Reply:
        """The reply to a GET of [first, end), with a status that promises a body."""
        whole = first == 0 and end == self.size
        if not whole and self.size > _WHOLE and self._ranges.known_missing(self._endpoint.transport.clock.now()):
            raise self._no_ranges(permanent=True)
        headers = {} if whole else {"Range": f"bytes={first}-{end - 1}"}
        location = self._location
        if location is not None:
            reply = self._endpoint.fetch(location.url, location.reach, attempts, headers)
            if reply.status in (200, 206):
                return reply
            with reply:
                if reply.status not in _EXPIRED:
                    raise self._judge(reply)
                reply.drain()
            self._location = None
        reply, reach = self._endpoint.request(
            "GET", self._url, attempts, what=self._what, expect=(200, 206, 416), headers=headers
        )
        if reply.status == 416:
            with reply:
                raise self._judge(reply)
        self._location = _Location(reply.url, reach) if reach is not None else None
        return reply

    def _judge(self, reply: Reply) -> CkptfsError:
        if reply.status == 416:
            return IntegrityError(
                f"{reply.where}: {self._what} is shorter than its descriptor says ({self.size} bytes)"
            )
        return self._endpoint.judge(reply, self._what)

    def _body(self, reply: Reply, first: int, end: int) -> Iterator[bytes]:
        """The bytes [first, end) out of a 206 with exactly these, or out of a 200 with the whole blob."""
        if (reply.header("Content-Encoding") or "identity").lower() != "identity":
            raise UnavailableError(f"{reply.where}: the body is compressed on the way, which was not asked for")
        if reply.status == 206:
            self._check_range(reply, first, end)
            self._ranges.served()
            yield from reply.pieces(end - first)
            return
        if reply.length is not None and reply.length != self.size:
            raise IntegrityError(f"{reply.where}: {self._what} has {reply.length} bytes, not {self.size}")
        if self.size > _WHOLE and (first, end) != (0, self.size):
            transport = self._endpoint.transport
            self._ranges.ignored(transport.clock.now(), transport.settings.timeouts.tries_per_host)
            raise self._no_ranges()
        at = 0
        for piece in reply.pieces(self.size):
            lo, hi = max(first - at, 0), min(end - at, len(piece))
            at += len(piece)
            if lo < hi:
                yield piece[lo:hi]

    def _check_range(self, reply: Reply, first: int, end: int) -> None:
        match = _CONTENT_RANGE.match((reply.header("Content-Range") or "").strip())
        if match is not None and match[3] not in ("*", str(self.size)):
            raise IntegrityError(f"{reply.where}: {self._what} has {match[3]} bytes, not {self.size}")
        if match is None or (int(match[1]), int(match[2])) != (first, end - 1):
            raise UnavailableError(f"{reply.where}: not the range that was asked for")
        if reply.length is not None and reply.length != end - first:
            raise UnavailableError(f"{reply.where}: {reply.length} bytes in place of {end - first}")

    def _no_ranges(self, *, permanent: bool = False) -> UnavailableError:
        return UnavailableError(
            f"{self._endpoint.name} sends whole blobs in place of ranges",
            hint="such an image can only be pulled whole",
            permanent=permanent,
        )

    @property
    def _what(self) -> str:
        return f"blob {self._descriptor.digest}"
