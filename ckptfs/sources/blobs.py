"""Blobs of a registry, read in exact ranges: checked headers, resumed bodies, signed URLs kept and re-resolved.

A reader gets the bytes that it asked for or an error; whether they are the right bytes is for the digests above to say.
Where a blob can be had at several hosts, mirrors.py says who is asked. Made by registry.py, read by engine/ from worker
threads.
"""

import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ckptfs.errors import CkptfsError, IntegrityError, UnavailableError
from ckptfs.model.blob import DescribedBlob
from ckptfs.model.oci import Descriptor
from ckptfs.settings import MiB
from ckptfs.sources import byteranges
from ckptfs.sources.endpoint import REDIRECTS, Endpoint
from ckptfs.sources.mirrors import Host, Rotation, StillFilling
from ckptfs.sources.origin import Reach
from ckptfs.sources.pull_through import NoRanges, RangeGate
from ckptfs.sources.retry import Attempts, NoAnswer
from ckptfs.sources.transport import Reply, Transport

log = logging.getLogger(__name__)

_WHOLE = 8 * MiB  # a whole blob in place of a range is taken up to this size (200 to a Range request)
# What storage services answer where a blob is no longer to be had: a signature is too old, or it has moved on
_STALE = (*REDIRECTS, 400, 401, 403, 404, 410)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)\Z")
_MANY = 24  # ranges of one request: they are the working set's first, and a wave of them shares the connections
_ELSEWHERE = 400  # while a mirror still fetches a blob, one part in so many of it may be taken from elsewhere
_COPY = "copy the image to where parts of it can be read: skopeo copy docker://REF oci:DIR:1"


class _Location(NamedTuple):
    """Where a redirect led: a URL of a storage service, mostly signed and short-lived."""

    url: str
    reach: Reach


class RegistryBlob(DescribedBlob):
    """A model.blob.Blob behind GET /v2/NAME/blobs/DIGEST of `hosts`, of which the first that is well is asked."""

    def __init__(self, hosts: Sequence[Host], transport: Transport, descriptor: Descriptor) -> None:
        super().__init__(descriptor)
        self._transport = transport
        self._copies = {host: _Copy(host, transport, descriptor, mirror=host is not hosts[-1]) for host in hosts}
        self._served: deque[tuple[int, int, Host]] = deque(maxlen=64)  # which host the last ranges came from
        self._spare = descriptor.size // _ELSEWHERE
        self._lock = threading.Lock()

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        return b"".join(self.stream(offset, length, attempt=attempt))

    def stream(self, offset: int, length: int, *, attempt: int = 0, patient: bool = False) -> Iterator[bytes]:
        """Pieces of at most 1 MiB. UnavailableError after read_deadline without progress."""
        position, end = offset, offset + length
        if offset < 0 or length < 0 or end > self.size:
            raise IntegrityError(f"blob {self._descriptor.digest} has {self.size} bytes, not {end}")
        transport = self._transport
        deadline = transport.settings.timeouts.read_deadline
        liar = self._distrust(offset, end) if attempt else None
        rotation = Rotation(list(self._copies), transport, deadline, outlast=True, last_resort=liar)
        while position < end:
            route = rotation.choose()
            copy = self._copies[route.host]
            elsewhere = self._take_spare if rotation.alternatives(route) else None
            first = position
            try:
                for piece in copy.pieces(position, end, route.attempts, elsewhere, patient=patient):
                    position += len(piece)
                    rotation.progress(len(piece))
                    yield piece
                rotation.worked(route)
            except CkptfsError as error:
                copy.forget_location()
                rotation.failed(route, error)
            finally:
                self._served.append((first, position, route.host))

    @property
    def ranges_at_once(self) -> int:
        return _MANY if self._host_of_many() is not None else 1

    def stream_ranges(
        self, ranges: Sequence[tuple[int, int]], *, attempt: int = 0, patient: bool = False
    ) -> Iterator[tuple[int, bytes | memoryview]]:
        """With one request where that is possible: docker-registry reads 4 MiB for each, however small, in 5 ms.

        What cannot be had in that way is asked for range by range, with all that `stream` does about faults.
        """
        done = 0
        host = self._host_of_many() if 1 < len(ranges) <= _MANY and not attempt else None
        if host is not None:
            try:
                for start, data in self._copies[host].several(ranges):
                    self._served.append((start, start + len(data), host))
                    yield start, data
                    done += 1
            except NoAnswer:  # says something of the host, nothing of several ranges
                self._transport.standing.failed(host.netloc, self._transport.clock.now())
            except CkptfsError as error:
                log.info("%s; one range at a time", error)
                host.without_many_ranges(self._transport.clock.now())
        yield from super().stream_ranges(ranges[done:], attempt=attempt, patient=patient)

    def _host_of_many(self) -> Host | None:
        """Who may be asked for several ranges: the host that sent the last one, if it is well or the only one."""
        now, alone = self._transport.clock.now(), len(self._copies) == 1
        for first, last, host in reversed(list(self._served)):
            if first < last:
                well = alone or not self._transport.standing.avoided(host.netloc, now)
                return host if well and host.has_many_ranges(now) else None
        return None

    def _distrust(self, start: int, end: int) -> Host | None:
        """The bytes [start, end) were wrong: note it of the host that they came from."""
        for copy in self._copies.values():
            copy.forget_location()  # let the registry name a place anew
        served = [host for first, last, host in list(self._served) if first < end and start < last]
        if not served:
            return None
        log.warning(
            "bytes %d-%d of %s were wrong; %s sent them", start, end - 1, self._descriptor.digest, served[-1].netloc
        )
        self._transport.standing.lied(served[-1].netloc, self._transport.clock.now())
        return served[-1]

    def _take_spare(self, count: int) -> bool:
        """Whether `count` bytes may be had elsewhere while a mirror fetches the blob."""
        with self._lock:
            granted = count <= self._spare
            self._spare -= count if granted else 0
            return granted


