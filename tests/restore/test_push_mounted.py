"""Images that `push` wrote, mounted from a registry: criu restores out of them, and little has to come first."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptfs.model.oci import Reference
from ckptfs.push import PushOptions, open_checkpoint, open_target, push
from ckptfs.settings import Settings
from ckptfs.sources import Source, open_source
from ckptfs.telemetry import NetworkCounters
from tests.support.command import mounted
from tests.support.criu import Checkpoint, restore
from tests.support.docker_registry import DockerRegistry

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]


@dataclass(frozen=True, slots=True)
class Case:
    checkpoint: Checkpoint
    reference: str


def _source(reference: Reference) -> Source:
    return open_source(reference, settings=Settings(), counters=NetworkCounters())


@pytest.fixture(params=["single", "tree"])
def case(request: pytest.FixtureRequest, registry: DockerRegistry) -> Case:
    """A plain directory of criu's images, pushed as it is."""
    checkpoint: Checkpoint = request.getfixturevalue(f"{request.param}_checkpoint")
    text = registry.reference(f"push/mounted:{request.param}")
    reference, options = Reference.parse(text), PushOptions()
    target = open_target(reference, settings=options.settings, counters=NetworkCounters(), plain_http=True)
    with open_checkpoint(str(checkpoint.images), _source, options) as found:
        push(found, target, reference.tag, options)
    return Case(checkpoint, text)


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
def test_a_process_continues(case: Case, lazy: bool, tmp_path: Path) -> None:
    with mounted(case.reference, tmp_path, "--verify", "strict") as mount:
        images = mount.path / "checkpoint"
        with restore(case.checkpoint, tmp_path / "work", images=images, lazy=lazy) as restored:
            restored.assert_continues()
            restored.wait_resident()
        assert mount.status()["errors"] == []


def test_metadata_is_there_after_two_round_trips(case: Case, tmp_path: Path) -> None:
    with mounted(case.reference, tmp_path, "--no-background-fetch", "--prefetch", "none") as mount:
        before = mount.status()["network"]["bytes"]
        for path in sorted((mount.path / "checkpoint").iterdir()):
            if path.suffix == ".img" and not path.name.startswith("pages-"):
                assert path.read_bytes() == (case.checkpoint.images / path.name).read_bytes()
        status = mount.status()
        assert status["network"]["bytes"] == before
        assert status["round_trips_to_ready"] <= 2
