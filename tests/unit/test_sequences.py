"""Telling sequential readers from random ones, and a reader that is both from either."""

from ckptfs.engine.reader import Handle
from ckptfs.model.toc import Inode
from ckptfs.settings import KiB, MiB

PAGE = 4 * KiB


def handle() -> Handle:
    return Handle(Inode(0o100644, size=1 << 40))


def reads(one: Handle, *places: tuple[int, int]) -> list[bool]:
    return [one.observe(offset, size) for offset, size in places]


def test_half_a_mebibyte_from_the_front_is_a_sequence() -> None:
    assert reads(handle(), *((n * 128 * KiB, 128 * KiB) for n in range(5))) == [False, False, False, True, True]


def test_random_reads_are_none() -> None:
    assert not any(reads(handle(), *((n * 37 * MiB, 1 * MiB) for n in range(1, 20))))


def test_a_sequence_may_begin_anywhere() -> None:
    assert reads(handle(), *((n * MiB, 1 * MiB) for n in range(100, 103))) == [False, True, True]


def test_the_kernel_reading_ahead_may_overtake_itself() -> None:
    assert all(reads(handle(), *((n * MiB, 1 * MiB) for n in (0, 2, 1, 3, 5, 4))))


def test_page_faults_leave_the_sequence_where_it_is() -> None:
    """criu's lazy-pages daemon: pieces that grow from 64 KiB, single pages between them, some side by side."""
    one, position, seen = handle(), 0, []
    for fault in range(12):
        for step in (1, 2, 3):
            seen.append(one.observe(position, step * 64 * KiB))
            position += step * 64 * KiB
        assert reads(one, (500 * MiB + fault * PAGE, PAGE)) == [False]
    assert seen == [*[False] * 4, *[True] * 32]
    assert one.expected == position


def test_a_page_that_was_there_already_makes_a_gap_and_no_new_sequence() -> None:
    one = handle()
    assert reads(one, (0, 1 * MiB), (1 * MiB + PAGE, 64 * KiB), (3 * MiB, 64 * KiB)) == [True, True, True]


def test_small_direct_reads_in_sequence_are_one() -> None:
    assert reads(handle(), *((n * PAGE, PAGE) for n in range(128)))[-1]
