"""The pages of the documentation work as written, but for the registry's port and the places: command by command.

Some pages have tests of their own, which do more than run them, and what needs a base image or an engine is tested with
these; the rest is here, found by itself, so that a new page is tested or fails.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.docker_registry import DockerRegistry
from tests.support.pages import PAGES, blocks, commands
from tests.support.producers import PRODUCERS
from tests.support.tools import ROOT, free_port, require, run

pytestmark = [pytest.mark.registry, pytest.mark.fuse]

# tests/restore/test_restore_docs.py, tests/contracts/test_push_docs.py, tests/restore/test_layer_store_docs.py
ELSEWHERE = {"restore.md", "pushing.md", "layer-store.md"}
# tests/restore/test_restore_command.py, tests/fuse/test_rootfs_view.py
WITH_BASE = ("ckptfs restore ", "--view rootfs")
COMMANDS = [
    (page, command)
    for page in PAGES
    if page.name not in ELSEWHERE
    for block in blocks(page)
    for command in commands(block)
    if not any(words in command for words in WITH_BASE)
]


class Desk:
    """A user's: a shell, an export that podman made, two images in a registry. One at a time has /mnt/ckpt."""

    def __init__(self, folder: Path, registry: DockerRegistry) -> None:
        self.folder = folder
        for name in ("bin", "mnt", "etc", "kubelet"):
            (folder / name).mkdir()
        (folder / "bin" / "ckptfs").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ckptfs "$@"\n')
        (folder / "bin" / "ckptfs").chmod(0o755)
        run("zstd", "-q", "-d", PRODUCERS / "counter-zstd.tar.zst", "-o", folder / "counter.tar")
        shutil.copy(folder / "counter.tar", folder / "kubelet" / "checkpoint-web.tar")
        (folder / "etc" / "cache.key").write_bytes(os.urandom(32))
        (folder / "etc" / "cache.key").chmod(0o600)
        self._host = registry.host
        for tag in ("1", "2"):
            self.run(f"ckptfs push counter.tar {self._host}/counter:{tag}")

    def run(self, command: str) -> str:
        """What it prints; RuntimeError with its words when it fails."""
        image = f"{self._host}/counter:1"
        places = {
            "registry.example/app/ckpt:1": image,
            "registry.lan:5000/app/ckpt:1": image,
            "localhost:5000": self._host,
            "127.0.0.1:9180": f"127.0.0.1:{free_port()}",
            "/mnt/ckpt": str(self.folder / "mnt"),
            "/etc/ckptfs": str(self.folder / "etc"),
            "/var/tmp/cold": str(self.folder / "cold"),
            "/var/lib/kubelet/checkpoints": str(self.folder / "kubelet"),
        }
        for theirs, ours in places.items():
            command = command.replace(theirs, ours)
        names = {"REF": image, "DIR": "dir", "SRC": "counter.tar"}
        words = " ".join(names.get(word, word) for word in command.split(" "))
        environment = {
            **os.environ,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CKPTFS_CACHE_DIR": str(self.folder / "cache"),
        }
        return run("sh", "-ec", words, cwd=self.folder, env=environment, timeout=300).stdout

    def prepare(self, command: str) -> str:
        """What the user has done before `command`; returns what makes it end by itself."""
        words = command.split()
        self.unmount()
        for target in ("checkpoint", "report", "dir"):
            shutil.rmtree(self.folder / target, ignore_errors=True)
        if words[1] == "mount":
            (self.folder / "dir").mkdir()
        if "--cache-key" in words:
            return f"{command} --cache-dir {self.folder}/encrypted"
        if words[1] in ("umount", "status"):
            self.run("ckptfs mount REF /mnt/ckpt")
        if words[1:3] == ["cache", "clear"] and "--cache-dir" in words:
            self.run("ckptfs cache warm REF --cache-dir /var/tmp/cold")
        if words[1] == "profile":
            self.run("ckptfs mount REF /mnt/ckpt --record reads.jsonl; cat mnt/config.dump; ckptfs umount mnt")
        if "--watch" in words:
            return f"{command} --interval 0.1 | head -n 1"  # it ends when nobody reads it any more
        if words[1] == "bench":
            return f"{command} --runs 1"
        return command

    def unmount(self) -> None:
        for name in ("mnt", "dir"):
            if os.path.ismount(self.folder / name):
                self.run(f"ckptfs umount {name}")

    def leave(self) -> None:
        for name in ("mnt", "dir"):
            subprocess.run(["umount", "-q", "-l", self.folder / name], check=False)


@pytest.fixture(scope="module")
def desk(registry: DockerRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    require("fusermount3", "zstd", root=True)
    desk = Desk(tmp_path_factory.mktemp("desk"), registry)
    try:
        yield desk
        desk.unmount()
    finally:
        desk.leave()


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page.name}: {command}" for page, command in COMMANDS])
def test_a_command_of_a_page(page: Path, command: str, desk: Desk) -> None:
    printed = desk.run(desk.prepare(command))
    quiet = command.split()[1] in ("mount", "umount", "pull", "cp", "memparse") and "--json" not in command
    assert printed or quiet, command
