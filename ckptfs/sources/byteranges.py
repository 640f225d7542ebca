"""multipart/byteranges: the reply to a request for several ranges of a blob (RFC 9110, sections 14.2 and 14.6).

Only what was asked for, in the order in which it was asked for, is taken: servers may reorder and join ranges, and who
does so is asked for one at a time. Pure: bytes in, places out. Used by blobs.py.
"""

import re
from collections.abc import Sequence

from ckptfs.errors import FormatError

Range = tuple[int, int]  # [start, end)

_BOUNDARY = re.compile(
    r"""multipart/byteranges\s*;\s*boundary="?([\w'()+,./:=? -]{1,70})"?\s*\Z""", re.ASCII | re.IGNORECASE
)
_PLACE = re.compile(rb"content-range:[ \t]*bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)[ \t]*\Z", re.IGNORECASE)
_HEAD = 1024  # bytes of delimiter and headers of one part; docker-registry's are 170


def header(ranges: Sequence[Range]) -> str:
    """The value of a Range header."""
    return "bytes=" + ",".join(f"{start}-{end - 1}" for start, end in ranges)


def boundary_of(content_type: str | None) -> bytes | None:
    """What parts the parts; None where the body has none."""
    match = _BOUNDARY.match((content_type or "").strip())
    return match[1].encode() if match else None


def most_bytes(ranges: Sequence[Range]) -> int:
    """How long a reply with these parts may be."""
    return sum(end - start for start, end in ranges) + (len(ranges) + 1) * _HEAD


def parts(body: bytes, boundary: bytes, ranges: Sequence[Range], size: int) -> list[tuple[int, memoryview]]:
    """(start, bytes) of each range, of a blob of `size` bytes. FormatError where the body is anything else."""
    view, at, delimiter = memoryview(body), 0, b"--" + boundary
    found = []
    for start, end in ranges:
        head = body.find(b"\r\n\r\n", at, at + _HEAD)
        lines = body[at : max(head, at)].removeprefix(b"\r\n").split(b"\r\n")
        places = [match for line in lines[1:] if (match := _PLACE.match(line))]
        if lines[0].rstrip(b" \t") != delimiter or len(places) != 1:
            raise FormatError(f"no part begins at byte {at}")
        first, last, total = places[0].groups()
        if (int(first), int(last)) != (start, end - 1) or total not in (b"*", b"%d" % size):
            raise FormatError(f"the part at byte {at} is not the range that was asked for")
        at = head + 4 + end - start
        found.append((start, view[head + 4 : at]))
    if body[at : at + len(delimiter) + 4] != b"\r\n" + delimiter + b"--":
        raise FormatError("the last part does not end where it should")
    return found
