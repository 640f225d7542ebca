"""What a benchmark found out, as JSON lines: one line is one fact, so files can be joined, filtered and plotted again.

Owns the kinds of facts and their spelling in a file. Measures nothing and draws nothing. Written by the benchmark and
`ckptfs bench`, read by report.py and charts.py.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ckptfs.errors import CacheError, FormatError, UsageError

Conditions: TypeAlias = Mapping[str, str | float]


@dataclass(frozen=True, slots=True)
class Stamp:
    """Where and when: the first line of every file. `load` is the load average of the machine at the start."""

    date: str
    commit: str
    version: str
    kernel: str
    machine: str
    load: float
    kind: Literal["stamp"] = "stamp"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one flow. `values` are seconds unless the name says otherwise (bytes, requests, percent)."""

    row: str
    flow: str
    run: int
    conditions: Conditions
    values: Mapping[str, float]
    kind: Literal["sample"] = "sample"


@dataclass(frozen=True, slots=True)
class Series:
    """One run over time: `points` are [seconds, value, …] with the names in `columns`; `marks` are moments by name."""

    row: str
    flow: str
    conditions: Conditions
    columns: tuple[str, ...]
    points: tuple[tuple[float, ...], ...]
    marks: Mapping[str, float] = field(default_factory=dict)
    kind: Literal["series"] = "series"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure to hold: the median of `runs` runs between `low` and `high`, and the peer's in the same run.

    limit   None where nothing is promised. `least`: the figure must be at least the limit, not at most.
    """

    row: str
    name: str
    value: float
    unit: str
    limit: float | None = None
    least: bool = False
    peer: str = ""
    peer_value: float | None = None
    runs: int = 1
    low: float | None = None
    high: float | None = None
    note: str = ""
    kind: Literal["figure"] = "figure"

    @property
    def held(self) -> bool | None:
        """Whether the figure is within its limit; None where there is no limit."""
        if self.limit is None:
            return None
        return self.value >= self.limit if self.least else self.value <= self.limit


@dataclass(frozen=True, slots=True)
class Absent:
    """A row that could not be measured here, and why."""

    row: str
    why: str
    kind: Literal["absent"] = "absent"


Fact = Stamp | Sample | Series | Figure | Absent

_KINDS: dict[str, type[Fact]] = {"stamp": Stamp, "sample": Sample, "series": Series, "figure": Figure, "absent": Absent}


class ResultFile:
    """Appends facts to a file, each at once: an interrupted run keeps what it has."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self.path = path
        self.facts: list[Fact] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.add(stamp)
        except OSError as error:
            hint = "name a directory of your own: --out"
            raise CacheError(f"cannot write {path.parent}: {error.strerror}", hint=hint) from None

    def add(self, fact: Fact) -> None:
        self.facts.append(fact)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(fact), separators=(",", ":")) + "\n")


def read_results(paths: Iterable[Path]) -> Iterator[Fact]:
    """The facts of several files, one after another. FormatError for a line that is none; UsageError for no file."""
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise UsageError(
                f"{path} cannot be read: {error.strerror}", hint="name a file of results (.jsonl)"
            ) from None
        for number, line in enumerate(lines, 1):
            try:
                yield parse_fact(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise FormatError(f"{path}, line {number} is no result of a benchmark ({error})") from None


def parse_fact(value: dict[str, Any]) -> Fact:
    """The inverse of asdict; lists become tuples again."""
    if value["kind"] == "series":
        columns, points = tuple(value["columns"]), tuple(tuple(point) for point in value["points"])
        value = {**value, "columns": columns, "points": points}
    return _KINDS[value["kind"]](**value)


def figure(row: str, name: str, values: Iterable[float], unit: str, **options: Any) -> Figure:
    """The median of several runs as a Figure; `options` are its other fields."""
    found = sorted(values)
    middle = statistics.median(found)
    return Figure(row, name, middle, unit, runs=len(found), low=found[0], high=found[-1], **options)
