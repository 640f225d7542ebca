"""Names in an image that would act on the terminal of whoever lists it."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from tests.support.command import ckptfs
from tests.support.fake_registry import FakeRegistry
from tests.support.tars import member
from tests.support.tools import ROOT

EVIL = b"\x1b]0;owned\x07\x1b[2J\xff\nnext"


def test_names_do_nothing_to_a_terminal_and_are_exact_in_a_pipe(tmp_path: Path) -> None:
    layer = member(EVIL, b"x") + member(b"plain", b"x") + bytes(1024)
    with FakeRegistry() as registry:
        registry.add_image("repo", "latest", [("application/vnd.oci.image.layer.v1.tar", layer)])
        options = ["--view", "raw", "--cache-dir", str(tmp_path / "cache")]
        command = [sys.executable, "-m", "ckptfs", "ls", registry.reference("repo:latest"), *options]
        for errors in ("surrogateescape", "strict"):  # Python's in the locale C, and in those of languages
            locale = {**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"}
            piped = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, env=locale).stdout
            assert piped == EVIL + b"\nplain\n"
        ours, theirs = pty.openpty()
        subprocess.run(command, cwd=ROOT, stdout=theirs, check=True)
        os.close(theirs)
        shown = os.read(ours, 4096)
        os.close(ours)
        assert shown == b"\\x1b]0;owned\\x07\\x1b[2J\\xff\\nnext\r\nplain\r\n"
        said = ckptfs("cat", registry.reference("repo:latest"), "no\x1b[2Jwhere", *options)
        assert said.code == 3 and "\x1b" not in said.line
