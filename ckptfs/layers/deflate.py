"""Inflating from the middle of a deflate stream: from a block's first bit, with the 32 KiB that were decoded before it.

Blocks begin at any bit. The library (zlib-ng) has no call that starts inside a byte, and shifting a megabyte by three
bits costs more than inflating it. So the block is preceded by empty blocks of our own whose length makes up the
missing bits: they decode to nothing and leave the decoder exactly where the real block begins. Measured: the same
1.0 GB/s as from the front, zlib's inflatePrime 0.45 GB/s (docs/adr/0008-gzip-random-access.md).

Pure functions from bytes to bytes; any thread may call them.
"""

import sys
from typing import Any

from zlib_ng import zlib_ng

from ckptfs.errors import FormatError, IntegrityError
from ckptfs.layers.compression import Bytes, ZlibError, gunzipped
from ckptfs.settings import Limits

WINDOW = 32 * 1024  # RFC 1951, 2: the farthest distance
_RAW = -15
_TRAILER = 8  # CRC-32 and size behind the last block of a gzip member, RFC 1952
# Where each byte of a window stands: the low half, the low half inverted, the high half.
_LOW = bytes(range(256)) * (WINDOW // 256)
_LITTLE = int(sys.byteorder == "little")
_MARKS = (_LOW, _LOW[::-1], b"".join(bytes((page,)) * 256 for page in range(WINDOW // 256)))


def inflate_from(window: Bytes, bits: int, data: memoryview, skip: int, length: int, limits: Limits) -> bytes:
    """Bytes [skip, skip + length) of what follows an access point.

    `data` begins with the byte that holds the block's first bit; `bits` is how many of its high bits are the block's, 0
    for all. `window` is what was decoded before, at most 32 KiB. Goes on over the ends of gzip members. IntegrityError
    where there are not so many bytes, or they do not inflate.
    """
    wanted = skip + length
    try:
        decoder, part, data = _started(window, bits, data, wanted)
        parts, wanted = [part], wanted - len(part)
        if wanted and not decoder.eof:
            part = decoder.decompress(data, wanted)
            data, wanted = memoryview(decoder.unused_data), wanted - len(part)
            parts.append(part)
    except ZlibError as error:
        raise IntegrityError(f"a chunk does not inflate ({error})") from None
    if wanted and decoder.eof:
        parts.append(_next_members(data[_TRAILER:], wanted, limits))
        wanted -= len(parts[-1])
    if wanted:
        raise IntegrityError(f"a chunk ends {wanted} bytes early")
    return (parts[0] if len(parts) == 1 else b"".join(parts))[skip:]


def needed_window(window: bytes, bits: int, data: memoryview, length: int) -> bytes:
    """The window with zeros for what the first `length` bytes behind an access point never copy; as short as can be.

    Three windows that tell where each of their bytes stands are inflated from: where the outputs differ, a byte of the
    window was copied, and they say which. Once 32 KiB in a row come from elsewhere, nothing behind them can reach it.
    """
    size = len(window)
    used: set[int] = set()
    runs = [_started(marks[:size], bits, data, WINDOW) for marks in _MARKS]
    outputs = [part for _, part, _ in runs]
    rests: list[memoryview | bytes] = [rest for _, _, rest in runs]
    done = 0
    while done < length:
        for i, (decoder, _, _) in enumerate(runs):
            if len(outputs[i]) < WINDOW and not decoder.eof:
                outputs[i] += decoder.decompress(rests[i], WINDOW - len(outputs[i]))
                rests[i] = decoder.unconsumed_tail
        place, inverted, page = outputs
        if place == inverted:
            break
        marks = bytearray(2 * len(place))
        marks[_LITTLE::2], marks[1 - _LITTLE :: 2] = page, place
        # Other bytes look like one of 128 places each: to keep those too is cheaper than to tell them apart
        used.update(memoryview(marks).cast("H"))
        if len(used) > size - size // 8:
            return window
        done += len(place)
        if len(place) < WINDOW:
            break
        outputs = [b"", b"", b""]
    used = {at for at in used if at < size}
    first, mask = min(used, default=size), bytearray(size)
    for at in used:
        mask[at] = 0xFF
    kept = int.from_bytes(window, "little") & int.from_bytes(mask, "little")
    return kept.to_bytes(size, "little")[first:]


def _started(window: Bytes, bits: int, data: memoryview, most: int) -> tuple[Any, bytes, memoryview]:
    """A decoder that has taken what belongs to the block of the first byte, what came out, and the bytes behind it."""
    decoder = zlib_ng.decompressobj(_RAW, bytes(window)) if window else zlib_ng.decompressobj(_RAW)
    if not bits or not data:
        return decoder, b"", data
    head = _LEAD[8 - bits] | data[0] >> (8 - bits) << _LEAD_BITS[8 - bits]
    part = decoder.decompress(head.to_bytes((_LEAD_BITS[8 - bits] + bits) // 8, "little"), most)
    return decoder, part, data[1:]


def _next_members(data: memoryview, length: int, limits: Limits) -> bytes:
    try:
        return next(gunzipped(iter((data,)), length, limits), b"")
    except FormatError as error:
        raise IntegrityError(f"a chunk does not inflate: {error}") from None


class _BitWriter:
    def __init__(self) -> None:
        self.value = 0
        self.count = 0

    def put(self, value: int, count: int) -> None:
        """The `count` low bits of `value`, lowest first (RFC 1951, 3.1.1)."""
        self.value |= value << self.count
        self.count += count


def _lead(bits: int) -> _BitWriter:
    """Empty blocks that are `bits` bits long, modulo 8."""
    out = _BitWriter()
    if bits % 2:
        _empty_dynamic_block(out)
    while out.count % 8 != bits:
        out.put(0b010, 3)  # not the last, fixed codes
        out.put(0, 7)  # end of block
    return out


def _empty_dynamic_block(out: _BitWriter) -> None:
    """93 bits: odd, which no empty block with fixed codes is (10 bits) nor one that is stored."""
    out.put(0b100, 3)  # not the last, dynamic codes
    out.put(257 - 257, 5)  # literals and lengths: 0 to 256
    out.put(1 - 1, 5)  # distances
    out.put(18 - 4, 4)  # how many lengths of code-length codes follow, in RFC 1951's order, up to that of 1
    lengths = {18: 2, 1: 1, 0: 2}
    for symbol in (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1):
        out.put(lengths.get(symbol, 0), 3)
    for zeros in (138, 118):  # 0 to 255 do not occur
        out.put(0b11, 2)  # 18, a run of zeros
        out.put(zeros - 11, 7)
    out.put(0b0, 1)  # 1: 256 has a code of one bit
    out.put(0b01, 2)  # 0 (code 10, highest bit first): no distance
    out.put(0b0, 1)  # 256, end of block


_LEAD = [_lead(bits).value for bits in range(8)]
_LEAD_BITS = [_lead(bits).count for bits in range(8)]
