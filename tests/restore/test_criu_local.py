"""criu itself, from local directories: what every restore through a mount is compared with."""

from pathlib import Path

import pytest

from tests.support.criu import Checkpoint, restore

pytestmark = pytest.mark.restore


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
@pytest.mark.parametrize("which", ["single_checkpoint", "tree_checkpoint"])
def test_a_restored_process_continues(which: str, lazy: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(which)
    with restore(checkpoint, tmp_path, lazy=lazy) as restored:
        first = restored.first_tick()
        assert first.number == checkpoint.last_tick(first.role) + 1
        restored.assert_continues()
        restored.wait_resident()
    assert not any(Path(f"/proc/{pid}").exists() for pid in checkpoint.pids.values())


def test_a_failed_restore_says_why_and_leaves_nothing(single_checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(RuntimeError, match="criu restore failed"),
        restore(single_checkpoint, tmp_path / "work", images=tmp_path / "empty"),
    ):
        pass
