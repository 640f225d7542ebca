"""A recording of reads (`mount --record`) as a picture: which part of which file was read when, and who waited for it.

Owns the trace's values, their picture and the page around it, which has no script and loads nothing. Called by
`ckptfs profile plot`.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from ckptfs.bench.charts import GREEN, GREY, ORANGE, RED, svg
from ckptfs.bench.report import document
from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.terminal import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_MOST = 1_000_000  # reads; a restore of 4 GB makes some thousand
_FILES = 14  # that have a strip of their own, those with the most bytes read; the others share one
_COMMANDS = 8
_LONGEST = 20
_OTHERS = "other files"
_VECTORS = 5000  # reads up to which each is a line of its own in the picture; more are pixels, or no browser copes


@dataclass(frozen=True, slots=True)
class Access:
    """A read: seconds since the mount began, what it wanted, how long it waited (0 for a hit, None: not to its end)."""

    at: float
    path: str
    offset: int
    length: int
    hit: bool
    wait: float | None
    who: str

    @property
    def end(self) -> int:
        return self.offset + self.length


def read_trace(lines: Iterable[str]) -> list[Access]:
    """In the order of time, names as they can be shown. FormatError for lines that no mount has recorded."""
    found = []
    for number, line in enumerate(lines, 1):
        if number > _MOST:
            raise LimitExceeded(f"there are more than {_MOST} reads", hint="plot a part: head -n 1000000")
        try:
            value = json.loads(line)
            wait = value.get("wait_ms")
            access = Access(
                at=float(value["t_ms"]) / 1000,
                path=printable(str(value["path"])),
                offset=int(value["offset"]),
                length=int(value["length"]),
                hit=bool(value["hit"]),
                wait=float(wait) / 1000 if wait is not None else None,
                who=printable(str(value.get("command") or "")),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise FormatError(f"line {number} is no recorded read", hint="use `mount --record`") from None
        if access.offset < 0 or access.length < 0 or not math.isfinite(access.at + (access.wait or 0.0)):
            raise FormatError(f"line {number} is a read of no place or no time")
        found.append(access)
    return sorted(found, key=lambda access: access.at)


def trace_svg(trace: Sequence[Access]) -> str:
    """Files over time, every read where it was in the file; below, what each program did. "" for an empty trace."""
    if not trace:
        return ""
    places = _Strips(trace)
    commands = _most(trace, lambda access: access.who, _COMMANDS)

    def draw(canvas: "Canvas") -> None:
        height = max(1.2, 0.25 * len(commands) + 0.6)
        files, programs = canvas.subplots(2, 1, sharex=True, height_ratios=(max(3.0, places.inches), height))
        _draw(files, trace, lambda access: places.span(access))
        files.set_yticks(places.middles, places.labels, fontsize=8)
        files.set_yticks(places.edges, minor=True)
        files.tick_params(axis="y", length=0)
        files.grid(axis="y", visible=False)
        files.grid(axis="y", which="minor")
        files.set_ylim(places.edges[-1], 0)
        rows = {name: row for row, name in enumerate(commands)}
        known = [access for access in trace if access.who in rows]
        _draw(programs, known, lambda access: _lane(rows[access.who], hit=access.hit))
        programs.set_yticks(range(len(commands)), [_short(name, 20) or "(not known)" for name in commands], fontsize=8)
        programs.set_ylim(len(commands) - 0.5, -0.5)
        programs.set_xlabel("seconds since the mount began")
        first, last = trace[0].at, max(access.at + (access.wait or 0.0) for access in trace)
        margin = 0.02 * (last - first) + 0.001
        files.set_xlim(max(0.0, first - margin), last + margin)
        for colour, words in ((GREEN, "answered at once"), (RED, "had to be fetched"), (ORANGE, "a process waits")):
            files.plot([], [], color=colour, linewidth=3, label=words)
        files.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of names in other scripts; the browser has a font for them
        return svg(draw, 10, max(3.0, places.inches) + 2.4)


def trace_page(trace: Sequence[Access], title: str) -> str:
    """The picture, who waited for how long, and for what longest; a whole HTML text."""
    waits = [access.wait or 0.0 for access in trace if not access.hit]
    total = sum(access.length for access in trace)
    words = (
        f"{len(trace)} reads of {total / 1e6:.1f} MB by the kernel in {trace[-1].at if trace else 0:.2f} s; "
        f"{len(waits)} had to wait, {sum(waits):.2f} s together."
    )
    parts = [f"<h1>{escape(title)}</h1><p>{words}</p>", trace_svg(trace)]
    if trace:
        parts += ["<h2>Who waited</h2>", *_sums(trace, "program", lambda access: access.who or "(not known)")]
        parts += ["<h2>For what</h2>", *_sums(trace, "file", lambda access: access.path)]
        parts += [f"<h2>The {_LONGEST} longest</h2>", *_longest(trace)]
    return document(title, parts)


class _Strips:
    """Where files are on the vertical axis: one below the other, higher for larger ones."""

    def __init__(self, trace: Sequence[Access]) -> None:
        ends: dict[str, int] = {}
        for access in trace:
            ends[access.path] = max(ends.get(access.path, 1), access.end)
        names = sorted(_most(trace, lambda access: access.path, _FILES))
        self._others = {name: row for row, name in enumerate(sorted(ends.keys() - set(names)))}
        self._sizes = {name: ends[name] for name in names}
        if self._others:
            names.append(_OTHERS)
        heights = [0.35 + 0.2 * max(0.0, math.log2(self._sizes.get(name, 1) / (1 << 20))) for name in names]
        self.inches = min(sum(heights), 12.0)
        self.edges = [0.0]
        for height in heights:
            self.edges.append(self.edges[-1] + height)
        self._rows = dict(zip(names, zip(self.edges, heights, strict=False), strict=True))
        self.middles = [top + height / 2 for top, height in self._rows.values()]
        self.labels = [self._label(name) for name in names]

    def _label(self, name: str) -> str:
        if name not in self._sizes:
            return f"{len(self._others)} {_OTHERS}"
        size = self._sizes[name]
        return f"{_short(name, 40)}\n{size / 1e6:.1f} MB" if size >= 1e6 else _short(name, 40)

    def span(self, access: Access) -> tuple[float, float]:
        """Top and bottom of a read, inside of its file's strip."""
        top, height = self._rows.get(access.path) or self._rows[_OTHERS]
        if access.path in self._sizes:
            start, end = (access.offset / self._sizes[access.path], access.end / self._sizes[access.path])
        else:
            start, end = (
                self._others[access.path] / len(self._others),
                (self._others[access.path] + 1) / len(self._others),
            )
        inner = 0.86 * height
        return top + 0.07 * height + start * inner, top + 0.07 * height + min(end, 1.0) * inner


