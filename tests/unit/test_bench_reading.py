"""What a benchmark reads in criu's place: the order, recorded traces, and the replay."""

import json
import tarfile
from pathlib import Path

import pytest
import zstandard

from bench.rows import all_rows
from bench.rows.increments import changed_pages
from ckptfs.bench.reading import Piece, reading_of, recorded_reading, replay, whole_files
from ckptfs.errors import FormatError
from tests.support.push import tree_images, two_checkpoints

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "top").mkdir()
    tree_images(tmp_path / "top" / "checkpoint")
    return tmp_path / "top"


def test_a_restore_with_lazy_pages_reads_little_before_the_process_runs(checkpoint: Path) -> None:
    plain, lazy = (reading_of(checkpoint, lazy=lazy) for lazy in (False, True))
    pages = sum(path.stat().st_size for path in (checkpoint / "checkpoint").glob("pages-*.img"))
    assert plain.rest == ()
    assert plain.bytes == lazy.bytes >= pages
    assert lazy.start_bytes < plain.start_bytes
    assert lazy.start[0][0][0].path == "checkpoint/inventory.img"


@pytest.mark.parametrize("lazy", [False, True])
def test_a_replay_reads_every_byte(lazy: bool, checkpoint: Path) -> None:
    reading = reading_of(checkpoint, lazy=lazy)
    assert replay(checkpoint, reading.start) == reading.start_bytes
    assert replay(checkpoint, reading.rest) == reading.bytes - reading.start_bytes


def test_what_is_no_checkpoint_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(bytes(3_000_000))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c").write_bytes(b"c")
    (tmp_path / "link").symlink_to("b")
    reading = reading_of(tmp_path, lazy=True)
    assert whole_files(tmp_path) == reading.start[0][0] == (Piece("b", 0, 3_000_000), Piece("a/c", 0, 1))
    assert replay(tmp_path, reading.start) == 3_000_001


def test_many_files_need_few_descriptors(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / str(number)).write_bytes(b"x")
    assert replay(tmp_path, [(whole_files(tmp_path),)]) == 200


def test_a_trace_is_replayed_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "pages").write_bytes(bytes(10_000))
    accesses = [("pages", 4096, 4096), ("pages", 0, 4096)]
    lines = [json.dumps({"t_ms": 1, "path": p, "offset": o, "length": n, "hit": True}) for p, o, n in accesses]
    (tmp_path / "trace").write_text("\n".join(lines))
    reading = recorded_reading(tmp_path / "trace")
    assert reading.start[0][0] == tuple(Piece(*access) for access in accesses)
    assert replay(tmp_path, reading.start) == 8192


@pytest.mark.parametrize("line", ["x", "[]", "{}", '{"path": "a", "offset": 0, "length": "many"}'])
def test_a_broken_trace_names_the_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(f'{{"path": "a", "offset": 0, "length": 1}}\n{line}\n')
    with pytest.raises(FormatError, match="line 2 is no access"):
        recorded_reading(tmp_path / "trace")


def test_changed_pages_of_two_checkpoints(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    for which in ("first", "second"):
        with tarfile.open(tmp_path / f"{which}.tar") as archive:
            archive.extractall(tmp_path / which, filter="fully_trusted")
    changed = b"".join(changed_pages(tmp_path / "first/checkpoint", tmp_path / "second/checkpoint"))
    known = json.loads((DATA / "two/pages.json").read_text())
    assert len(changed) == known["changed_bytes"]
    assert len(zstandard.compress(changed, 3)) == pytest.approx(known["changed_bytes_zstd3"], rel=0.02)


def test_every_figure_has_one_row() -> None:
    names = [row.name for row in all_rows()]
    assert len(set(names)) == len(names)
    assert {"P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P10", "P11", "P12"} <= set(names)
