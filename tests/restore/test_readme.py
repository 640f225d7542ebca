"""The README's first lines, with a real process: mounted, restored with lazy pages, unmounted when all pages are in."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.criu import Checkpoint
from tests.support.pages import blocks
from tests.support.restored import processes
from tests.support.tools import ROOT, run, wait_for
from tests.support.workload import become_subreaper, kill_tree

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]


def test_the_first_lines(single_checkpoint: Checkpoint, image_refs: dict[str, str], tmp_path: Path) -> None:
    *before, last = [line.removeprefix("# ").partition("   ")[0] for line in blocks(ROOT / "README.md")[0].splitlines()]
    assert "criu restore" in before[-1] and last == "ckptfs umount /mnt/ckpt"

    def shell(*lines: str) -> None:
        script = "\n".join(lines)
        for theirs, ours in (
            ("registry.example/app/ckpt:1", image_refs["zstd:chunked"]),
            ("/mnt/ckpt", str(tmp_path / "mnt")),
            ("/var/tmp/w", str(tmp_path / "w")),
            ("ckptfs ", f"{shlex.quote(sys.executable)} -m ckptfs "),
        ):
            script = script.replace(theirs, ours)
        # A restored process holds on to pipes.
        run("sh", "-ec", f"exec >log 2>&1\n{script}", cwd=tmp_path, env=environment)

    single_checkpoint.put_back()
    become_subreaper()
    offset = len(single_checkpoint.output_bytes)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CKPTFS_CACHE_DIR": str(tmp_path / "cache")}
    try:
        shell(*before)
        ticks = wait_for("a tick", lambda: single_checkpoint.output.lines(what="tick", offset=offset), patience=60)
        assert ticks[0].number == single_checkpoint.last_tick("ticker") + 1
        serving = lambda: [words for words in processes(tmp_path) if "lazy-pages" in words]  # noqa: E731
        wait_for("the last page", lambda: not serving(), patience=60)
        shell(last)
        assert not os.path.ismount(tmp_path / "mnt")
    finally:
        kill_tree(next(iter(single_checkpoint.pids.values())))
        if os.path.ismount(tmp_path / "mnt"):
            run("umount", "-l", tmp_path / "mnt")
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
