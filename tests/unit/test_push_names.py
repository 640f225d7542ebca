"""Names of files in a checkpoint that mean something else in a layer, or in the layers of some format."""

from pathlib import Path

import pytest

from ckptfs.errors import FormatError
from tests.support.push import push_to_layout
from tests.unit.test_push_image import checkpoint


def test_names_that_one_format_gives_its_own_files_are_names_like_others(tmp_path: Path) -> None:
    folder, layout = checkpoint(tmp_path), tmp_path / "layout"
    (folder / "stargz.index.json").write_text("{}")
    (folder / "such-a-link").hardlink_to(folder / "stargz.index.json")
    first = push_to_layout(folder, layout)
    again = push_to_layout(f"oci:{layout}:latest", layout, "again")
    assert again.manifest == first.manifest


@pytest.mark.parametrize("name", [".wh.gone", ".wh..wh..opq"])
def test_a_name_that_means_a_deletion_is_refused(name: str, tmp_path: Path) -> None:
    """It would not be there in the image, nor would what it deletes."""
    folder = checkpoint(tmp_path)
    (folder / "artifacts" / name).touch()
    with pytest.raises(FormatError, match=name):
        push_to_layout(folder, tmp_path / "layout")
