"""Profiles: from recorded reads to runs, from runs to a document and back, from a document to chunks."""

import json
import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.model.profile import Profile, Run, decode_profile, encode_profile, joined, merged
from ckptfs.model.toc import Chunk, Entry, Extent, Inode
from ckptfs.model.tree import Tree
from ckptfs.prefetch.profile import Recorded
from ckptfs.prefetch.working_set import profile_of
from ckptfs.settings import KiB, Limits, MiB

LIMITS = Limits()
PAGES = b"checkpoint/pages-1.img"
PAGE = 4 * KiB
CHUNK = 256 * KiB
CELL = 16 * KiB


def run(offset: int, length: int = PAGE, at: int = 0, path: bytes = PAGES) -> Run:
    return Run(path, offset, length, at)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_neighbours_of_the_same_time_become_one_run() -> None:
    runs = [run(0, at=5), run(60 * KiB, at=20), run(200 * KiB, at=21)]
    assert joined(runs, LIMITS) == (run(0, 64 * KiB, at=5), run(200 * KiB, at=21))


def test_neighbours_of_another_time_stay_apart() -> None:
    runs = [run(0, at=0), run(PAGE, at=5000)]
    assert joined(runs, LIMITS) == tuple(runs)


def test_what_was_read_twice_counts_when_it_was_read_first() -> None:
    runs = [run(0, 1 * MiB, at=9000), run(512 * KiB, at=10), run(512 * KiB, at=20)]
    found = joined(runs, LIMITS)
    assert found[0] == run(512 * KiB, at=10)
    assert [(r.offset, r.length) for r in found[1:]] == [(0, 512 * KiB), (516 * KiB, 508 * KiB)]


@given(
    st.lists(
        st.builds(
            run,
            st.integers(0, 40).map(lambda n: n * 30 * KiB),
            st.integers(1, 100 * KiB),
            st.integers(0, 3000),
            st.sampled_from([PAGES, b"config.dump"]),
        ),
        max_size=30,
    )
)
def test_runs_cover_what_was_read_once_and_in_order(reads: list[Run]) -> None:
    found = joined(reads, LIMITS)
    assert [r.at for r in found] == sorted(r.at for r in found)
    profile = Profile(found, 3)
    assert decode_profile(encode_profile(profile), LIMITS) == profile, "overlaps would be refused"
    for read in reads:
        assert _covered(read, found)


def _covered(read: Run, runs: Iterable[Run]) -> bool:
    at = read.offset
    for one in sorted((r for r in runs if r.path == read.path), key=lambda r: r.offset):
        if one.offset <= at < one.offset + one.length:
            at = one.offset + one.length
    return at >= read.offset + read.length


def test_profiles_merge() -> None:
    first, second = Profile((run(0, at=100), run(9 * MiB, at=200))), Profile((run(9 * MiB, at=50),), 2)
    assert merged([first, second], LIMITS) == Profile((run(9 * MiB, at=50), run(0, at=100)), 3)


def test_runs_are_limited() -> None:
    limits = LIMITS._replace(profile_runs=3)
    runs = [run(n * MiB) for n in range(4)]
    document = encode_profile(Profile(tuple(runs)))
    assert len(joined(runs[:3], limits)) == 3
    assert len(decode_profile(encode_profile(Profile(tuple(runs[:3]))), limits).runs) == 3
    with pytest.raises(LimitExceeded):
        joined(runs, limits)
    with pytest.raises(LimitExceeded):
        decode_profile(document, limits)
    with pytest.raises(LimitExceeded):
        decode_profile(document, LIMITS._replace(profile_bytes=len(document) - 1))
    assert decode_profile(document, LIMITS._replace(profile_bytes=len(document))).runs == tuple(runs)


# -- documents ---------------------------------------------------------------------------------------------------------


def test_any_name_that_a_file_can_have_survives() -> None:
    profile = Profile((run(0, path=b"caf\xc3\xa9/\xff\xfe\n"),))
    assert decode_profile(encode_profile(profile), LIMITS) == profile


