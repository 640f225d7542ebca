"""Facts of a benchmark as pictures: SVG texts that stand in a page, no script, no network.

Owns colours, axes and words of the charts; each function takes facts and returns an SVG, or "" when there is nothing to
draw. matplotlib draws, because its SVGs are small and need nothing to be seen (a page of plotly brings 4.5 MB of
script along); it comes with `pip install ckptfs[bench]` and is imported when a chart is made.
"""

import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptfs.bench.results import Fact, Figure, Sample, Series
from ckptfs.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito's palette: told apart by everybody
BLUE, ORANGE, GREEN, RED, GREY, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#666666", "#56b4e9"
_FLOW_COLOURS = (("ratarmount", RED), ("lazy", BLUE), ("plain", GREEN), ("skopeo", ORANGE), ("pull", SKY))
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ckptfs",  # the same facts give the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is a $
    "savefig.dpi": 150,  # of what is drawn as pixels
}


def require_plots() -> None:
    """UsageError where there is no matplotlib: to be asked before anything is measured."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError("the report needs matplotlib", hint="run: pip install 'ckptfs[bench]'") from None


def colour(flow: str) -> str:
    return next((found for word, found in _FLOW_COLOURS if word in flow), GREY)


def limits(facts: Sequence[Fact]) -> str:
    """Every figure with a limit as a share of it, on one scale; the peer's beside it."""
    found = [fact for fact in facts if isinstance(fact, Figure) and fact.limit and fact.value > 0]

    def draw(canvas: "Canvas") -> None:
        axes = canvas.add_subplot()
        for at, one in enumerate(reversed(found)):
            share = _share(one, one.value)
            axes.plot([1, share], [at, at], color=GREEN if one.held else RED, linewidth=2, solid_capstyle="round")
            axes.plot([share], [at], "o", color=GREEN if one.held else RED, markersize=7)
            if one.peer_value is not None and (theirs := _share(one, one.peer_value)) > 0:
                axes.plot([theirs], [at], "D", markerfacecolor="none", color=GREY, markersize=6)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_yticks(range(len(found)), [f"{one.row}  {one.name}" for one in reversed(found)], fontsize=9)
        axes.set_xlabel("share of the limit (left of the line: held); ◇ the peer")
        axes.grid(axis="y", visible=False)

    return svg(draw, 9.5, 0.6 + 0.27 * len(found)) if found else ""


def timeline(facts: Sequence[Fact]) -> str:
    """Bytes fetched and bytes read over time, one strip for each flow, with what happened when."""
    found = [fact for fact in facts if isinstance(fact, Series) and fact.columns[:2] == ("seconds", "fetched")]

    def draw(canvas: "Canvas") -> None:
        strips = canvas.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
        end = max(point[0] for one in found for point in one.points)
        for axes, one in zip(strips, found, strict=True):
            times = [point[0] for point in one.points]
            fetched = [point[1] / 1e6 for point in one.points]
            axes.fill_between(times, fetched, color=colour(one.flow), alpha=0.25, linewidth=0)
            axes.plot(times, fetched, color=colour(one.flow), label="fetched, MB over the link")
            if any(point[2] for point in one.points if len(point) > 2):
                read = [point[2] / 1e6 for point in one.points]
                axes.plot(times, read, color="black", linestyle=":", label="read, MB of files")
            _mark(axes, one, end)
            axes.set_title(one.flow, loc="left", fontsize=10, fontweight="bold")
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8)
            axes.set_ylim(bottom=0)
        strips[-1].set_xlim(0, end)
        strips[-1].set_xlabel("seconds since the command")

    return svg(draw, 9.5, 0.5 + 1.9 * len(found)) if found else ""


def sweeps(facts: Sequence[Fact], panels: Sequence[tuple[str, str, dict[str, float]]], value: str) -> str:
    """Seconds (`value`) to the same scale, over one condition in each panel; a line for each flow, medians of its runs.

    panels  (condition, label of the axis, the other conditions as they have to be).
    """
    found = [(name, label, points) for name, label, fixed in panels if (points := _points(facts, name, fixed, value))]

    def draw(canvas: "Canvas") -> None:
        for axes, (name, label, flows) in zip(
            canvas.subplots(1, len(found), sharey=True, squeeze=False)[0], found, strict=True
        ):
            ticks = sorted({at for points in flows.values() for at, _ in points})
            place = _places(name, ticks)
            for flow, points in flows.items():
                xs, ys = zip(*sorted((place[at], seconds) for at, seconds in points), strict=True)
                axes.plot(xs, ys, "o-", color=colour(flow), label=flow, markersize=5)
                axes.annotate(
                    f"{ys[-1]:.2g}", (xs[-1], ys[-1]), (6, 0), textcoords="offset points", fontsize=9, va="center"
                )
            axes.set_xscale("log")
            words = ["no cap" if name == "mbit" and not at else f"{at:g}" for at in ticks]
            axes.set_xticks(list(place.values()), words)
            axes.minorticks_off()
            axes.set_xlabel(label)
            _seconds(axes)
        first = canvas.axes[0]
        first.set_ylabel("seconds")
        canvas.legend(*first.get_legend_handles_labels(), ncols=4, loc="outside upper left")

    return svg(draw, 1.2 + 2.9 * len(found), 3.6) if found else ""


