"""`ckptfs cp` and what else writes to a path of the user's choice: whole, as it was in the image, or not at all."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command import Result, ckptfs
from tests.support.disks import disk_of
from tests.support.fake_registry import FakeRegistry, Silent
from tests.support.other_user import as_nobody
from tests.support.tools import ROOT, require

CORPUS = ROOT / "tests" / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"


def copy(path: str, target: object, folder: Path) -> Result:
    return ckptfs("cp", f"oci:{CORPUS}", path, target, "--cache-dir", folder / "cache")


def test_files_and_directories_are_as_in_the_image(tmp_path: Path) -> None:
    assert copy("config.dump", tmp_path / "one", tmp_path).code == 0
    assert copy("checkpoint", tmp_path, tmp_path).code == 0
    listed = {entry["name"]: entry for entry in ckptfs("ls", f"oci:{CORPUS}", "checkpoint", "--json").json}
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == set(listed)
    for path in (tmp_path / "checkpoint").iterdir():
        found = path.stat()
        facts = (stat.filemode(found.st_mode), found.st_size, int(found.st_mtime))
        assert facts == tuple(listed[path.name][key] for key in ("mode", "size", "mtime")), path
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "one", "checkpoint"}


@pytest.mark.parametrize("path", ["config.dump", "checkpoint"])
@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("{folder}/missing/a", 2, "No such file or directory; name a path in a directory that is there"),
        ("{folder}/file/a", 2, "Not a directory; name a path"),
        ("{folder}/file", 2, "exists; name a path that does not"),
        ("/proc/a", 2, "cannot be written"),
        ("{folder}/" + "a" * 300, 2, "File name too long"),
    ],
)
def test_where_nothing_can_be_written(path: str, target: str, code: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("as it was")
    done = copy(path, target.format(folder=tmp_path), tmp_path)
    assert done.code == code and words in done.line, done
    assert {found.name for found in tmp_path.iterdir()} == {"file", "cache"}


def test_what_is_not_permitted() -> None:
    require("setpriv", "unshare", root=True)
    done = as_nobody("ckptfs", "cp", f"oci:{CORPUS}", "config.dump", "/usr/copy", fuse=True)
    assert done.returncode == 8 and "/usr/copy cannot be written: Permission denied; name one" in done.stderr


@pytest.mark.parametrize(
    "words", [("cp", "checkpoint"), ("cp", "checkpoint/pages-1.img"), ("memparse", "--pid", "1", "--output")]
)
def test_a_full_disk_leaves_nothing(words: tuple[str, ...], tmp_path: Path) -> None:
    with disk_of(tmp_path / "small", "size=40k") as small:
        name, *others = words
        done = ckptfs(name, f"oci:{CORPUS}", *others, small / "new", "--cache-dir", tmp_path / "cache")
        assert done.code == 8 and "new cannot be written: No space left on device; name" in done.line
        assert os.listdir(small) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("path", ["checkpoint", "checkpoint/pages-1.img"])
def test_ctrl_c_leaves_nothing(path: str, number: signal.Signals, tmp_path: Path) -> None:
    """Nor do kill(1) and a lost terminal. What is being written is under another name, and nobody else's to read."""
    target = tmp_path / "into"
    target.mkdir()
    with FakeRegistry() as registry:
        registry.add_layout(CORPUS, "repo")
        reference = registry.reference("repo:latest")
        cache = ["--cache-dir", str(tmp_path / "cache")]
        assert ckptfs("ls", reference, "-R", *cache).code == 0
        registry.script = {("blobs/", None): Silent()}
        command = [sys.executable, "-m", "ckptfs", "cp", reference, path, str(target / "new"), *cache]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
            until = time.monotonic() + 20
            while not os.listdir(target) and process.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            (name,) = os.listdir(target)
            assert name != "new" and not stat.S_IMODE((target / name).stat().st_mode) & 0o077
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "ckptfs: interrupted\n")
    assert os.listdir(target) == []
