"""docs/pushing.md: its commands work as written, but for the registry's port and the places."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.docker_registry import DockerRegistry
from tests.support.producers import PRODUCERS, cri_o, podman, unpack
from tests.support.tools import ROOT, require, run
from tests.support.trees import layout_of

pytestmark = [pytest.mark.registry, pytest.mark.fuse]

PAGE = (ROOT / "docs" / "pushing.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)


class Shell:
    """Runs what the page says in a folder where `counter.tar` is a real export."""

    def __init__(self, folder: Path, registry: DockerRegistry) -> None:
        self.folder = folder
        self.registry = registry
        self.mounts = [folder / name for name in ("root", "ckpt", "merged")]
        for mount in self.mounts:
            mount.mkdir()
        (folder / "bin").mkdir()
        (folder / "bin" / "ckptfs").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ckptfs "$@"\n')
        (folder / "bin" / "ckptfs").chmod(0o755)

    def __call__(self, script: str) -> str:
        places = {"localhost:5000": self.registry.host, "/mnt/": f"{self.folder}/", "BASE": f"{self.folder}/base"}
        for theirs, ours in places.items():
            script = script.replace(theirs, ours)
        environment = {
            **os.environ,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CKPTFS_CACHE_DIR": str(self.folder / "cache"),
        }
        return run("sh", "-ec", script, cwd=self.folder, env=environment).stdout

    def unmount(self) -> None:
        for mount in reversed(self.mounts):
            subprocess.run(["umount", "-q", "-l", mount], check=False)


@pytest.fixture
def shell(registry: DockerRegistry, tmp_path: Path) -> Iterator[Shell]:
    require("fusermount3", "skopeo", "zstd", root=True)
    run("zstd", "-q", "-d", PRODUCERS / "counter-zstd.tar.zst", "-o", tmp_path / "counter.tar")
    shell = Shell(tmp_path, registry)
    try:
        yield shell
    finally:
        shell.unmount()


def blocks(*words: str) -> str:
    """The block that has all these words."""
    (found,) = (block for block in BLOCKS if all(word in block for word in words))
    return found


def test_publish_look_mount(shell: Shell) -> None:
    pushed = shell(BLOCKS[0]).strip()
    assert re.fullmatch(rf"{shell.registry.host}/counter:1@sha256:[0-9a-f]{{64}}", pushed)
    said = shell(blocks("skopeo inspect"))
    assert pushed.partition("@")[2] in said and "Process tree" in said
    assert (shell.folder / "ckpt" / "checkpoint" / "inventory.img").exists()


def test_every_source_of_the_table(shell: Shell) -> None:
    """The rows that need no other engine: their producers' files are made from the corpus."""
    unpack(shell.folder / "counter.tar", shell.folder / "counter")
    shutil.copytree(shell.folder / "counter" / "checkpoint", shell.folder / "images")
    (shell.folder / "kubelet").mkdir()
    cri_o(shell.folder / "kubelet")
    run("tar", "-cf", shell.folder / "checkpoint-web.tar", "-C", shell.folder / "kubelet", ".")
    rows = re.findall(r"^\| (.*) \| (.*) \|$", PAGE, re.MULTILINE)
    commands = [c for _, cell in rows for c in re.findall(r"`(ckptfs push [^`]*)`", cell)]
    assert len(commands) == 11
    commands.remove("ckptfs push ck.tar REF")  # needs containerd: tests/restore/test_containerd.py
    shell("ckptfs push counter.tar localhost:5000/app/old:1")
    shell("mkdir oci && skopeo copy -q --src-tls-verify=false docker://localhost:5000/app/old:1 oci:ck:1")
    shell("cp -r ck DIR; mkdir dump both; tar -xf counter.tar -C both")
    shell("cp -r images dump/checkpoint; cp counter/spec.dump dump")
    for number, command in enumerate(commands):
        places = {
            " REF": f" localhost:5000/table/{number}:1",
            "/var/lib/kubelet/checkpoints/": "",
            "/tmp/ck/one": "./images",  # as docker writes it: tests/restore/test_docker.py
            "registry.example": "localhost:5000",
        }
        for theirs, ours in places.items():
            command = command.replace(theirs, ours)
        assert "@sha256:" in shell(command)


def test_with_the_root_file_system(shell: Shell) -> None:
    base = shell.folder / "base"
    (base / "srv").mkdir(parents=True)
    (base / "srv" / "gone.txt").write_text("gone")
    (base / "srv" / "kept").write_text("kept")
    (base / "data").mkdir()
    os.chown(base / "data", 5, 6)
    (base / "data").chmod(0o1770)
    run("tar", "-cf", shell.folder / "base.tar", "-C", base, "data", "srv")
    layout_of((shell.folder / "base.tar").read_bytes(), shell.folder / "layout")
    shell("skopeo copy -q --dest-tls-verify=false oci:layout:latest docker://localhost:5000/base:1")
    shell(blocks("--rootfs --base"))
    assert (shell.folder / "root" / "srv" / "kept").read_text() == "kept"
    assert not (shell.folder / "root" / "srv" / "gone.txt").exists()
    assert shell.registry.manifest("counter:1-rootfs")
    shell(blocks("mount -t overlay"))
    merged = shell.folder / "merged"
    assert os.listdir(merged / "srv") == ["kept"]
    status = (merged / "data").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o1770, 5, 6)
    assert (merged / "data" / "new.txt").exists()


def test_the_next_checkpoint(shell: Shell) -> None:
    shutil.copy(shell.folder / "counter.tar", shell.folder / "counter-2.tar")
    shell("ckptfs push counter.tar localhost:5000/counter:1")
    said = shell(blocks("--parent"))
    first = said.splitlines()[0].partition("@")[2]
    facts = shell.registry.manifest("counter:2")
    assert isinstance(facts["annotations"], dict) and facts["annotations"]["dev.ckptfs.parent"]
    assert (
        first
        == shell("ckptfs push counter-2.tar localhost:5000/counter:2 --parent localhost:5000/counter:1").strip()[-71:]
    )
    assert "dev.ckptfs.parent" not in str(shell.registry.manifest("counter:2-whole")["annotations"])


def test_in_scripts_and_back(shell: Shell) -> None:
    first, *others = blocks("ref=$(").strip().splitlines()
    assert "@sha256:" in shell(f'{first}\necho "$ref"')
    facts = json.loads(shell(others[0]))
    assert set(facts) == {"reference", *["digest", "size", "layers", "parent", "sent", "present", "rootfs"]}
    assert set(facts["layers"][0]) == {"digest", "size", "role", "files", "reused"}
    shell("\n".join(others))
    shell(blocks("ckptfs pull"))
    assert (shell.folder / "counter-files" / "rootfs-diff" / "data" / "new.txt").exists()
    podman_made = shell.folder / "expected"
    podman_made.mkdir()
    podman(podman_made)
    assert sorted(os.listdir(shell.folder / "exactly-the-image")) == sorted(os.listdir(podman_made))
