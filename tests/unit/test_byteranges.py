"""Replies with several ranges: what servers send, and all that is not what was asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import FormatError
from ckptfs.sources.byteranges import boundary_of, header, most_bytes, parts

DATA = bytes(range(256)) * 8
RANGES = [(0, 10), (100, 400), (2047, 2048)]


def body(
    ranges: list[tuple[int, int]] = RANGES, *, boundary: str = "x", size: str = "2048", head: str = "", end: str = "--"
) -> bytes:
    """As Go's net/http writes it."""
    out = b""
    for start, stop in ranges:
        lines = [f"--{boundary}", f"Content-Range: bytes {start}-{stop - 1}/{size}", *([head] if head else []), "", ""]
        out += "\r\n".join(["", *lines]).encode() + DATA[start:stop]
    return out.removeprefix(b"\r\n") + f"\r\n--{boundary}{end}\r\n".encode()


def found(raw: bytes) -> list[tuple[int, bytes]]:
    return [(start, bytes(data)) for start, data in parts(raw, b"x", RANGES, len(DATA))]


@pytest.mark.parametrize(
    "raw",
    [
        body(),
        body(head="Content-Type: application/octet-stream"),
        body(size="*"),
        b"\r\n" + body(),  # nginx and Apache begin so
        body().replace(b"Content-Range", b"content-range"),
        body().replace(b"--x\r\n", b"--x \r\n"),
    ],
)
def test_what_servers_send(raw: bytes) -> None:
    assert found(raw) == [(start, DATA[start:end]) for start, end in RANGES]
    assert len(raw) <= most_bytes(RANGES)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        body()[:-6],
        body()[:300],
        body(RANGES[:2]),
        body([RANGES[1], RANGES[0], RANGES[2]]),
        body([(0, 400), (2047, 2048)]),  # two joined
        body([*RANGES, (5, 6)]),
        body(boundary="y"),
        body(size="2049"),
        body(end=""),
        body(head="Content-Range: bytes 0-9/2048"),
        body(head="X: " + "y" * 2000),
        b"preamble\r\n" + body(),
        body().replace(b"Content-Range", b"Content-Rage"),
        body().replace(b"bytes 0-9/", b"bytes 0-10/"),
        body().replace(b"bytes 0-9/", b"bytes 0-" + b"9" * 30 + b"/"),
    ],
)
def test_what_is_anything_else(raw: bytes) -> None:
    with pytest.raises(FormatError):
        found(raw)


@given(st.data())
def test_damage_is_an_error_or_changes_no_place(data: st.DataObject) -> None:
    raw = bytearray(body())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        places = found(bytes(raw))
    except FormatError:
        return
    assert [(start, start + len(piece)) for start, piece in places] == RANGES


def test_headers() -> None:
    assert header(RANGES) == "bytes=0-9,100-399,2047-2047"
    assert boundary_of("multipart/byteranges; boundary=3d6b6a416f9b5") == b"3d6b6a416f9b5"
    assert boundary_of('Multipart/Byteranges;boundary="a b:c"') == b"a b:c"
    for other in (None, "", "application/octet-stream", "multipart/byteranges", "multipart/mixed; boundary=x"):
        assert boundary_of(other) is None
    assert boundary_of("multipart/byteranges; boundary=" + "x" * 71) is None
