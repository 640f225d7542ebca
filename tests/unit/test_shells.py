"""Completion as it happens in the shells themselves: bash, zsh and fish, as the documentation installs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import ckptfs
from tests.support.terminal import on_terminal
from tests.support.tools import ROOT, require


@pytest.fixture(autouse=True)
def _program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ckptfs on PATH, and a home of its own."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "ckptfs"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m ckptfs "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ZDOTDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def test_bash(tmp_path: Path) -> None:
    require("bash")
    script = tmp_path / "ckptfs.bash"
    script.write_text(ckptfs("completion", "bash").out)
    words = f"""
        set -u; source {script}; complete -p ckptfs
        try() {{
          COMPREPLY=() COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
          _ckptfs_completion ckptfs "${{@: -1}}" "" && echo "${{COMPREPLY[@]}}"
        }}
        try ckptfs mo; try ckptfs status --w; try ckptfs cache ver; try ckptfs mount --view r
    """
    done = subprocess.run(["bash", "--norc", "-c", words], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[1:] == ["mount", "--watch", "verify", "raw rootfs"] and done.stderr == ""


def test_fish(tmp_path: Path) -> None:
    require("fish")
    folder = tmp_path / "config" / "fish" / "completions"
    folder.mkdir(parents=True)
    (folder / "ckptfs.fish").write_text(ckptfs("completion", "fish").out)

    def complete(line: str) -> list[str]:
        asked = ["fish", "-c", f'complete -C "{line}"']
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
        return [one.partition("\t")[0] for one in done.stdout.splitlines()]

    assert complete("ckptfs insp") == ["inspect"]
    assert complete("ckptfs status --w") == ["--watch"]
    assert complete("ckptfs mount --verify ") == ["auto", "strict"]


def test_zsh(tmp_path: Path) -> None:
    require("zsh", "setsid")
    folder = tmp_path / "functions"
    folder.mkdir()
    (folder / "_ckptfs").write_text(ckptfs("completion", "zsh").out)
    (tmp_path / ".zshrc").write_text(f"fpath=({folder} $fpath)\nautoload -U compinit\ncompinit -u -D\nPS1='ready> '\n")
    with on_terminal("-i", program=["zsh"]) as terminal:
        terminal.wait_for(lambda text: "ready> " in text)
        terminal.press(b"ckptfs insp\t")
        terminal.wait_for(lambda text: "ckptfs inspect " in text)
        for _ in range(2):
            terminal.press(b"\x15ckptfs status --wat\t")
            terminal.wait_for(lambda text: text.rstrip().endswith("ckptfs status --watch"))
            terminal.press(b"\x15\x1b[H")
        terminal.press(b"\x15exit\n")
        assert terminal.end() == 0


def test_mounts_are_offered_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptfs.cli.options import complete_mounts
    from ckptfs.control import client

    monkeypatch.setattr(client, "runtime_dir", lambda: tmp_path)
    for name in ("/mnt/a", "/mnt/b", "/srv/c"):
        client.write_state(client.MountFiles(tmp_path, name[-1]), {"mountpoint": name})

    def offered(typed: str) -> list[tuple[str, str]]:
        return [(item.value, item.type) for item in complete_mounts(None, None, typed)]  # type: ignore[arg-type]

    assert offered("/mnt") == [("/mnt/a", "plain"), ("/mnt/b", "plain")] and len(offered("")) == 3
    assert offered("/home") == [("/home", "dir")]
