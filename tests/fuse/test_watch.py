"""`ckptfs status --watch` on a real terminal and off it, while a real mount waits for a registry that is slow."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import Mounted, ckptfs, mounted
from tests.support.fake_registry import FakeRegistry, Silent
from tests.support.terminal import CKPTFS, ENTER_SCREEN, on_terminal
from tests.support.tools import require, wait_for

pytestmark = pytest.mark.fuse

LAYOUT = Path(__file__).parent.parent / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"
QUICK = ("--watch", "--interval", "0.2")


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fusermount3", "setsid")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounted]:
    with mounted(f"oci:{LAYOUT}", tmp_path, "--no-background-fetch") as mount:
        yield mount


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[Mounted, int]]:
    """A mount, and a process that waits for the first page of memory as long as the test runs."""
    with FakeRegistry() as registry:
        registry.add_layout(LAYOUT, "repo")
        options = ("--no-background-fetch", "--prefetch", "none", "--read-deadline", "30")
        with mounted(registry.reference("repo:latest"), tmp_path, *options) as mount:
            registry.script["GET /v2/repo/blobs/", None] = Silent()
            pages = mount.path / "checkpoint" / "pages-1.img"
            reader = subprocess.Popen(["dd", f"if={pages}", "of=/dev/null", "bs=4096", "count=1"], stderr=-3)
            try:
                wait_for("the reader waits", lambda: mount.status()["reads"]["waiting"] == 1)
                yield mount, reader.pid
            finally:
                reader.kill()
                registry.closing.set()
                reader.wait(40)


def test_what_waits_is_shown_with_its_process(hanging: tuple[Mounted, int]) -> None:
    mount, pid = hanging
    with on_terminal("status", mount.path, *QUICK) as terminal:
        picture = terminal.wait_for(lambda text: f"dd {pid}" in text)
        (line,) = (line for line in picture.splitlines() if line.startswith("waiting"))
        assert "checkpoint/pages-1.img at 0" in line
        seconds = float(line.split()[-2])
        later = terminal.wait_for(lambda text: f"dd {pid}" in text and text != picture)
        assert float(next(one for one in later.splitlines() if one.startswith("waiting")).split()[-2]) > seconds
        for words in ("image", "metadata", "memory", "on demand", "speed", "from the network", "q ends", "━"):
            assert words in later, later
        terminal.press(b"q")
        assert terminal.end() == 0 and terminal.in_order
        assert "1 waiting" in terminal.last_words
    shown = ckptfs("status", mount.path).out
    assert f"(dd {pid})" in shown and "waiting  checkpoint/pages-1.img at 0" in shown


def test_progress_and_the_end_of_the_mount(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount, on_terminal("status", mount.path, *QUICK) as terminal:
        terminal.wait_for(lambda text: "100 %" in text and "all here" in text)
        with (mount.path / "checkpoint" / "pages-1.img").open("rb") as file:
            file.read(4096)
            terminal.wait_for(lambda text: "reading" in text and f"{os.getpid()}" in text)
        assert ckptfs("umount", mount.path).code == 0
        assert terminal.end() == 0 and terminal.in_order
        assert terminal.last_words.splitlines()[-1] == "the mount has ended"


@pytest.mark.parametrize("keys", [b"q", b"Q", b"\x03", b"\x04", b"xyz\x1b[Aq"])
def test_keys_that_end_it(keys: bytes, mount: Mounted) -> None:
    with on_terminal("status", *QUICK) as terminal:
        terminal.wait_for(lambda text: "q ends" in text)
        terminal.press(keys)
        assert terminal.end() == 0 and terminal.in_order
        assert "Traceback" not in terminal.raw and "ckptfs:" not in terminal.raw


def test_terminated_it_leaves_the_terminal_in_order(mount: Mounted) -> None:
    with on_terminal("status", mount.path, *QUICK) as terminal:
        terminal.wait_for(lambda text: "image" in text)
        (child,) = Path(f"/proc/{terminal.process.pid}/task/{terminal.process.pid}/children").read_text().split() or [
            str(terminal.process.pid)
        ]
        os.kill(int(child), signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM and terminal.in_order


def test_a_narrow_terminal_and_a_dumb_one(mount: Mounted) -> None:
    with on_terminal("status", mount.path, *QUICK, columns=30, rows=8) as terminal:
        terminal.wait_for(lambda text: "image" in text)
        terminal.press(b"q")
        assert terminal.end() == 0
    assert ENTER_SCREEN in terminal.raw
    with on_terminal("status", mount.path, *QUICK, program=["env", "TERM=dumb", *CKPTFS]) as terminal:
        terminal.wait_for(lambda text: text.count("on demand") > 1)
        terminal.press(b"\x03")
        assert terminal.end() == 0 and ENTER_SCREEN not in terminal.raw


@contextlib.contextmanager
def printing(*arguments: object, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """`ckptfs status` with these arguments into a pipe, and the first two lines that it printed."""
    command = [sys.executable, "-m", "ckptfs", "status", *map(str, arguments), *QUICK]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        try:
            assert process.stdout is not None
            yield process, [process.stdout.readline().rstrip("\n") for _ in range(2)]
        finally:
            process.kill()


def output(*arguments: object, **environment: str) -> list[str]:
    """What it prints until Ctrl-C, which must end it well; two lines at least."""
    with printing(*arguments, **environment) as (process, lines):
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=10)
        assert (process.returncode, err) == (0, "")
        return lines + rest.splitlines()


def test_lines_where_there_is_no_terminal(mount: Mounted) -> None:
    for line in output(mount.path):
        clock, path, *rest = line.split("  ")
        assert len(clock) == 8 and path == str(mount.path) and rest[0].endswith(" %") and rest[-1] == "on demand"


def test_json_lines(mount: Mounted) -> None:
    documents = [json.loads(line) for line in output(mount.path, "--json")]
    assert documents[0]["seconds"] < documents[-1]["seconds"]
    assert set(mount.status()) | {"layers", "roles", "reading"} == set(documents[0])
    assert documents[0]["layers"][0]["name"].startswith("zstd:chunked sha256:")
    assert set(documents[0]["roles"]) <= {"metadata", "memory", "files"}
    everything = [json.loads(line) for line in output("--json")]
    assert any(one["mountpoint"] == str(mount.path) for one in everything[0])


def test_a_pipe_that_closes_and_a_mount_that_ends(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        program = f"{sys.executable} -m ckptfs status {mount.path} --watch --interval 0.2"
        done = subprocess.run(["sh", "-c", f"{program} | head -1"], capture_output=True, timeout=20)
        assert done.stderr == b"" and done.stdout.count(b"\n") == 1
        with printing(mount.path) as (process, lines):
            assert ckptfs("umount", mount.path).code == 0
            _, err = process.communicate(timeout=20)
            assert (process.returncode, err, len(lines)) == (0, "", 2)


def test_what_cannot_be_watched(tmp_path: Path) -> None:
    nothing = ckptfs("status", tmp_path, "--watch")
    assert nothing.code == 8 and "nothing is mounted" in nothing.line
    both = ckptfs("status", "--watch", "--prometheus")
    assert both.code == 2 and "--prometheus" in both.line
    assert ckptfs("status", "--watch", "--interval", "0").code == 2
    assert ckptfs("status", "--watch", "--interval", "nan").code == 2
