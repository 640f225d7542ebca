"""One module per figure. A new figure is one module with a `ROW`, and one line here.

A row is a function of the lab that adds samples and figures, each figure with its peer's from the same run.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bench.lab import Lab


@dataclass(frozen=True, slots=True)
class Row:
    """`needs`: commands of the system without which the row is reported as not measured."""

    name: str
    title: str
    measure: Callable[[Lab], None]
    needs: tuple[str, ...] = ()


def all_rows() -> tuple[Row, ...]:
    """In the order in which they run: the small ones first."""
    from bench.rows import (
        at_rest,
        containers,
        cpu_and_memory,
        first_tick,
        increments,
        lazy_peer,
        long_delay,
        many_files,
        many_mounts,
        over_links,
        pauses,
        plain_restore,
        read_everything,
        read_ratio,
        round_trips,
        timeline,
        warm_reads,
        working_set,
    )

    modules = (
        first_tick, plain_restore, timeline, round_trips, read_ratio, pauses, at_rest, read_everything, long_delay,
        warm_reads, cpu_and_memory, many_mounts, increments, working_set, many_files, containers, lazy_peer,
        over_links,
    )  # fmt: skip
    return tuple(module.ROW for module in modules)
