"""Finding access points in a gzip stream while it runs.

A chunk of the decoded stream can be had by itself when the block is known that it begins in, and the 32 KiB decoded
before that block. This module inflates with zlib itself, through ctypes: its inflate() can stop between blocks
(Z_BLOCK), which no Python module offers; the choice is measured in docs/adr/0008-gzip-random-access.md. Where the
system has no libz there are no points, and everything else works. Called by stream.py; deflate.py reads from points.
"""

import ctypes
from collections.abc import Iterator
from functools import lru_cache

from ckptfs.errors import FormatError
from ckptfs.layers.compression import Bytes
from ckptfs.layers.deflate import WINDOW, needed_window
from ckptfs.model.layer_index import AccessPoint, GzipAccess, pack_window
from ckptfs.settings import Limits

_Z_BLOCK, _Z_OK, _Z_STREAM_END, _Z_BUF_ERROR = 5, 0, 1, -5
_WBITS_GZIP = 31
_BETWEEN_BLOCKS, _LAST_BLOCK, _UNUSED_BITS = 128, 64, 7  # in z_stream.data_type, zlib.h
_GZIP = b"\x1f\x8b"


class _Stream(ctypes.Structure):
    """z_stream; the same since zlib 1.0."""

    _fields_ = (
        ("next_in", ctypes.c_char_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


@lru_cache(maxsize=1)
def _zlib() -> ctypes.CDLL | None:
    """The system's zlib; None where there is none, or one without inflateGetDictionary (before 1.2.7.1)."""
    try:
        library = ctypes.CDLL("libz.so.1")
        library.zlibVersion.restype = ctypes.c_char_p
        return library if library.inflateGetDictionary else None
    except (OSError, AttributeError):
        return None


def can_find_points() -> bool:
    return _zlib() is not None


class PointFinder:
    """One pass over a gzip stream. `inflated` is as `compression.gunzipped`; afterwards `access` tells the points."""

    def __init__(self, *, sparse: bool = False) -> None:
        """`sparse`: windows keep only what is used of them. A tenth of the size, at five times the price."""
        self._sparse = sparse
        self._points: list[AccessPoint] = []
        self._ends: list[int] = []
        self._complete = False
        self._open: AccessPoint | None = None  # the last one, while chunks may still be read from it
        self._decoded = 0  # how far they reach

    @property
    def access(self) -> GzipAccess | None:
        """How to get each chunk; None when the pass did not end, or blocks are too large for random access."""
        return GzipAccess(tuple(self._points), tuple(self._ends)) if self._complete and self._ends else None

    def inflated(self, pieces: Iterator[Bytes], unit: int, limits: Limits) -> Iterator[bytes]:
        """All members of a gzip stream, cut to `unit`. What follows the last member is ignored, as by gzip(1)."""
        inflater = _Inflater(unit, hold=self._sparse)
        good = True
        try:
            for data in inflater.run(pieces):
                good = good and self._note(inflater, len(data), unit, limits)
                if not good:
                    inflater.release(inflater.consumed)
                yield data
            if good:
                self._close(inflater)
        finally:
            inflater.close()
        self._complete = good

    def _note(self, inflater: "_Inflater", length: int, unit: int, limits: Limits) -> bool:
        """The chunk that has just become whole; whether it can be had by itself at a bearable price."""
        start = len(self._ends) * unit
        point = inflater.before  # the last one at or before the chunk's first byte
        inflater.before = inflater.latest
        if self._open is None or self._open.position != point.position:
            self._close(inflater)
            self._open = point
            inflater.release(point.offset)
        self._ends.append(inflater.consumed)
        self._decoded = start + length - point.position
        return self._decoded <= limits.chunk_bytes and inflater.consumed - point.offset <= limits.chunk_bytes

    def _close(self, inflater: "_Inflater") -> None:
        """No further chunk is read from the last point."""
        point, self._open = self._open, None
        if point is not None:
            window = point.window
            if self._sparse and window:
                encoded = inflater.held(point.offset, self._ends[-1])
                window = needed_window(window, point.bits, encoded, self._decoded)
            self._points.append(point._replace(window=pack_window(window)))


class _Inflater:
    """zlib's inflate over pieces; knows where the last block began."""

    def __init__(self, unit: int, *, hold: bool = False) -> None:
        library = _zlib()
        if library is None:
            raise FormatError("this system has no zlib")
        self._library = library
        self._unit = unit
        self._stream = _Stream()
        self._stream_at = ctypes.byref(self._stream)
        self._out = ctypes.create_string_buffer(unit)
        self._window = ctypes.create_string_buffer(WINDOW)
        self._arrived = 0  # bytes of the blob, up to the end of the piece at hand
        self._hold = hold
        self._held = bytearray()  # the last bytes of the blob, from `_held_from` on
        self._held_from = 0
        self._decoded = 0
        self._open = False
        self.latest = AccessPoint(0, 0, 0, b"")
        self.before = self.latest

    @property
    def consumed(self) -> int:
        return self._arrived - int(self._stream.avail_in)

    def close(self) -> None:
        if self._open:
            self._library.inflateEnd(self._stream_at)
            self._open = False

    def held(self, start: int, end: int) -> memoryview:
        """Bytes of the blob that have not been released."""
        return memoryview(bytes(self._held[start - self._held_from : end - self._held_from]))

    def release(self, offset: int) -> None:
        """Bytes before `offset` will not be asked for."""
        del self._held[: offset - self._held_from]
        self._held_from = offset

    def run(self, pieces: Iterator[Bytes]) -> Iterator[bytes]:
        stream = self._stream
        self._empty()
        head = b""  # what may be the next member's magic number
        inside = False
        for piece in pieces:
            data = bytes(piece)
            self._arrived += len(data)
            if self._hold:
                self._held += data
            while True:
                if not inside:
                    data = head + data if head else data.lstrip(b"\0")
                    if len(data) < len(_GZIP):
                        head = data
                        break
                    head = b""
                    if not data.startswith(_GZIP):
                        self._arrived -= len(data)  # rubbish behind the end counts for nothing
                        yield from self._rest()
                        return
                    self._begin()
                    inside = True
                stream.next_in, stream.avail_in = data, len(data)
                full = True  # zlib may hold output back that found no room
                while stream.avail_in or full:
                    inside = self._step()
                    full = not stream.avail_out
                    if full:
                        yield self._out.raw
                        self._empty()
                    if not inside:
                        break
                rest = int(stream.avail_in)
                if inside or not rest:
                    break
                data = data[-rest:]
                stream.avail_in = 0
        if inside:
            raise FormatError("the gzip stream is cut off")
        self._arrived -= len(head)
        yield from self._rest()

    def _rest(self) -> Iterator[bytes]:
        self._stream.avail_in = 0
        length = self._unit - int(self._stream.avail_out)
        if length:
            yield ctypes.string_at(self._out, length)

    def _begin(self) -> None:
        library = self._library
        if self._open:
            code = library.inflateReset(self._stream_at)
        else:
            size = ctypes.sizeof(_Stream)
            code = library.inflateInit2_(self._stream_at, _WBITS_GZIP, library.zlibVersion(), size)
            self._open = code == _Z_OK
        if code != _Z_OK:
            raise FormatError(f"zlib cannot begin ({code})")

    def _empty(self) -> None:
        self._stream.next_out = ctypes.addressof(self._out)
        self._stream.avail_out = self._unit

    def _step(self) -> bool:
        """Inflate up to the next block, the end of input or output; False at the end of a member."""
        stream = self._stream
        room = int(stream.avail_out)
        code = self._library.inflate(self._stream_at, _Z_BLOCK)
        self._decoded += room - int(stream.avail_out)
        if code == _Z_STREAM_END:
            return False
        if code == _Z_BUF_ERROR and not stream.avail_in:
            return True
        if code != _Z_OK:
            raise FormatError(f"the gzip stream is damaged ({(stream.msg or b'zlib error').decode()})")
        kind = int(stream.data_type)
        if kind & _BETWEEN_BLOCKS and not kind & _LAST_BLOCK:
            self._remember(kind & _UNUSED_BITS)
        return True

    def _remember(self, bits: int) -> None:
        length = ctypes.c_uint(0)
        self._library.inflateGetDictionary(self._stream_at, self._window, ctypes.byref(length))
        window = ctypes.string_at(self._window, length.value)
        self.latest = AccessPoint(self.consumed - (1 if bits else 0), bits, self._decoded, window)
        if self._decoded % self._unit == 0 and not self._pending_output():
            self.before = self.latest

    def _pending_output(self) -> bool:
        return int(self._stream.avail_out) != self._unit
