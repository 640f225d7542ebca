"""The scheduler's decisions: order, extents, room on the link. No I/O, no clock."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfs.engine.schedule import Job, Priority, Scheduler, ranges_of
from ckptfs.model.toc import Chunk
from ckptfs.settings import KiB, MiB, Sizes

SIZE = 256 * KiB


def chunk(number: int, layer: int = 0, size: int = SIZE) -> Chunk:
    return Chunk(b"%d/%d" % (layer, number), layer, number * SIZE, size, SIZE)


def drain(scheduler: Scheduler) -> list[Job]:
    """All jobs, each finished before the next is asked for."""
    jobs = []
    while (job := scheduler.next_job()) is not None:
        jobs.append(job)
    return jobs


def numbers(job: Job) -> list[int]:
    return [c.offset // SIZE for c in job.chunks]


def test_demand_before_prefetch_before_background() -> None:
    scheduler = Scheduler(Sizes())
    scheduler.want(chunk(90), Priority.BACKGROUND)
    scheduler.want(chunk(50), Priority.PREFETCH)
    scheduler.want(chunk(10), Priority.DEMAND)
    assert [job.priority for job in drain(scheduler)] == [Priority.DEMAND, Priority.PREFETCH, Priority.BACKGROUND]


def test_neighbours_become_one_extent_up_to_the_limit() -> None:
    scheduler = Scheduler(Sizes())
    for number in range(40):
        scheduler.want(chunk(number), Priority.DEMAND)
    jobs = drain(scheduler)
    assert [job.size for job in jobs] == [4 * MiB, 4 * MiB, 2 * MiB]
    assert [n for job in jobs for n in numbers(job)] == list(range(40))


def test_what_a_neighbours_job_has_taken_is_not_pending() -> None:
    scheduler = Scheduler(Sizes())
    for number in range(600):
        scheduler.want(Chunk(b"%d" % number, 0, number * KiB, KiB, KiB), Priority.BACKGROUND)
    scheduler.want(chunk(700), Priority.BACKGROUND)
    scheduler.want(chunk(700), Priority.PREFETCH)
    assert [scheduler.pending(priority) for priority in Priority] == [0, 1, 600]
    drain(scheduler)
    assert [scheduler.pending(priority) for priority in Priority] == [0, 0, 0]
    scheduler.want(chunk(1), Priority.BACKGROUND)
    scheduler.forget(Priority.BACKGROUND)
    assert not scheduler.pending(Priority.BACKGROUND)


def test_small_gaps_are_bridged_and_large_ones_are_not() -> None:
    scheduler = Scheduler(Sizes()._replace(coalesce_gap=SIZE))
    for number in (0, 2, 5):
        scheduler.want(chunk(number), Priority.DEMAND)
    assert [numbers(job) for job in drain(scheduler)] == [[0, 2], [5]]


def test_a_demand_takes_wanted_neighbours_along() -> None:
    scheduler = Scheduler(Sizes())
    scheduler.want(chunk(1), Priority.BACKGROUND)
    scheduler.want(chunk(0), Priority.DEMAND)
    assert [numbers(job) for job in drain(scheduler)] == [[0, 1]]


def test_a_demand_takes_no_more_along_than_a_quarter_of_the_window() -> None:
    scheduler = Scheduler(Sizes())
    scheduler.window = 3 * MiB
    for number in range(20):
        scheduler.want(chunk(number), Priority.BACKGROUND)
    scheduler.want(chunk(0), Priority.DEMAND)
    scheduler.want(chunk(10), Priority.DEMAND)
    scheduler.want(chunk(11), Priority.DEMAND)
    jobs = [scheduler.next_job(), scheduler.next_job()]
    assert [numbers(job) for job in jobs if job is not None] == [[0, 1, 2], [10, 11, 12]]


def test_nothing_is_started_that_would_overfill_the_window() -> None:
    scheduler = Scheduler(Sizes())
    scheduler.window = 2 * MiB
    for number in range(20):
        scheduler.want(chunk(number), Priority.BACKGROUND)
    while (job := scheduler.next_job()) is not None:
        scheduler.running.append(job)
    assert [job.size for job in scheduler.running] == [1 * MiB, 1 * MiB]
    scheduler.running[0].received = 1 * MiB - 1
    assert scheduler.next_job() is None
    scheduler.running[0].received = 1 * MiB
    assert scheduler.next_job() is not None


def test_asking_again_only_raises() -> None:
    scheduler = Scheduler(Sizes())
    scheduler.want(chunk(0), Priority.BACKGROUND)
    scheduler.want(chunk(0), Priority.DEMAND)
    scheduler.want(chunk(0), Priority.PREFETCH)
    jobs = drain(scheduler)
    assert [(job.priority, numbers(job)) for job in jobs] == [(Priority.DEMAND, [0])]


def test_layers_are_fetched_apart() -> None:
    scheduler = Scheduler(Sizes())
    scheduler.want(chunk(0, layer=0), Priority.DEMAND)
    scheduler.want(chunk(1, layer=1), Priority.DEMAND)
    assert [job.layer for job in drain(scheduler)] == [0, 1]


def test_prefetch_leaves_room_on_the_link_and_demand_needs_none() -> None:
    scheduler = Scheduler(Sizes())
    scheduler.window = 4 * MiB
    for number in range(64):
        scheduler.want(chunk(number), Priority.PREFETCH)
    while (job := scheduler.next_job()) is not None:
        scheduler.running.append(job)
    under_way = sum(job.size for job in scheduler.running)
    assert 4 * MiB <= under_way <= 6 * MiB
    scheduler.want(chunk(1000), Priority.DEMAND)
    job = scheduler.next_job()
    assert job is not None and job.priority is Priority.DEMAND


def test_background_waits_for_free_connections() -> None:
    sizes = Sizes()
    scheduler = Scheduler(sizes)
    scheduler.window = 1 << 40
    for number in range(sizes.background_jobs + 3):
        scheduler.want(chunk(number * 1000), Priority.BACKGROUND)
    while (job := scheduler.next_job()) is not None:
        scheduler.running.append(job)
    assert len(scheduler.running) == sizes.background_jobs


def test_prefetch_takes_no_more_requests_than_it_is_given_and_demand_does() -> None:
    scheduler = Scheduler(Sizes())
    scheduler.window = 1 << 40
    scheduler.jobs = 2
    for number in range(4):
        scheduler.want(chunk(number * 1000), Priority.PREFETCH)
    while (job := scheduler.next_job()) is not None:
        scheduler.running.append(job)
    assert len(scheduler.running) == 2
    scheduler.want(chunk(9999), Priority.DEMAND)
    job = scheduler.next_job()
    assert job is not None and job.priority is Priority.DEMAND


def test_forgetting_drops_what_has_not_started() -> None:
    scheduler = Scheduler(Sizes())
    scheduler.want(chunk(0), Priority.PREFETCH)
    scheduler.want(chunk(50), Priority.DEMAND)
    scheduler.forget(Priority.PREFETCH)
    assert [numbers(job) for job in drain(scheduler)] == [[50]]


def test_chunks_that_share_one_encoded_range() -> None:
    """eStargz: several chunks lie in one gzip member."""
    scheduler = Scheduler(Sizes())
    shared = [Chunk(b"k%d" % i, 0, 100, 50, 10, None, i * 10) for i in range(3)]
    for one in reversed(shared):
        scheduler.want(one, Priority.DEMAND)
    jobs = drain(scheduler)
    assert sorted(c.key for job in jobs for c in job.chunks) == [b"k0", b"k1", b"k2"]
    assert all((job.start, job.end) == (100, 150) for job in jobs)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from(list(Priority))), max_size=80))
def test_everything_wanted_is_fetched_exactly_once(wants: list[tuple[int, Priority]]) -> None:
    scheduler = Scheduler(Sizes())
    for number, priority in wants:
        scheduler.want(chunk(number), priority)
    jobs = drain(scheduler)
    fetched = [n for job in jobs for n in numbers(job)]
    assert sorted(fetched) == sorted({number for number, _ in wants})
    for job in jobs:
        assert job.chunks == sorted(job.chunks, key=lambda c: c.offset)
        assert job.start == job.chunks[0].offset and job.end >= job.chunks[-1].offset + SIZE


def test_small_chunks_anywhere_are_asked_for_together_where_that_is_possible() -> None:
    scheduler = Scheduler(Sizes(), ranges_at_once=lambda layer: 4 if layer == 0 else 1)
    small = [chunk(number, size=8 * KiB) for number in (90, 10, 50, 30, 70, 20)]
    for one in [*small[:2], chunk(60, layer=1, size=8 * KiB), chunk(80), *small[2:]]:
        scheduler.want(one, Priority.PREFETCH)
    first, *others = drain(scheduler)
    assert first.scattered
    assert numbers(first) == [10, 30, 50, 90]  # the queue's first four, by place
    assert first.size == 4 * 8 * KiB  # not what is between them
    assert [numbers(job) for job in others] == [[60], [80], [20, 70]]


def test_who_waits_for_a_chunk_does_not_wait_for_others_far_away() -> None:
    scheduler = Scheduler(Sizes(), ranges_at_once=lambda _: 4)
    for number in (10, 50):
        scheduler.want(chunk(number, size=8 * KiB), Priority.DEMAND)
        scheduler.want(chunk(number + 100, size=8 * KiB), Priority.BACKGROUND)
    assert all(not job.scattered and len(job.chunks) == 1 for job in drain(scheduler))


@given(st.lists(st.integers(0, 200), min_size=1, unique=True), st.booleans())
def test_ranges_hold_their_chunks_and_ascend(places: list[int], apart: bool) -> None:
    chunks = [Chunk(b"%d" % place, 0, place * 700, 1000, 1000) for place in sorted(places)]
    ranges = ranges_of(chunks, apart=apart)
    assert all(any(start <= c.offset and c.offset + c.size <= end for start, end in ranges) for c in chunks)
    assert all(before[1] < after[0] for before, after in pairwise(ranges))
    assert apart or len(ranges) == 1
