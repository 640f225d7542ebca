"""How ckptfs is found by others: checkpointctl's plugins, shells, man."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command import ckptfs
from tests.support.criu_images import CORPUS
from tests.support.each import each
from tests.support.terminal import on_terminal
from tests.support.tools import ROOT

PLUGIN = "import sys; from ckptfs.__main__ import checkpointctl_plugin; sys.exit(checkpointctl_plugin())"


def plugin(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", PLUGIN, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)


def test_checkpointctl_asks_for_a_description() -> None:
    """cmd/plugin.go: exit code 42, the first line of the output, within half a second."""
    began = time.monotonic()
    asked = plugin("--plugin-description")
    assert asked.returncode == 42 and asked.stderr == ""
    assert "without pulling" in asked.stdout and len(asked.stdout.splitlines()) == 1
    assert time.monotonic() - began < 0.5
    heavy = "import sys, ckptfs.__main__; sys.exit(bool({'click', 'trio', 'ckptfs.cli'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, check=False).returncode == 0


def test_checkpointctl_runs_the_commands(tmp_path: Path) -> None:
    done = plugin("inspect", f"oci:{CORPUS}/counter/k8s-zstdchunked.oci", "--ps-tree-cmd", "--cache-dir", tmp_path)
    assert done.returncode == 0 and "[1] /counter 1536 /data/out" in done.stdout
    wrong = plugin("inspect")
    assert wrong.returncode == 2 and "See `checkpointctl ckptfs inspect --help`" in wrong.stderr


@pytest.mark.parametrize(
    ("shell", "words"), [("bash", "complete -o"), ("zsh", "#compdef ckptfs"), ("fish", "complete ")]
)
def test_completion_scripts(shell: str, words: str) -> None:
    script = ckptfs("completion", shell)
    assert script.code == 0 and words in script.out and "_CKPTFS_COMPLETE" in script.out
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=script.out, text=True, check=False).returncode == 0
    assert ckptfs("completion", "tcsh").code == 2


def test_completion_of_commands_and_options() -> None:
    def complete(*typed: str) -> list[str]:
        words = {"COMP_WORDS": " ".join(("ckptfs", *typed)), "COMP_CWORD": str(len(typed))}
        out = ckptfs(env={**words, "_CKPTFS_COMPLETE": "bash_complete"}).out
        return [line.partition(",")[2] for line in out.splitlines()]

    assert complete("insp") == ["inspect"]
    assert {"mount", "memparse", "completion"} <= set(complete(""))
    assert complete("inspect", "--ps-tree-") == ["--ps-tree-cmd", "--ps-tree-env"]


def test_no_list_of_commands_is_cut_off() -> None:
    for words in ([], ["--help"], ["cache", "--help"], ["profile", "--help"], ["config", "--help"]):
        listed = ckptfs(*words, env={"COLUMNS": "80"}).out.partition("Commands:\n")[2]
        assert listed and "..." not in listed, listed


def test_examples_of_lazy_pages_start_their_daemon() -> None:
    """`criu restore --lazy-pages` fails without."""
    for words in ([], ["mount"]):
        lines = [line.strip() for line in ckptfs(*words, "--help").out.splitlines()]
        at = next(number for number, line in enumerate(lines) if line.startswith("criu restore"))
        assert lines[at - 1].startswith("criu lazy-pages --daemon") and " -d " in lines[at]


@pytest.mark.parametrize(("value", "coloured"), [("", True), ("1", False)])
def test_no_color(value: str, coloured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", value)
    with on_terminal("check", f"oci:{CORPUS}/counter/k8s-zstdchunked.oci", "--cache-dir", tmp_path) as terminal:
        terminal.end(60)
    assert "rights" in terminal.raw and ("\x1b[3" in terminal.raw) == coloured


def test_man_pages(tmp_path: Path) -> None:
    script = [sys.executable, ROOT / "scripts" / "man_pages.py", tmp_path]
    subprocess.run(script, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert {"ckptfs.1", "ckptfs-mount.1", "ckptfs-cache-verify.1", "ckptfs-inspect.1"} <= {
        p.name for p in (tmp_path / "man1").iterdir()
    }
    page = (tmp_path / "man1" / "ckptfs-inspect.1").read_text()
    assert ".SH SYNOPSIS" in page and r"ckptfs inspect localhost:5000/counter:1 \-\-ps\-tree\-cmd" in page
    helper = (tmp_path / "man8" / "mount.ckptfs.8").read_text()
    assert r"\fBcache_size=VALUE\fR" in helper and r"\fBno_background_fetch\fR" in helper and "ready_fd" not in helper
    groff = shutil.which("groff")
    if groff:
        for file in tmp_path.glob("man*/*"):
            done = subprocess.run([groff, "-man", "-Tutf8", "-ww", file], capture_output=True, text=True, check=False)
            assert done.returncode == 0 and done.stderr == "" and "OPTIONS" in done.stdout


@each("words", [["inspect"], ["show"], ["memparse"], ["ls"], ["cat"], ["diff", "again"]])
def test_looking_into_images_needs_no_fuse(words: list[str], tmp_path: Path) -> None:
    """Where libfuse is not installed pyfuse3 cannot be imported."""
    layout = f"oci:{CORPUS}/tree/k8s-zstdchunked.oci"
    arguments = [words[0], layout, *([layout] if words[1:] else []), *(["checkpoint/pstree.img"] * (words == ["cat"]))]
    program = "import sys; sys.modules['pyfuse3'] = None; from ckptfs.cli import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *arguments, "--cache-dir", tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("utf-8", "日 µ ".encode() + b"\xff"),
        ("ascii", "日 µ ".encode() + b"\xff"),  # what is left where no locale is set
        ("latin-1", b"\\u65e5 \xb5 \xff"),
        ("koi8-r", b"\\u65e5 \\xb5 \xff"),
    ],
)
def test_what_a_locale_has_no_character_for_is_printed(encoding: str, printed: bytes) -> None:
    script = "import click, ckptfs.__main__ as m; m._print_names_as_they_are(); click.echo('\\u65e5 \\xb5 \\udcff')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=False)
    assert (done.stdout, done.stderr) == (printed + b"\n", b"")
