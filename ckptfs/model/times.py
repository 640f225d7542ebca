"""Times of files, in nanoseconds since 1970: how far they may go, and as text.

A tar holds times that RFC 3339, and Python, have no year for. As text such a time is the nearest one that has: the
exact one is in the tar's header and in the image's index.
"""

from datetime import UTC, datetime, timedelta

BILLION = 1_000_000_000
# 2**40 seconds is the year 36812. Real files stay below, hostile ones would overflow the 64-bit time_t of whoever reads
# them.
MOST = (1 << 40) * BILLION
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = ((end.replace(tzinfo=UTC) - _EPOCH) // timedelta(seconds=1) for end in (datetime.min, datetime.max))


def within_reach(nanoseconds: int) -> int:
    """The nearest time that a layer and an index may have."""
    return min(max(nanoseconds, -MOST), MOST)


def as_datetime(seconds: int) -> datetime:
    """In UTC; the nearest one of the years 1 to 9999."""
    return _EPOCH + timedelta(seconds=min(max(seconds, _FIRST), _LAST))


def rfc3339(nanoseconds: int) -> str:
    """In UTC, with as many digits of the second as there are."""
    seconds, rest = divmod(nanoseconds, BILLION)
    fraction = f".{rest:09}".rstrip("0") if rest else ""
    return f"{as_datetime(seconds):%Y-%m-%dT%H:%M:%S}{fraction}Z".rjust(20 + len(fraction), "0")
