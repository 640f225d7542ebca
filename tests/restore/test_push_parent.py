"""`push --parent`: the next checkpoint of a process as an increment, restored by an unmodified criu in every way."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.lab import heap
from tests.support.command import ckptfs, mounted
from tests.support.criu import Checkpoint, dump, require_criu, restore
from tests.support.docker_registry import DockerRegistry
from tests.support.tools import require, run
from tests.support.workload import Workload, process_tree, ticker

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]

_PROCESSES: dict[str, Callable[[Path], AbstractContextManager[Workload]]] = {
    "static": lambda folder: ticker(folder, 16, dirty=4),
    "python": lambda folder: heap(folder, 16),
    "tree": lambda folder: process_tree(folder, 16),
}


@dataclass(frozen=True)
class Series:
    """Checkpoints of one running process, each pushed on top of the one before, and what each push said."""

    checkpoints: list[Checkpoint]
    references: list[str]
    facts: list[dict[str, object]]


@pytest.fixture(scope="module", params=list(_PROCESSES))
def series(request: pytest.FixtureRequest, registry: DockerRegistry, scratch_folder: Path) -> Iterator[Series]:
    require_criu()
    folder = scratch_folder / f"series-{request.param}"
    folder.mkdir()
    checkpoints = []
    with _PROCESSES[request.param](folder) as workload:
        for number in range(3):
            checkpoints.append(dump(workload, folder / str(number), keep_running=True))
            time.sleep(0.5)
    references, facts = [], []
    for number, checkpoint in enumerate(checkpoints):
        reference = registry.reference(f"parent/{request.param}:{number}")
        parent = ("--parent", references[-1]) if references else ()
        pushed = ckptfs("push", checkpoint.images, reference, "--json", *parent)
        assert pushed.code == 0, pushed.err
        references.append(reference)
        facts.append(pushed.json)
    yield Series(checkpoints, references, facts)
    shutil.rmtree(folder)


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
@pytest.mark.parametrize("number", [1, 2], ids=["second", "third"])
def test_a_process_continues_from_a_mount(series: Series, number: int, lazy: bool, tmp_path: Path) -> None:
    checkpoint = series.checkpoints[number]
    with mounted(series.references[number], tmp_path, "--verify", "strict") as mount:
        images = mount.path / "checkpoint"
        assert sorted(os.listdir(images)) == sorted(os.listdir(checkpoint.images))
        with restore(checkpoint, tmp_path / "work", images=images, lazy=lazy) as restored:
            restored.assert_continues()
            restored.wait_resident()
        assert mount.status()["errors"] == []


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
@pytest.mark.parametrize("number", [1, 2], ids=["second", "third"])
def test_a_process_continues_from_an_unpacked_image(series: Series, number: int, lazy: bool, tmp_path: Path) -> None:
    """The image as criu itself reads it: a copy by skopeo (gzip, for umoci 0.4), unpacked by umoci."""
    require("skopeo", "umoci")
    checkpoint = series.checkpoints[number]
    how = ("--src-tls-verify=false", "--dest-compress", "--dest-compress-format=gzip")
    run("skopeo", "copy", "--quiet", *how, f"docker://{series.references[number]}", f"oci:{tmp_path}/copy:it")
    run("umoci", "unpack", "--image", f"{tmp_path}/copy:it", tmp_path / "bundle")
    images = tmp_path / "bundle" / "rootfs" / "checkpoint"
    assert (images / "parent").is_dir()
    with restore(checkpoint, tmp_path / "work", images=images, lazy=lazy) as restored:
        restored.assert_continues()
        restored.wait_resident()


def test_the_view_is_what_was_dumped(series: Series, tmp_path: Path) -> None:
    for number, reference in enumerate(series.references):
        files, dumped = tmp_path / str(number), series.checkpoints[number].images
        assert ckptfs("pull", reference, files).code == 0
        assert sorted(os.listdir(files / "checkpoint")) == sorted(os.listdir(dumped))
        for path in dumped.iterdir():
            assert (files / "checkpoint" / path.name).read_bytes() == path.read_bytes(), path.name


def test_pushed_again_without_its_parents_it_is_what_the_dump_is(series: Series, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    again = ckptfs("push", series.references[2], f"oci:{whole}:again", "--json").json
    assert again["digest"] == ckptfs("push", series.checkpoints[2].images, f"oci:{whole}:dump", "--json").json["digest"]


def test_the_second_push_sends_what_has_changed(series: Series, registry: DockerRegistry) -> None:
    first, second, third = series.facts
    assert first["parent"] is None
    for earlier, facts in ((first, second), (second, third)):
        parent = facts["parent"]
        assert isinstance(parent, dict)
        assert parent["digest"] == earlier["digest"]
        assert parent["shared"] > parent["changed"]
        assert isinstance(facts["sent"], int) and isinstance(first["sent"], int)
        assert facts["sent"] < first["sent"] / 2
    again = ckptfs(
        "push", series.checkpoints[2].images, series.references[2], "--json", "--parent", series.references[1]
    )
    assert again.json["digest"] == third["digest"] and again.json["sent"] == 0


def test_inspect_tells_of_the_parent(series: Series) -> None:
    facts = ckptfs("inspect", series.references[1], "--json").json
    assert facts["parent"] == series.facts[0]["digest"]
    assert f"{series.facts[0]['digest']}" in ckptfs("inspect", series.references[1]).out
    assert ckptfs("inspect", series.references[0], "--json").json["parent"] is None


def test_the_index_is_enough_for_the_metadata(series: Series, tmp_path: Path) -> None:
    with mounted(series.references[2], tmp_path, "--no-background-fetch", "--prefetch", "none") as mount:
        before = mount.status()["network"]["bytes"]
        for path in sorted((mount.path / "checkpoint").iterdir()):
            if path.suffix == ".img" and not path.name.startswith("pages-"):
                path.read_bytes()
        status = mount.status()
        assert status["network"]["bytes"] == before
        assert status["round_trips_to_ready"] <= 2
