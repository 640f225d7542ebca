"""docs/layer-store.md: its transcript is what happens, but for numbers, digests and places."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.docker_registry import DockerRegistry
from tests.support.images import ImageBuilder
from tests.support.isolation import Isolation
from tests.support.layer_store import commit
from tests.support.tools import ROOT
from tests.support.workload import compile_program

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]

PAGE = (ROOT / "docs" / "layer-store.md").read_text()


def block(kind: str) -> str:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[0]


def shape(text: str) -> list[str]:
    """What is the same in every run."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "ID", text)
    text = re.sub(r"\d+(\.\d+)? (B|[KMG]iB)\b", "SIZE", text)
    return re.sub(r"\b\d+(\.\d+)?\b", "N", text).strip().splitlines()


@pytest.fixture
def web(isolation: Isolation, image_builder: ImageBuilder, scratch_folder: Path) -> str:
    """Two layers with 16 MiB that nobody reads."""
    program = compile_program("show", scratch_folder)

    def first(root: Path) -> None:
        for name in ("bin", "etc", "data"):
            (root / name).mkdir()
        shutil.copy(program, root / "bin/cat")
        (root / "data/large").write_bytes(os.urandom(16 << 20))

    def second(root: Path) -> None:
        (root / "etc/motd").write_text("hello\n")

    commit(isolation, "scratch", "web-1", first)
    commit(isolation, "web-1", "web-2", second)
    return image_builder.push("web-2", "web", "zstd:chunked")


def test_the_transcript(web: str, isolation: Isolation, registry: DockerRegistry, tmp_path: Path) -> None:
    configuration = tmp_path / "storage.conf"
    configuration.write_text(
        block("toml")
        .replace("/var/lib/ckptfs", str(tmp_path))
        .replace("[storage]\n", '[storage]\nrunroot = "/run/docs"\ngraphroot = "/var/lib/containers/docs"\n')
    )
    engine = tmp_path / "containers.conf"
    engine.write_text(
        '[engine]\nruntime="runc"\ncgroup_manager="cgroupfs"\nevents_logger="file"\n'
        '[containers]\nnetns="none"\ndefault_ulimits=["nofile=1024:1024","nproc=1024:1024"]\n'
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ckptfs").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ckptfs "$@"\n')
    (tmp_path / "bin/ckptfs").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CONTAINERS_STORAGE_CONF": str(configuration),
        "CONTAINERS_CONF": str(engine),
        "CKPTFS_CACHE_DIR": str(tmp_path / "cache"),
    }
    said: list[str] = []
    places = (("localhost:5000/web:1", web), ("/var/lib/ckptfs", str(tmp_path)))
    try:
        for line in block("console").splitlines():
            if not line.startswith("# "):
                continue
            command = line[2:].replace("podman pull", "podman pull --tls-verify=false")
            for documented, here in places:
                command = command.replace(documented, here)
            out = isolation.run("sh", "-c", f"cd {tmp_path}; {command}", env=environment).stdout
            for documented, here in places:
                out = out.replace(here, documented)
            said += [line, *out.splitlines()]
            if command.startswith("ckptfs status"):
                assert re.search(r"network +\d+\.\d KiB", out), "a pull fetches metadata"
    finally:
        force = f"podman rmi --all --force; ckptfs umount --force {tmp_path}/store"
        isolation.run("sh", "-c", f"({force}) >/dev/null 2>&1 || true", env=environment)
    assert shape("\n".join(said)) == shape(block("console"))
