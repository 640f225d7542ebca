"""P11: the next checkpoint of a process, mounted on a node that has mounted the one before."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import ckptfs, mounted
from tests.support.docker_registry import DockerRegistry
from tests.support.push import DATA, two_checkpoints
from tests.support.tools import require, wait_for

pytestmark = [pytest.mark.fuse, pytest.mark.registry]

CHANGED = json.loads((DATA / "two" / "pages.json").read_bytes())["changed_bytes_zstd3"]


@pytest.fixture(scope="module")
def references(registry: DockerRegistry, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two checkpoints of one process, pushed to one repository."""
    require("fusermount3")
    folder = tmp_path_factory.mktemp("two")
    two_checkpoints(folder)
    names = {name: registry.reference(f"next/checkpoint:{name}") for name in ("first", "second", "increment")}
    for name in ("first", "second"):
        assert ckptfs("push", folder / f"{name}.tar", names[name]).code == 0
    pushed = ckptfs("push", folder / "second.tar", names["increment"], "--parent", names["first"], "--json")
    assert pushed.json["sent"] <= 1.1 * CHANGED
    return names


def fetched(reference: str, folder: Path, *options: str, until_complete: bool = True) -> int:
    """Bytes from the registry for a mount in which all is read."""
    with mounted(reference, folder, *options) as mount:
        for path in sorted((mount.path / "checkpoint").iterdir()):
            path.read_bytes()
        if until_complete:
            wait_for("everything to be here", lambda: mount.status()["complete"])
        return int(mount.status()["network"]["bytes"])


@pytest.mark.parametrize(("second", "most"), [("second", 1.5), ("increment", 1.1)], ids=["whole", "increment"])
@pytest.mark.parametrize("first_fetches_all", [True, False], ids=["background", "only what is read"])
def test_p11_only_what_changed_is_fetched(
    first_fetches_all: bool,
    second: str,
    most: float,
    references: dict[str, str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    options = () if first_fetches_all else ("--no-background-fetch", "--prefetch", "none")
    fetched(references["first"], tmp_path, *options, until_complete=first_fetches_all)
    bytes_ = fetched(references[second], tmp_path, *options, until_complete=first_fetches_all)
    record_property("figure", f"{bytes_ / CHANGED:.2f} x the compressed bytes of the changed pages")
    assert bytes_ <= most * CHANGED