def _lane(row: int, *, hit: bool) -> tuple[float, float]:
    """Of a program: hits above, what it waited for below."""
    return (row - 0.34, row - 0.04) if hit else (row + 0.04, row + 0.34)


def _draw(axes: "Axes", trace: Sequence[Access], span: Callable[[Access], tuple[float, float]]) -> None:
    """Every read as an upright line, and how long it waited as a line to the right of it."""
    from matplotlib.collections import LineCollection

    pixels = len(trace) > _VECTORS
    for hit, colour in ((True, GREEN), (False, RED)):
        lines = [[(a.at, span(a)[0]), (a.at, span(a)[1])] for a in trace if a.hit == hit]
        axes.add_collection(
            LineCollection(lines, colors=colour, linewidths=1.4, capstyle="round", rasterized=pixels), autolim=True
        )
    waits = [[(a.at, sum(span(a)) / 2), (a.at + a.wait, sum(span(a)) / 2)] for a in trace if a.wait]
    axes.add_collection(LineCollection(waits, colors=ORANGE, linewidths=1.0, alpha=0.7, zorder=1, rasterized=pixels))
    axes.axhline(0, color=GREY, linewidth=0)


def _most(trace: Sequence[Access], key: Callable[[Access], str], count: int) -> list[str]:
    """The names that most bytes were read of, or by."""
    sums: dict[str, int] = {}
    for access in trace:
        sums[key(access)] = sums.get(key(access), 0) + access.length + 1
    return sorted(sums, key=lambda name: -sums[name])[:count]


def _sums(trace: Sequence[Access], what: str, key: Callable[[Access], str]) -> Iterator[str]:
    yield _row("th", what, "reads", "MB", "hits", "waited", "longest")
    for name in _most(trace, key, 30):
        mine = [access for access in trace if key(access) == name]
        waits = [access.wait or 0.0 for access in mine]
        hits = sum(access.hit for access in mine)
        size = sum(access.length for access in mine) / 1e6
        longest = f"{max(waits) * 1000:.1f} ms"
        yield _row(
            "td", name, str(len(mine)), f"{size:.2f}", f"{100 * hits // len(mine)} %", f"{sum(waits):.3f} s", longest
        )
    yield "</table>"


def _longest(trace: Sequence[Access]) -> Iterator[str]:
    yield _row("th", "at", "waited", "file", "offset", "bytes", "program")
    for one in sorted(trace, key=lambda access: -(access.wait or 0.0))[:_LONGEST]:
        if one.wait:
            wait = f"{one.wait * 1000:.1f} ms"
            yield _row("td", f"{one.at:.3f} s", wait, one.path, str(one.offset), str(one.length), one.who)
    yield "</table>"


def _row(tag: str, *cells: str) -> str:
    start = "<table>" if tag == "th" else ""
    return f"{start}<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _short(name: str, count: int) -> str:
    return name if len(name) <= count else f"…{name[1 - count :]}"
