"""Paths out of documents that ckptfs has written: as they are, or refused."""

import json

import pytest

from ckptfs.errors import FormatError
from ckptfs.model.paths import plain
from ckptfs.model.profile import decode_profile
from ckptfs.settings import Limits

LIMITS = Limits()


@pytest.mark.parametrize("path", [b"a", b"a/b", b".wh..wh..opq", b"a/.b/..c", b"\xff\xfe", b"a b\n", b"n" * 255])
def test_a_path_stays_as_it_is(path: bytes) -> None:
    assert plain(path, LIMITS) == path


def test_the_root_has_a_path_but_no_profile() -> None:
    assert plain(b"", LIMITS) == b""
    with pytest.raises(FormatError, match="no path"):
        decode_profile(_profile(""), LIMITS)


@pytest.mark.parametrize(
    "path",
    [
        b"/a",
        b"a/",
        b"a//b",
        b"./a",
        b"a/.",
        b".",
        b"..",
        b"a/../b",
        b"a/..",
        b"a\0b",
        b"n" * (LIMITS.name_bytes + 1),
        b"a/" * LIMITS.path_depth + b"a",
        b"n/" * (LIMITS.path_bytes // 2 + 1),
    ],
)
def test_a_path_that_is_refused(path: bytes) -> None:
    with pytest.raises(FormatError):
        plain(path, LIMITS)
    with pytest.raises(FormatError):
        decode_profile(_profile(path.decode()), LIMITS)


def _profile(path: str) -> bytes:
    return json.dumps({"version": 1, "files": [path], "runs": [[0, 0, 4096, 1]]}).encode()
