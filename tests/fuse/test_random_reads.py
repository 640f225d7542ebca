"""Row F2: whatever is read, in whatever way, by however many at once, is what an extraction by real tools holds."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.support.command import mounted
from tests.support.fake_registry import FakeRegistry
from tests.support.push import push_to_layout, two_checkpoints, unpacked
from tests.support.synthetic import synthetic_tar
from tests.support.tools import ROOT, require

pytestmark = pytest.mark.fuse

CORPUS = Path(__file__).parent.parent / "data" / "corpus"
OCI = "application/vnd.oci.image.layer.v1"
READS = int(os.environ.get("CKPTFS_SOAK_READS", "20000"))  # in all; scripts/soak asks for a million
PROCESSES = 3
Figure = Callable[[str, object], None]
Make = Callable[[FakeRegistry, Path, Path], None]  # (registry, scratch, where the expected files go)


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fusermount3", "tar")


def _tar(registry: FakeRegistry, _: Path, expected: Path) -> None:
    registry.add_image("repo", "latest", [(f"{OCI}.tar", synthetic_tar(expected))])


def _gzip(registry: FakeRegistry, _: Path, expected: Path) -> None:
    registry.add_image("repo", "latest", [(f"{OCI}.tar+gzip", gzip.compress(synthetic_tar(expected), 1))])


def _zstd(registry: FakeRegistry, _: Path, expected: Path) -> None:
    layer = zstandard.ZstdCompressor(1).compress(synthetic_tar(expected))
    registry.add_image("repo", "latest", [(f"{OCI}.tar+zstd", layer)])


def _corpus(name: str) -> Make:
    def make(registry: FakeRegistry, _: Path, expected: Path) -> None:
        layout = CORPUS / name
        registry.add_layout(layout, "repo")
        for blob in (layout / "blobs" / "sha256").iterdir():
            data = blob.read_bytes()
            if not data.startswith(b"{"):
                extract(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else unpacked(data), expected)

    return make


def _pushed(registry: FakeRegistry, scratch: Path, expected: Path) -> None:
    two_checkpoints(scratch)
    push_to_layout(scratch / "first.tar", scratch / "layout")
    registry.add_layout(scratch / "layout", "repo")
    extract((scratch / "first.tar").read_bytes(), expected)


def extract(tar: bytes, folder: Path) -> None:
    """Its regular files."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            if member.isreg() and not member.name.startswith(".no.prefetch") and "stargz.index" not in member.name:
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())


FORMATS: dict[str, Make] = {
    "tar": _tar,
    "gzip": _gzip,
    "zstd": _zstd,
    "estargz": _corpus("counter/k8s-estargz64k.oci"),
    "zstd:chunked": _corpus("counter/k8s-zstdchunked.oci"),
    "pushed": _pushed,
}


@pytest.mark.row("F2")
@pytest.mark.timeout(60 + READS // 20)
@pytest.mark.parametrize("form", FORMATS)
def test_random_reads(form: str, tmp_path: Path, record_property: Figure) -> None:
    expected = tmp_path / "expected"
    with FakeRegistry() as registry:
        FORMATS[form](registry, tmp_path, expected)
        # Caches so small that chunks come from memory, from disk and from the registry again.
        small = ("--view", "raw", "--memory", "2M", "--cache-size", "6M", "--no-background-fetch")
        with mounted(registry.reference("repo:latest"), tmp_path, *small) as mount:
            each = READS // len(FORMATS) // PROCESSES
            command = [sys.executable, "-m", "tests.support.fsx", str(mount.path), str(expected)]
            readers = [
                subprocess.Popen([*command, str(seed), str(each)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
                for seed in range(PROCESSES)
            ]
            said = [reader.communicate()[0] for reader in readers]
            assert [reader.returncode for reader in readers] == [0] * PROCESSES, said
            served = mount.status()["reads"]
            assert mount.status()["errors"] == []
    kinds: Counter[str] = Counter()
    for text in said:
        kinds.update(json.loads(text)["reads"])
    compared = sum(json.loads(text)["bytes"] for text in said)
    assert len(kinds) == 10 and served["misses"] > 0
    figure = f"{sum(kinds.values())} reads ({served['count']} requests), {compared >> 20} MiB, 0 differences"
    record_property("figure", f"{form}: {figure}")