GOOD = {"version": 1, "recordings": 1, "files": ["a", "b"], "runs": [[0, 0, 10, 5], [1, 0, 10, 6], [0, 10, 10, 7]]}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"recordings": 0},
        {"recordings": True},
        {"files": None},
        {"runs": {}},
        {"files": ["a", "a"]},
        {"files": ["a", "../b"]},
        {"files": ["a", "/b"]},
        {"files": ["a", ""]},
        {"files": ["a", 7]},
        {"files": ["a", "b\0"]},
        {"files": ["a", "\ud800"]},
        {"files": ["a", "b" * 5000]},
        {"files": ["a", "b", "c", "d"]},
        {"runs": [[0, 0, 10]]},
        {"runs": [[2, 0, 10, 5], [0, 0, 1, 6]]},
        {"runs": [[-1, 0, 10, 5], [0, 0, 1, 6]]},
        {"runs": [[0, -1, 10, 5], [0, 0, 1, 6]]},
        {"runs": [[0, 0, 0, 5], [0, 0, 1, 6]]},
        {"runs": [[0, 0, 1 << 70, 5], [0, 0, 1, 6]]},
        {"runs": [[0, 0, 1.5, 5], [0, 0, 1, 6]]},
        {"runs": [[0, 0, 10, -1], [0, 10, 1, 6]]},
        {"runs": [[0, 0, 10, 1 << 40], [0, 10, 1, 1 << 41]]},
        {"runs": [[0, 0, 10, 5], [0, 9, 10, 6]]},
        {"runs": [[0, 0, 10, 6], [0, 10, 10, 5]]},
        {"runs": ["x", "y"]},
    ],
    ids=str,
)
def test_what_is_no_profile_is_refused(change: dict[str, object]) -> None:
    decode_profile(json.dumps(GOOD).encode(), LIMITS)
    with pytest.raises(FormatError):
        decode_profile(json.dumps({**GOOD, **change}).encode(), LIMITS)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"[" * 100_000, b"\xff"], ids=lambda raw: str(raw[:5]))
def test_rubbish_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        decode_profile(raw, LIMITS)


# -- recordings --------------------------------------------------------------------------------------------------------


def line(path: str, offset: int, length: int, at: float) -> str:
    return json.dumps({"t_ms": at, "path": path, "offset": offset, "length": length, "hit": False}) + "\n"


def test_page_faults_count_and_what_the_daemon_transfers_does_not() -> None:
    lines, position, faults = [line("config.dump", 0, 900, 1)], 0, []
    for step in range(40):
        size = (1 + step % 5) * 64 * KiB
        lines.append(line(PAGES.decode(), position, size, 100 + step))
        position += size
        fault = 600 * MiB + step * 3 * MiB
        lines.append(line(PAGES.decode(), fault, PAGE, 100.5 + step))
        faults.append(run(fault, at=100 + step))
    found = profile_of(lines, LIMITS).runs
    assert found[0] == Run(b"config.dump", 0, 900, 1)
    assert [one for one in found if one.offset >= 600 * MiB] == faults
    assert sum(one.length for one in found if one.path == PAGES and one.offset < 600 * MiB) <= 512 * KiB


def test_of_a_plain_restore_only_the_other_files_count() -> None:
    lines = [line(PAGES.decode(), n * MiB, MiB, n) for n in range(20)]
    lines += [line("rootfs-diff.tar", n * MiB, MiB, 50 + n) for n in range(20)]
    found = profile_of(lines, LIMITS)
    assert [(one.path, one.length) for one in found.runs] == [(b"rootfs-diff.tar", 20 * MiB)]


def test_what_a_mount_of_many_days_has_read_makes_a_profile() -> None:
    found = profile_of([line("a", 0, 10, 5), line("a", 1 << 20, 10, 40 * 24 * 3600 * 1000)], LIMITS)
    assert len(found.runs) == 2
    assert decode_profile(encode_profile(found), LIMITS) == found


def test_reads_of_nothing_do_not_count() -> None:
    assert profile_of([line("a", 0, 0, 1), line("", 0, 10, 1)], LIMITS).runs == ()


