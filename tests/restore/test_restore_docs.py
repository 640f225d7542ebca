"""docs/restore.md: what it tells a new user to type works as written, but for the registry's port and placeholders."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.docker_registry import DockerRegistry
from tests.support.podman import BASE, Podman
from tests.support.restored import processes
from tests.support.tools import ROOT, wait_for

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]

PAGE = (ROOT / "docs" / "restore.md").read_text()


def block(first: str) -> str:
    """The commands of the page that begin with `first`."""
    return next(text for text in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) if text.startswith(first))


def test_the_first_five_minutes(podman: Podman, registry: DockerRegistry, tmp_path: Path) -> None:
    """Both ways, and the one by hand, in a namespace where podman has storage of its own."""
    settings = tmp_path / "containers.conf"
    settings.write_text('[engine]\nruntime="runc"\ncgroup_manager="cgroupfs"\nevents_logger="file"\n')
    settings.write_text(
        settings.read_text() + '[containers]\ndefault_ulimits=["nofile=20000:20000","nproc=20000:20000"]\n'
    )
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "ckptfs").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ckptfs "$@"\n')
    (bin_ / "ckptfs").chmod(0o755)
    environment = {**os.environ, "CONTAINERS_CONF": str(settings), "PYTHONPATH": str(ROOT)}
    environment |= {"PATH": f"{bin_}:{environment['PATH']}", "CKPTFS_CACHE_DIR": str(tmp_path / "cache")}
    (tmp_path / "mnt").mkdir()
    root = podman("image", "mount", BASE)

    def shell(script: str) -> str:
        for ours, theirs in (
            ("localhost:5000", registry.host),
            ("IMAGE COMMAND", f"--network none {BASE} /ticker /data/ticker.out 8"),
            ("/mnt/ckpt", str(tmp_path / "mnt")),
            ("/var/lib/ckptfs/stub", str(tmp_path / "stub")),
            ("--out", f"--criu-dir {tmp_path}/stub --out"),
            ("docker.io/library/nginx", BASE),
            ("/srv/images", str(tmp_path)),
            ("/srv/nginx-root", str(root)),
        ):
            script = script.replace(ours, theirs)
        script = f"set -e\ncd {tmp_path}\n{script}"
        return podman.isolation.run("sh", "-c", script, env=environment).stdout

    *before, last = block("podman run").strip().splitlines()
    try:
        shell("\n".join([*before[:1], "sleep 0.5", *before[1:]]))
        assert last == "ckptfs restore localhost:5000/counter:1"
        shell(block("ckptfs check"))
        shell("skopeo copy -q --src-tls-verify=false docker://localhost:5000/counter:1 oci:counter:1")
        folder = podman.isolation.path("/var/lib/ckptfs/restores")
        for number, line in enumerate([last, *block("ckptfs restore localhost:5000/counter:1 --detach").splitlines()]):
            first, dashes, extra = line.partition(" -- ")
            name = f"container-{number}"
            running = shell(f"{first} --detach --json --name {name} {dashes} {extra}")
            assert json.loads(running)["lazy"] == ("--no-lazy-pages" not in first)
            assert podman.isolation.run("runc", "list", "-q").stdout.split() == [name]
            shell(f"runc kill {name} KILL")
            wait_for("the end", lambda: not list(folder.iterdir()), patience=30)
        assert "again" in shell(block("ckptfs restore localhost:5000/counter:1 --engine"))
        wait_for("a tick", lambda: podman.ticks("again"))
        by_hand, unmount, after = block("ckptfs stub").partition("ckptfs umount")
        shell(by_hand)
        wait_for("a tick", lambda: podman.ticks("by-hand"))
        stub = f"{tmp_path}/stub/work"
        wait_for("the last page", lambda: not [words for words in processes(tmp_path) if stub in words], patience=60)
        shell(f"{unmount}{after}")
        podman("container", "checkpoint", "by-hand")
    finally:
        podman("rm", "--force", "--time=0", "--ignore", "again", "by-hand", "counter")
        podman("image", "unmount", BASE)
        subprocess.run(["umount", "-q", "-l", tmp_path / "mnt"], check=False)