def _places(condition: str, values: Sequence[float]) -> dict[float, float]:
    """Where values of a condition are on a logarithmic axis: 0 is no delay, or no cap on the bandwidth."""
    others = [value for value in values if value]
    return {value: value or (4 * max(others) if condition == "mbit" else min(others) / 4) for value in values}


def _points(
    facts: Sequence[Fact], condition: str, fixed: dict[str, float], value: str
) -> dict[str, list[tuple[float, float]]]:
    """Flow -> (condition, median), ascending; only flows that were run under at least two conditions."""
    runs: dict[str, dict[float, list[float]]] = {}
    for fact in facts:
        if isinstance(fact, Sample) and value in fact.values and _matches(fact, fixed, condition):
            at = float(fact.conditions[condition])
            runs.setdefault(fact.flow, {}).setdefault(at, []).append(fact.values[value])
    return {
        flow: [(at, statistics.median(found[at])) for at in sorted(found)]
        for flow, found in runs.items()
        if len(found) > 1
    }


def reads(facts: Sequence[Fact]) -> str:
    """Where reads of the mount were answered from, as shares, with the number of requests that went out."""
    names = (
        ("memory_hits", "in memory", BLUE),
        ("disk_hits", "on disk", SKY),
        ("misses", "waited for the network", ORANGE),
    )
    rows: dict[str, Sample] = {}
    for fact in facts:
        if isinstance(fact, Sample) and fact.values.get("reads"):
            size = f", {fact.conditions['megabytes']:g} MB" if "megabytes" in fact.conditions else ""
            rows.setdefault(f"{fact.row}  {fact.flow}{size}", fact)

    def draw(canvas: "Canvas") -> None:
        axes = canvas.add_subplot()
        for at, (_, sample) in enumerate(reversed(rows.items())):
            left = 0.0
            for key, label, shade in names:
                share = 100 * sample.values[key] / sample.values["reads"]
                axes.barh(at, share, left=left, color=shade, label=label if at == 0 else None)
                left += share
            said = f"{sample.values['reads']:.0f} reads, {sample.values['requests']:.0f} requests"
            axes.annotate(said, (101, at), va="center", fontsize=9, annotation_clip=False)
        axes.set_yticks(range(len(rows)), list(reversed(rows)), fontsize=9)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of the reads that reached the mount")
        axes.grid(axis="y", visible=False)
        axes.legend(ncols=3, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))

    return svg(draw, 9.5, 1.0 + 0.32 * len(rows)) if rows else ""


def bars(facts: Sequence[Fact], rows: Iterable[str], phases: Sequence[tuple[str, str]], title: str) -> str:
    """Horizontal bars, one for each flow: how long until each of the `phases` (value, word), medians.

    Of several conditions only the first.
    """
    wanted = set(rows)
    samples = [fact for fact in facts if isinstance(fact, Sample) and fact.row in wanted]
    samples = [sample for sample in samples if phases[-1][0] in sample.values]
    found: dict[str, list[Mapping[str, float]]] = {}
    for sample in samples:
        if sample.conditions == samples[0].conditions:
            found.setdefault(sample.flow, []).append(sample.values)
    shades = (0.95, 0.6, 0.3)

    def draw(canvas: "Canvas") -> None:
        axes = canvas.add_subplot()
        for at, (flow, runs) in enumerate(reversed(found.items())):
            before = 0.0
            for (key, _), shade in zip(phases, shades, strict=False):
                until = statistics.median(run[key] for run in runs)
                axes.barh(at, max(until - before, 0), 0.4, left=before, color=colour(flow), alpha=shade)
                before = max(until, before)
            words = ", ".join(f"{word} {statistics.median(run[key] for run in runs):.2f} s" for key, word in phases)
            axes.annotate(words, (0, at + 0.24), fontsize=9)
        axes.set_yticks(range(len(found)), list(reversed(found)))
        axes.set_ylim(-0.35, len(found) - 0.35)
        axes.set_xlabel(title)
        axes.grid(axis="y", visible=False)

    return svg(draw, 9.5, 0.7 + 0.62 * len(found)) if found else ""


def _mark(axes: "Axes", one: Series, end: float) -> None:
    """The moments of a series, which is drawn until `end`; those at the same time are one mark."""
    moments: dict[float, list[str]] = {}
    for name, when in one.marks.items():
        moments.setdefault(round(when, 2), []).append(name)
    for number, (when, names) in enumerate(sorted(moments.items())):
        axes.axvline(when, color=RED, linewidth=1)
        left = when < 0.6 * end
        axes.annotate(
            f"{', '.join(names)}: {when:.2f} s",
            (when, 0.85 - 0.19 * number),
            (4 if left else -4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if left else "right",
            fontsize=9,
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
        )


def _matches(sample: Sample, fixed: dict[str, float], condition: str) -> bool:
    has = sample.conditions
    return condition in has and "background" not in has and all(has.get(name) == value for name, value in fixed.items())


def _share(figure: Figure, value: float) -> float:
    """How much of the limit is used up: above 1 it is not held, whichever way the limit points."""
    if figure.limit is None or value <= 0:
        return 0.0
    return figure.limit / value if figure.least else value / figure.limit


def _seconds(axes: "Axes") -> None:
    """A logarithmic axis with 0.5, 1, 2 in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def svg(draw: Callable[["Canvas"], None], width: float, height: float) -> str:
    """What `draw` puts on a canvas of that size in inches, as an <svg> element."""
    require_plots()
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    out = io.StringIO()
    with rc_context(_STYLE):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        draw(canvas)
        canvas.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
