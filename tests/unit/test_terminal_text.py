"""Names out of images are shown so that they do nothing to a terminal; sizes for people."""

import os
import sys
import unicodedata

import pytest

from ckptfs.terminal import printable, size_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("pages-1.img", "pages-1.img"),
        ("ünïcode 日本 🙂", "ünïcode 日本 🙂"),
        (r"a\x1b", r"a\x1b"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x9b2J", r"\x9b2J"),  # an escape sequence of one byte less
        ("two\nlines\r\x0b\x0c\x85\u2028\u2029", r"two\nlines\r\x0b\x0c\x85\u2028\u2029"),
        ("a\tb\0\x7f", r"a\tb\x00\x7f"),
        ("gpj.\u202eexe\u2066\u200f\u061c", r"gpj.\u202eexe\u2066\u200f\u061c"),
        ("a\u200bb\ufeff\u00ad\u00a0", r"a\u200bb\ufeff\xad\xa0"),
        ("\U000e0041", r"\U000e0041"),  # a tag, which nobody sees
        (os.fsdecode(b"latin-\xe9\xff"), r"latin-\xe9\xff"),
        ("\ud800", r"\ud800"),
    ],
)
def test_a_name_as_it_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_character_at_all_acts_on_a_terminal() -> None:
    shown = printable("".join(map(chr, range(sys.maxunicode + 1))))
    kinds = {unicodedata.category(letter) for letter in set(shown)}
    assert not kinds & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} and shown.encode()
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (511.7, "512 B"),
        (1024, "1.0 KiB"),
        (1536.0, "1.5 KiB"),
        (1652280, "1.6 MiB"),
        (1 << 40, "1.0 TiB"),
        (1 << 70, "1024.0 EiB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size_text(count) == text