class _Copy:
    """The blob at one host; one try at a time."""

    def __init__(self, host: Host, transport: Transport, descriptor: Descriptor, *, mirror: bool) -> None:
        self._host = host
        self._transport = transport
        self._clock = transport.clock
        self._descriptor = descriptor
        self._location: _Location | None = None
        self._gate = RangeGate(transport, descriptor.size, ask_first=mirror)

    def forget_location(self) -> None:
        self._location = None

    def pieces(
        self,
        first: int,
        end: int,
        attempts: Attempts,
        elsewhere: Callable[[int], bool] | None,
        *,
        patient: bool,
    ) -> Iterator[bytes]:
        """The bytes [first, end).

        A host that sends the whole of a large blob in place of a range may be a pull-through mirror that has begun to
        fetch it: it is asked again until it has. StillFilling where `elsewhere` lets these bytes be had elsewhere.
        """
        ranges = self._needs_ranges(first, end)
        while True:
            if ranges and not self._await_ranges(
                first, attempts, lambda: elsewhere is not None and elsewhere(end - first)
            ):
                raise StillFilling(f"{self._host.place.host} is still fetching {self._what}")
            with self._host.ask(lambda endpoint: self._open(endpoint, [(first, end)], attempts)) as reply:
                if not self._whole_for_a_range(reply, first, end):
                    yield from self._body(reply, first, end, patient=patient)
                    return
            self._gate.closed()

    def _await_ranges(self, offset: int, attempts: Attempts, leave: Callable[[], bool]) -> bool:
        """False if `leave` says so before the host has ranges of the blob."""
        host = self._host
        if host.has_ranges(self._clock.now()):
            try:
                return self._gate.wait(lambda: self._has_ranges(offset, attempts), leave)
            except NoRanges:
                host.without_ranges(self._clock.now())
        raise NoRanges(f"{host.place.host} sends whole blobs in place of ranges", hint=_COPY, permanent=True) from None

    def _has_ranges(self, offset: int, attempts: Attempts) -> bool:
        """Ask for one byte; an answer with more is not received."""
        wanted = [(offset, offset + 1)]
        with self._host.ask(lambda endpoint: self._open(endpoint, wanted, attempts, probe=True)) as reply:
            if self._whole_for_a_range(reply, offset, offset + 1):
                return False
            return bool(b"".join(self._body(reply, offset, offset + 1)))

    def several(self, ranges: Sequence[tuple[int, int]]) -> Sequence[tuple[int, memoryview]]:
        """All of the ranges with one request, or an error: there is one try, and no part of an answer is taken."""
        attempts = self._transport.attempts(self._transport.settings.timeouts.read_deadline)
        with self._host.ask(lambda endpoint: self._open(endpoint, ranges, attempts)) as reply:
            self._refuse_encoded(reply)
            boundary = byteranges.boundary_of(reply.header("Content-Type")) if reply.status == 206 else None
            if boundary is None:
                raise UnavailableError(f"{reply.where}: not the ranges that were asked for")
            body = reply.read(byteranges.most_bytes(ranges), "reply")
        return byteranges.parts(body, boundary, ranges, self._size)

    def _open(
        self, endpoint: Endpoint, ranges: Sequence[tuple[int, int]], attempts: Attempts, *, probe: bool = False
    ) -> Reply:
        """The reply to a GET of these ranges, with a status that promises a body."""
        headers = {} if ranges == [(0, self._size)] else {"Range": byteranges.header(ranges)}
        location = self._location
        if location is not None:
            reply = endpoint.fetch(location.url, location.reach, attempts, headers, narrow=probe)
            if reply.status in (200, 206):
                return reply
            with reply:
                if reply.status not in _STALE:
                    raise self._judge(reply)
                reply.drain()
            self._location = None
        url = endpoint.url(f"blobs/{self._descriptor.digest}")
        reply, reach = endpoint.request("GET", url, attempts, what=self._what, expect=(200, 206, 416), headers=headers)
        if reply.status == 416:
            with reply:
                raise self._judge(reply)
        self._location = _Location(reply.url, reach) if reach is not None else None
        return reply

    def _whole_for_a_range(self, reply: Reply, first: int, end: int) -> bool:
        """Whether all of a blob is coming that is too large to be taken for a part of it."""
        if reply.status == 206 or (reply.header("Content-Encoding") or "identity").lower() != "identity":
            return False
        if reply.length is not None and reply.length != self._size:
            raise IntegrityError(f"{reply.where}: {self._what} has {reply.length} bytes, not {self._size}")
        return self._needs_ranges(first, end)

    def _needs_ranges(self, first: int, end: int) -> bool:
        return self._size > _WHOLE and (first, end) != (0, self._size)

    def _judge(self, reply: Reply) -> CkptfsError:
        if reply.status == 416:
            return IntegrityError(
                f"{reply.where}: {self._what} is shorter than its descriptor says ({self._size} bytes)"
            )
        return self._host.endpoint.judge(reply, self._what)

    def _body(self, reply: Reply, first: int, end: int, *, patient: bool = False) -> Iterator[bytes]:
        """The bytes [first, end) out of a 206 with exactly these, or out of a 200 with the whole blob."""
        self._refuse_encoded(reply)
        if reply.status == 206:
            self._check_range(reply, first, end)
            yield from reply.pieces(end - first, patient=patient)
            return
        at = 0
        for piece in reply.pieces(self._size):
            lo, hi = max(first - at, 0), min(end - at, len(piece))
            at += len(piece)
            if lo < hi:
                yield piece[lo:hi]

    def _refuse_encoded(self, reply: Reply) -> None:
        if (reply.header("Content-Encoding") or "identity").lower() != "identity":
            raise UnavailableError(f"{reply.where}: the body is compressed on the way, which was not asked for")

    def _check_range(self, reply: Reply, first: int, end: int) -> None:
        match = _CONTENT_RANGE.match((reply.header("Content-Range") or "").strip())
        if match is not None and match[3] not in ("*", str(self._size)):
            raise IntegrityError(f"{reply.where}: {self._what} has {match[3]} bytes, not {self._size}")
        if match is None or (int(match[1]), int(match[2])) != (first, end - 1):
            raise UnavailableError(f"{reply.where}: not the range that was asked for")
        if reply.length is not None and reply.length != end - first:
            raise UnavailableError(f"{reply.where}: {reply.length} bytes in place of {end - first}")

    @property
    def _size(self) -> int:
        return self._descriptor.size

    @property
    def _what(self) -> str:
        return f"blob {self._descriptor.digest}"
