"""gzip and zstd: streams cut to a grid, and single chunks, all of bounded size.

Streams raise FormatError, chunks IntegrityError (see `Layer.decode`), none of them an error of zlib-ng or
zstandard. Any thread may call the chunk functions.
"""

import threading
from collections.abc import Callable, Iterator
from typing import IO, Literal, cast

import zstandard
from zlib_ng import zlib_ng

from ckptfs.errors import FormatError, IntegrityError, LimitExceeded
from ckptfs.layers.libzstd import Frames, frames
from ckptfs.settings import KiB, Limits

Bytes = bytes | memoryview
Decompress = Callable[[Iterator[Bytes], int, Limits], Iterator[bytes]]

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # behind a byte of 0x50 to 0x5f
_WBITS_GZIP = 31
MAGIC_BYTES = 10
ZlibError: type[Exception] = zlib_ng.error  # type: ignore[assignment]  # its stub says that this is an instance
# zlib-ng copies what it could not use out of its input on every call: small inputs make small copies.
_INFLATE_STEP = 64 * KiB


def sniff(head: Bytes) -> Literal["none", "gzip", "zstd"]:
    """What bytes are compressed with, by their first MAGIC_BYTES. FormatError for xz and bzip2."""
    start = bytes(head[:MAGIC_BYTES])
    if start.startswith(_GZIP):
        return "gzip"
    if start.startswith(_ZSTD) or (start[1:4] == _ZSTD_SKIPPABLE and start[0] & 0xF0 == 0x50):
        return "zstd"
    for found, name in ((start.startswith(b"\xfd7zXZ\0"), "xz"), (start[4:] == b"1AY&SY", "bzip2")):
        if found:
            raise FormatError(f"the layer is compressed with {name}", hint="push it again as gzip, zstd or plain tar")
    return "none"


def copied(pieces: Iterator[Bytes], unit: int, limits: Limits) -> Iterator[bytes]:
    """The bytes themselves, cut to `unit`; the last piece is shorter."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= unit:
            yield bytes(held[:unit])
            del held[:unit]
    if held:
        yield bytes(held)


def gunzipped(pieces: Iterator[Bytes], unit: int, limits: Limits) -> Iterator[bytes]:
    """All members of a gzip stream, cut to `unit`. What follows the last member is ignored, as by gzip(1)."""
    parts: list[bytes] = []
    missing = unit
    inflater = None
    rest = b""  # the first byte of what may be the next member's magic number
    for piece in pieces:
        view = memoryview(piece)
        for low in range(0, len(view), _INFLATE_STEP):
            data: Bytes = view[low : low + _INFLATE_STEP]
            while True:
                if inflater is None:
                    data = rest + bytes(data) if rest else bytes(data).lstrip(b"\0")
                    if len(data) < len(_GZIP):
                        rest = data
                        break
                    rest = b""
                    if not data.startswith(_GZIP):
                        if parts:
                            yield b"".join(parts)
                        return
                    inflater = zlib_ng.decompressobj(wbits=_WBITS_GZIP)
                asked = missing
                try:
                    part = inflater.decompress(data, asked)
                except ZlibError as error:
                    raise FormatError(f"the gzip stream is damaged ({error})") from None
                if part:
                    parts.append(part)
                    missing -= len(part)
                if not missing:
                    yield parts[0] if len(parts) == 1 else b"".join(parts)
                    parts.clear()
                    missing = unit
                if inflater.eof:
                    data, inflater = inflater.unused_data, None
                    continue
                data = inflater.unconsumed_tail
                if not data and len(part) < asked:
                    break
    if inflater is not None:
        raise FormatError("the gzip stream is cut off")
    if parts:
        yield b"".join(parts)


def unzstd(pieces: Iterator[Bytes], unit: int, limits: Limits) -> Iterator[bytes]:
    """All frames of a zstd stream, cut to `unit`; skippable frames are skipped."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=limits.zstd_window_bytes)
    try:
        with decompressor.stream_reader(cast("IO[bytes]", _Pieces(pieces)), read_across_frames=True) as reader:
            while data := reader.read(unit):
                yield data
    except zstandard.ZstdError as error:
        raise _zstd_error(error) from None


class _Pieces:
    """What zstandard wants to read from: `read` may give more or less than asked, b"" at the end."""

    def __init__(self, pieces: Iterator[Bytes]) -> None:
        self._pieces = pieces

    def read(self, _size: int) -> Bytes:
        return next(self._pieces, b"")


def _zstd_error(error: zstandard.ZstdError) -> FormatError:
    if "too much memory" in str(error):
        return LimitExceeded("the zstd stream asks for a larger window than ckptfs accepts")
    return FormatError(f"the zstd stream is damaged ({error})")


DECOMPRESS: dict[str, Decompress] = {"none": copied, "gzip": gunzipped, "zstd": unzstd}


# Chunks.


class _Zstd(threading.local):
    """Contexts of decompression, which are not thread-safe."""

    decompressor: zstandard.ZstdDecompressor | None = None
    frames: Frames | None = None


_zstd = _Zstd()


def unzstd_chunk(data: Bytes, length: int, limits: Limits) -> Bytes:
    """The first `length` bytes that the frames in `data` hold; what follows is not looked at."""
    decompressor = _zstd.decompressor
    if decompressor is None:
        decompressor = _zstd.decompressor = zstandard.ZstdDecompressor(max_window_size=limits.zstd_window_bytes)
        _zstd.frames = frames()
    try:
        # zstandard allocates what a frame declares, whatever is asked for: only after comparing.
        if zstandard.frame_content_size(data) == length:
            return bytes(decompressor.decompress(data))
        found = _zstd.frames.decompress(data, length) if _zstd.frames is not None else None
        if found is not None:
            return found
        # No libzstd; a frame that does not tell its size; or (stargz) one that goes on with the headers of other files.
        with decompressor.stream_reader(data, read_across_frames=True) as reader:
            out: bytes = reader.read(length)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"a zstd chunk does not decompress ({error})") from None
    if len(out) != length:
        raise IntegrityError(f"a zstd chunk ends after {len(out)} of {length} bytes")
    return out


def gunzip_chunk(data: Bytes, skip: int, length: int, limits: Limits) -> Bytes:
    """Bytes [skip, skip + length) of the gzip members in `data`; what follows is not looked at."""
    try:
        whole = next(gunzipped(iter((data,)), skip + length, limits), b"")
    except FormatError as error:
        raise IntegrityError(f"a chunk does not decompress: {error}") from None
    if len(whole) < skip + length:
        raise IntegrityError(f"a gzip chunk ends {skip + length - len(whole)} bytes early")
    return memoryview(whole)[skip:] if skip else whole