@pytest.mark.parametrize(
    "bad",
    [
        "x\n",
        "{}\n",
        "[]\n",
        line("a", -1, 5, 1),
        line("a", 0, -5, 1),
        '{"t_ms": 1e999, "path": "a"}\n',
        pytest.param("[" * 5000, id="brackets"),
    ],
    ids=str,
)
def test_what_is_no_recording_is_refused(bad: str) -> None:
    with pytest.raises(FormatError, match="line 2"):
        profile_of([line("a", 0, 5, 1), bad], LIMITS)


# -- chunks ------------------------------------------------------------------------------------------------------------


def pieces(size: int, step: int, kind: str) -> list[Extent]:
    """A file in chunks of `step` bytes, which are half as long in the blob."""
    starts = range(0, size, step)
    chunks = [Chunk(f"{kind}{at // step}".encode(), 0, at // 2, step // 2, step) for at in starts]
    return [Extent(at, step, chunk) for at, chunk in zip(starts, chunks, strict=True)]


def tree_of(size: int) -> tuple[Tree, Inode]:
    inode = Inode(0o100600, size=size, extents=pieces(size, CHUNK, "chunk"))
    tree = Tree()
    tree.begin(1, b"")
    tree.add([Entry(b"checkpoint", Inode(0o040700)), Entry(PAGES, inode)], 1, whiteouts="merge")
    tree.finish(1)
    return tree, inode


def keys(recorded: Recorded) -> list[bytes]:
    return [chunk.key for chunk in recorded.plan()]


def test_runs_are_planned_in_their_order_as_chunks() -> None:
    tree, inode = tree_of(2 * MiB)
    recorded = Recorded(Profile((run(5 * CHUNK, at=1), run(CHUNK - PAGE, 2 * PAGE, at=2))), tree)
    assert list(recorded.files) == [inode]
    assert keys(recorded) == [b"chunk5", b"chunk0", b"chunk1"]


def test_what_the_image_does_not_have_is_left_out() -> None:
    tree, _ = tree_of(2 * MiB)
    runs = (run(0, path=b"nothing"), run(0, path=b"checkpoint"), run(2 * MiB - PAGE, 1 << 40), run(1 << 50))
    assert keys(Recorded(Profile(runs), tree)) == [b"chunk7"]


def test_of_a_chunk_of_which_little_is_needed_only_cells_are_fetched() -> None:
    tree, inode = tree_of(2 * MiB)
    dense = [run(3 * CHUNK, 10 * CELL, at=3)]
    sparse = [run(5 * CHUNK + CELL, at=1), run(5 * CHUNK + 9 * CELL - PAGE, 2 * PAGE, at=2)]
    recorded = Recorded(Profile((*sparse, *dense)), tree)
    assert 0.9 * CHUNK / 2 < recorded.spare(inode) - (CHUNK - 10 * CELL) / 2 < CHUNK / 2
    apart = recorded.take_apart({inode: pieces(2 * MiB, CELL, "cell")})
    assert list(apart) == [b"chunk5"] and len(apart[b"chunk5"]) == 16
    assert keys(recorded) == [b"cell81", b"cell88", b"cell89", b"chunk3"]


def test_cells_that_do_not_fit_their_chunk_are_not_used() -> None:
    tree, inode = tree_of(2 * MiB)
    recorded = Recorded(Profile((run(5 * CHUNK),)), tree)
    assert not recorded.take_apart({inode: pieces(2 * MiB, 3 * CELL, "cell")})
    assert keys(recorded) == [b"chunk5"]


def test_a_profile_of_many_files_is_gone_through_once() -> None:
    count = 20_000
    paths = [f"checkpoint/pages-{number}.img".encode() for number in range(count)]
    tree = Tree()
    tree.begin(1, b"")
    inodes = [Inode(0o100600, size=CHUNK, extents=pieces(CHUNK, CHUNK, path.decode())) for path in paths]
    tree.add([Entry(b"checkpoint", Inode(0o040700)), *map(Entry, paths, inodes)], 1, whiteouts="merge")
    tree.finish(1)
    found = decode_profile(encode_profile(Profile(tuple(run(0, path=path) for path in paths))), LIMITS)
    began = time.monotonic()
    recorded = Recorded(found, tree)
    assert sum(recorded.spare(inode) > 0 for inode in recorded.files) == count
    assert time.monotonic() - began < 5
