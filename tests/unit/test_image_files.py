"""An open image as inspection reads it: names, links, ranges, and how many requests they cost."""

import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from ckptfs.errors import FormatError, NotFoundError
from ckptfs.inspection.image_files import ImageFiles, in_thread
from ckptfs.inspection.memory import ProcessMemory
from ckptfs.inspection.overview import inspect, open_images
from ckptfs.inspection.source import CheckpointFiles
from ckptfs.telemetry import NetworkCounters
from tests.support.counted import with_layouts
from tests.support.criu_images import CORPUS, pagemap, unpack_tree
from tests.support.push import push_to_layout
from tests.support.trees import layout_of

T = TypeVar("T")
P = 4096


def look(layout: Path, cache: Path, work: Callable[[ImageFiles], T]) -> tuple[T, NetworkCounters]:
    return with_layouts([layout], cache, lambda images: in_thread(images[0], work))


def layout_with(folder: Path, make: Callable[[Path], None]) -> Path:
    """An image of one plain tar layer that holds what `make` puts into a directory."""
    root = folder / "root"
    root.mkdir(parents=True)
    make(root)
    with tarfile.open(folder / "layer.tar", "w") as archive:
        archive.add(root, ".")
    return layout_of((folder / "layer.tar").read_bytes(), folder)


def links(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_bytes(b"0123")
    (root / "a" / "empty").write_bytes(b"")
    (root / "a" / "up").symlink_to("../a/b/./file")
    (root / "to-b").symlink_to("a/b")
    (root / "etc").symlink_to("/etc")
    (root / "out").symlink_to("../../a")
    (root / "loop").symlink_to("loop")
    (root / "nowhere").symlink_to("none")


def test_names_links_and_ranges(tmp_path: Path) -> None:
    def work(files: ImageFiles) -> None:
        checked: CheckpointFiles = files
        assert checked.list("") == ["a/", "etc", "loop", "nowhere", "out", "to-b"]
        assert checked.list("a") == ["b/", "empty", "up"] and checked.list("to-b") == ["file"]
        assert checked.list("none") == checked.list("a/empty") == checked.list("etc") == checked.list("loop") == []
        for path in ("a/b/file", "a/up", "to-b/file", "a/b/../../to-b/file"):
            assert files.size(path) == 4 and files.read(path, 1, 2) == b"12"
        assert files.size("a/empty") == 0 and files.read("a/empty", 0, 0) == b""
        for path in ("a", "none", "etc/passwd", "out/b/file", "loop", "nowhere", "a/b/file/more", "to-b"):
            assert files.size(path) is None
            with pytest.raises(NotFoundError):
                files.read(path, 0, 1)
        with pytest.raises(FormatError, match="ends before byte 5"):
            files.read("a/up", 4, 1)
        files.expect([("a/up", 0, 4), ("none", 0, 1), ("a/empty", 0, 0)])

    look(layout_with(tmp_path, links), tmp_path / "cache", work)


def test_walking(tmp_path: Path) -> None:
    found, _ = look(layout_with(tmp_path, links), tmp_path / "cache", lambda files: dict(files.walk()))
    assert sorted(found) == ["a", "a/b", "a/b/file", "a/empty", "a/up", "etc", "loop", "nowhere", "out", "to-b"]
    assert found["out"].target == b"../../a" and found["a"].is_dir

    some, _ = look(layout_with(tmp_path / "x", links), tmp_path / "cache", lambda f: list(f.walk(lambda p: p == "a")))
    assert [path for path, _ in some if path.startswith("a/")] == ["a/b", "a/empty", "a/up"]


def test_a_parent_checkpoint_is_found_through_its_link(tmp_path: Path) -> None:
    """As podman lays out a checkpoint with a pre-checkpoint; nothing is read that was not announced."""

    def make(root: Path) -> None:
        unpack_tree(root)
        (root / "pre-checkpoint").mkdir()
        for file in root.glob("checkpoint/pagemap-144*.img"):
            (root / "pre-checkpoint" / file.name).write_bytes(file.read_bytes())
        for file in root.glob("checkpoint/pages-*.img"):
            file.rename(root / "pre-checkpoint" / file.name)
        (root / "checkpoint" / "parent").symlink_to("../pre-checkpoint")
        for file in root.glob("checkpoint/pagemap-144*.img"):
            runs = [(area, length // P, 1) for area, length in areas[int(file.stem[8:])]]
            file.write_bytes(pagemap(99, *runs))

    areas: dict[int, list[tuple[int, int]]] = {}

    def work(files: ImageFiles) -> list[tuple[str, ...] | None]:
        overview = inspect(files)
        images = open_images(files)
        areas.update((p.pid, list(ProcessMemory(images, p.pid).areas())) for p in overview.processes)
        return [process.arguments for process in overview.processes]

    plain, _ = look(layout_with(tmp_path / "plain", lambda root: unpack_tree(root) and None), tmp_path / "c1", work)
    incremental, counters = look(layout_with(tmp_path / "incremental", make), tmp_path / "c2", work)
    assert incremental == plain and plain[0] is not None and plain[0][0].endswith("tree")
    assert counters.round_trips(math.inf) <= 4


def test_what_is_announced_is_one_round_trip(tmp_path: Path) -> None:
    push_to_layout(f"oci:{CORPUS}/counter/k8s-zstd.oci", tmp_path / "pushed.oci")
    size = 1630208

    def announced(files: ImageFiles) -> None:
        parts = [("checkpoint/pages-1.img", offset, P) for offset in range(0, size, 400_000)]
        files.expect([*parts, ("rootfs-diff.tar", 0, 512)])
        for part in parts:
            files.read(*part)
        files.read("rootfs-diff.tar", 0, 512)

    def surprising(files: ImageFiles) -> None:
        for offset in range(0, size, 400_000):
            files.read("checkpoint/pages-1.img", offset, P)

    _, counters = look(tmp_path / "pushed.oci", tmp_path / "c1", announced)
    assert counters.round_trips(math.inf) == 2  # the manifest comes first
    _, counters = look(tmp_path / "pushed.oci", tmp_path / "c2", surprising)
    assert counters.round_trips(math.inf) == 6
