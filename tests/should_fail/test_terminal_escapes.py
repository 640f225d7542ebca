"""Names in an image that would act on the terminal of whoever lists it."""

import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.command import ckptfs, mounted
from tests.support.fake_registry import FakeRegistry, Status
from tests.support.other_user import as_nobody
from tests.support.tars import member
from tests.support.tools import ROOT, require

EVIL = b"\x1b]0;owned\x07\x1b[2J\xff\nnext"
HARMLESS = r"\x1b]0;owned\x07\x1b[2J\xff\nnext"


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


@pytest.mark.fuse
def test_what_is_said_of_names_is_one_line_that_does_nothing(tmp_path: Path) -> None:
    """Of what `cp` and `pull` leave out, in what `check` has found, and in the errors of a status."""
    device = member(b"folder/" + EVIL, flag=b"3", device=(1, 3)) + bytes(1024)
    pod = member(EVIL + b"/checkpoint/inventory.img", b"x") + bytes(1024)
    large = member(EVIL, os.urandom(1 << 20)) + bytes(1024)
    with FakeRegistry() as registry:
        for tag, layer in (("device", device), ("pod", pod), ("large", large)):
            registry.add_image("repo", tag, [("application/vnd.oci.image.layer.v1.tar", layer)])
        reference, cache = registry.reference("repo:"), ["--cache-dir", str(tmp_path / "cache")]
        copied = ckptfs("cp", f"{reference}device", "folder", tmp_path / "copy", "--view", "raw", *cache)
        assert copied.code == 0 and copied.line == f"left out: folder/{HARMLESS} (a device or a pipe)"
        checked = ckptfs("check", f"{reference}pod", *cache)
        assert checked.code != 0 and f"the checkpoint is of a pod: {HARMLESS}" in checked.out
        options = ["--view", "raw", "--read-deadline", "1", "--prefetch", "none", "--no-background-fetch"]
        with mounted(f"{reference}large", tmp_path, *options) as mount:
            registry.script["GET /v2/repo/blobs/", None] = Status(404)
            with pytest.raises(OSError, match="Errno 5"):
                (mount.path / os.fsdecode(EVIL)).read_bytes()
            (error,) = (line for line in ckptfs("status", mount.path).out.splitlines() if "error" in line)
    assert error.startswith(f"  error    read {HARMLESS} at ")


def test_what_a_pull_leaves_out(tmp_path: Path) -> None:
    require("setpriv", "unshare", root=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        archive = Path(folder) / "device.tar"
        archive.write_bytes(member(EVIL, flag=b"3", device=(1, 3)) + bytes(1024))
        done = as_nobody("ckptfs", "pull", f"archive:{archive}", "out", "--view", "raw", fuse=True)
    assert done.stderr.splitlines()[0] == f"left out: the device {HARMLESS}: Operation not permitted"
