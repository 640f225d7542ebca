"""A program that was started by hand in a terminal: criu gives it the terminal of whoever restores it."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.criu import require_criu
from tests.support.push import push_to_layout
from tests.support.restored import assert_nothing_left
from tests.support.tools import ROOT, run
from tests.support.workload import Output, become_subreaper, compile_program, kill_tree, reap

pytestmark = [pytest.mark.restore, pytest.mark.fuse]


def in_terminal(*command: object) -> tuple[int, int]:
    """(pid, the terminal's other end) of a command that leads a session on a terminal of its own."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execvp(str(command[0]), list(map(str, command)))
    return pid, master


def heard(master: int, wanted: str, patience: float = 30) -> str:
    """What was said in the terminal until `wanted` was, or its end."""
    said, until = b"", time.monotonic() + patience
    while wanted.encode() not in said and time.monotonic() < until:
        if select.select([master], [], [], 0.1)[0]:
            try:
                said += os.read(master, 4096)
            except OSError:  # EIO: the last holder of the terminal is gone
                break
    return said.decode(errors="replace")


def test_a_program_of_a_shell(scratch_folder: Path, tmp_path: Path) -> None:
    """Without the option criu refuses, and the hint says which one; with it, Ctrl-C ends what was restored."""
    require_criu()
    become_subreaper()
    folder = scratch_folder / "shell"
    folder.mkdir()
    output = Output(folder / "ticker.out")
    pid, master = in_terminal(compile_program("ticker", folder), output.path, "2")
    output.next("tick", role="ticker")
    (folder / "images").mkdir()
    run("criu", "dump", "-t", str(pid), "-D", folder / "images", "-o", "dump.log", "--shell-job")
    os.close(master)
    reap([pid])
    dumped = output.path.read_bytes()
    push_to_layout(folder / "images", tmp_path / "layout")
    command = [sys.executable, "-m", "ckptfs", "restore", f"oci:{tmp_path}/layout:latest", "--json"]
    command += ["--dir", str(tmp_path / "place"), "--cache-dir", str(tmp_path / "cache")]
    alone, master = in_terminal(*command)
    assert "is restored with it: -- --shell-job" in heard(master, "--shell-job")
    os.close(master)
    reap([alone])
    output.path.write_bytes(dumped)
    restoring, master = in_terminal(*command, "--", "--shell-job")
    try:
        running = json.loads(heard(master, "\n"))
        assert output.next("tick", role="ticker").number > 0
        assert os.readlink(f"/proc/{running['pid']}/fd/0").startswith("/dev/pts/")
        os.write(master, b"\x03")
        assert '"event": "ended"' in heard(master, "until the terminal's end")
        reap([restoring])
    finally:
        os.close(master)
        kill_tree(restoring)
    assert_nothing_left(tmp_path)
    assert not subprocess.run(["pgrep", "--full", str(folder / "ticker")], capture_output=True, check=False).stdout
