"""Layers that are something else than they are called: compressed tars that are called plain, tables without names.

podman and docker look at the bytes, and so does everything here.
"""

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import zstandard

from ckptfs.control.client import MountFiles, ask
from ckptfs.image.rootfs import _names
from ckptfs.model.oci import Manifest, Reference
from ckptfs.settings import KiB, MiB, Settings
from ckptfs.sources import open_source
from ckptfs.telemetry import NetworkCounters
from tests.support.blobs import TAR, blob_of
from tests.support.command import ckptfs, mounted
from tests.support.docker_registry import DockerRegistry
from tests.support.pushed import push_image, target
from tests.support.tars import END, member
from tests.support.tools import require, run
from tests.support.trees import layout_of
from tests.support.views import show

pytestmark = [pytest.mark.registry, pytest.mark.fuse]

BIG = Random(5).randbytes(3 * MiB)
LAYER = member(b"checkpoint/inventory.img", b"x") + member(b"checkpoint/pages-1.img", BIG) + END
UPPER = member(b"rootfs/file", b"of a layer above") + END
LATIN = (b"caf\xe8", b"caf\xe9")
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstandard.compress}


@pytest.fixture(params=COMPRESSED)
def reference(request: pytest.FixtureRequest, registry: DockerRegistry) -> str:
    repository = f"mislabelled/{request.param}"
    layers = [blob_of(COMPRESSED[request.param](LAYER), TAR), blob_of(UPPER, TAR)]
    push_image(target(registry, repository), "1", layers)
    return registry.reference(f"{repository}:1")


@pytest.mark.parametrize("option", ["--background-fetch", "--no-background-fetch"])
def test_a_mount_shows_what_is_in_it(option: str, reference: str, tmp_path: Path) -> None:
    require("fusermount3")
    for formats in ({"gzip", "tar"}, {"zstd", "tar"}), ({"gzip+index", "tar"}, {"zstd+index", "tar"}):
        with mounted(reference, tmp_path, "--view", "raw", option) as mount:
            assert sorted(os.listdir(mount.path)) == ["checkpoint", "rootfs"]
            assert (mount.path / "checkpoint" / "pages-1.img").read_bytes() == BIG
            assert (mount.path / "rootfs" / "file").read_bytes() == b"of a layer above"
            status = ask(MountFiles.of(str(mount.path)), "status", detail=True)
            assert {part["name"].partition(" ")[0] for part in status["layers"]} in formats
            assert status["errors"] == [] and status["image_bytes"] < len(LAYER) + 64 * KiB


def test_commands_read_it_once(reference: str, tmp_path: Path) -> None:
    cache = ("--cache-dir", tmp_path / "cache")
    assert "pages-1.img" in ckptfs("ls", reference, "checkpoint", *cache).out
    done = ckptfs("pull", reference, tmp_path / "files", "--json")
    assert done.code == 0, done.err
    assert (tmp_path / "files" / "checkpoint" / "pages-1.img").read_bytes() == BIG
    assert done.json["network"]["bytes"] < len(LAYER) + 512 * KiB


def test_strict_refuses_it_as_it_refuses_other_streams(reference: str, tmp_path: Path) -> None:
    done = ckptfs("ls", reference, "--verify", "strict", "--cache-dir", tmp_path)
    assert done.code == 6 and "cannot be verified chunk by chunk" in done.line


def test_an_index_makes_it_as_good_as_others(reference: str, tmp_path: Path) -> None:
    """`ckptfs index` goes by the bytes as well."""
    done = ckptfs("index", reference, "--cache-dir", tmp_path / "indexer", "--json")
    assert (done.code, len(done.json["layers"])) == (0, 2), done.err
    strict = ("--verify", "strict", "--cache-dir", tmp_path / "cache")
    assert "pages-1.img" in ckptfs("ls", reference, "checkpoint", *strict).out
    show(reference, tmp_path / "shown", "raw")
    assert ckptfs("cp", reference, "checkpoint/pages-1.img", tmp_path / "pages", *strict).code == 0
    assert (tmp_path / "pages").read_bytes() == BIG


def test_a_base_image_gives_its_directories(reference: str) -> None:
    """What lies above a delta: `mount --base`."""
    source = open_source(Reference.parse(reference), settings=Settings(), counters=NetworkCounters())
    manifest = source.resolve()
    assert isinstance(manifest, Manifest)
    tree = _names(source, manifest.layers, Settings())
    assert tree.find(b"checkpoint/pages-1.img") is not None and tree.find(b"rootfs/file") is not None


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    """A layout whose only layer is zstd:chunked, by skopeo: its table calls both files the same."""
    require("skopeo")
    source, target = tmp_path / "source", tmp_path / "lost"
    layout_of(b"".join(member(name, name) for name in (*LATIN, b"checkpoint/inventory.img")) + END, source)
    run("skopeo", "copy", "--dest-compress-format", "zstd:chunked", f"oci:{source}:latest", f"oci:{target}:latest")
    return target


def test_names_that_a_table_has_lost_are_those_of_the_tar(lost: Path, tmp_path: Path) -> None:
    done = ckptfs("pull", f"oci:{lost}", tmp_path / "files", "--view", "raw")
    assert done.code == 0, done.err
    folder = os.fsencode(tmp_path / "files")
    for name in LATIN:
        assert Path(os.fsdecode(os.path.join(folder, name))).read_bytes() == name
    assert ckptfs("push", f"oci:{lost}", f"oci:{tmp_path}/pushed:latest").code == 0
    for layout in ("lost", "lost", "pushed"):  # the second time out of what the first has learnt
        names = show(f"oci:{tmp_path / layout}", tmp_path / f"{layout}-cache", "raw").entries
        assert {os.fsdecode(name) for name in LATIN} < set(names)


def test_strict_refuses_a_table_that_has_lost_names(lost: Path, tmp_path: Path) -> None:
    done = ckptfs("ls", f"oci:{lost}", "--verify", "strict", "--cache-dir", tmp_path / "cache")
    assert done.code == 7 and "has lost names that are not UTF-8" in done.err and "--verify auto" in done.err
