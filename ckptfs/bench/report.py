"""The facts of a benchmark as one page: what was promised and what came out, then the pictures, then every run.

Owns the page; charts.py draws. The page has no script and loads nothing, so it can be mailed. Called by the benchmark
and `ckptfs bench`.
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from ckptfs.bench import charts
from ckptfs.bench.results import Absent, Fact, Figure, Sample, Stamp

_LINK = {"rtt_ms": 20.0, "mbit": 200.0}  # the link of the figures; the sweeps go through it
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 0.9rem }
td, th { padding: 0.2rem 0.7rem; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #999 } td { border-bottom: 1px solid #e4e4e4 }
.n { text-align: right; white-space: nowrap }
.ok { color: #00664a } .missed { color: #b03a00; font-weight: 600 }
.facts { color: #555 } .pair { display: flex; flex-wrap: wrap }
"""


def write_report(facts: Sequence[Fact], path: Path, *, title: str = "ckptfs: lazy against eager") -> None:
    """The page at `path`, in place of one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(facts, title), encoding="utf-8")  # as the page says, whatever the locale


def page(facts: Sequence[Fact], title: str) -> str:
    """The whole HTML text."""
    return document(
        title, [f"<h1>{escape(title)}</h1>", *_stamps(facts), *_figures(facts), *_pictures(facts), *_runs(facts)]
    )


def document(title: str, parts: Iterable[str]) -> str:
    """An HTML text around `parts`, in the style of all our pages."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{chr(10).join(parts)}\n</body></html>\n'


def _stamps(facts: Sequence[Fact]) -> Iterator[str]:
    for fact in facts:
        if isinstance(fact, Stamp):
            commit = f", commit {fact.commit}" if fact.commit else ""
            text = (
                f"{fact.date}: ckptfs {fact.version}{commit}; Linux {fact.kernel}; {fact.machine}; load {fact.load:g}"
            )
            yield f'<p class="facts">{escape(text)}</p>'


def _figures(facts: Sequence[Fact]) -> Iterator[str]:
    found = [fact for fact in facts if isinstance(fact, Figure | Absent)]
    if not found:
        return
    yield "<h2>Figures</h2>"
    yield "<p>Medians of the runs, with the lowest and the highest; the peer did the same in the same run.</p>"
    yield _table("", "figure", "hold", "measured", "range, runs", "peer", "")
    for fact in found:
        if isinstance(fact, Absent):
            yield f'<tr><td>{escape(fact.row)}</td><td colspan="6">not measured: {escape(fact.why)}</td></tr>'
        else:
            yield _figure(fact)
    yield "</table>"
    yield charts.limits(facts)


def _figure(fact: Figure) -> str:
    verdict = {True: '<span class="ok">held</span>', False: '<span class="missed">missed</span>', None: ""}[fact.held]
    classes = ("", "", "n", "n", "n", "")
    tds = "".join(f'<td class="{name}">{escape(cell)}</td>' for name, cell in zip(classes, cells(fact), strict=True))
    return f"<tr>{tds}<td>{verdict}</td></tr>"


def cells(fact: Figure) -> tuple[str, ...]:
    """Row, name, what to hold, what came out, its range, the peer."""
    hold = "" if fact.limit is None else f"{'≥' if fact.least else '≤'} {fact.limit:g} {fact.unit}"
    spread = f"{number(fact.low)} – {number(fact.high)}, {fact.runs}" if fact.runs > 1 else ""
    peer = "" if fact.peer_value is None else f"{number(fact.peer_value)} ({fact.peer})"
    name = f"{fact.name} — {fact.note}" if fact.note else fact.name
    return fact.row, name, hold, f"{number(fact.value)} {fact.unit}".strip(), spread, peer


def _pictures(facts: Sequence[Fact]) -> Iterator[str]:
    restore = (("ready", "ready"), ("first_tick", "first tick"), ("resident", "all pages there"))
    reading = (("ready", "ready"), ("start", "process could run"), ("all", "all read"))
    yield from _section(
        "How long until it runs",
        "Bars end when the last byte is there; the darker parts are the way to the mounted or unpacked image, then to "
        "the process that runs.",
        charts.bars(facts, ("P2", "P3"), restore, "seconds since the command; link of 20 ms and 200 Mbit/s"),
        charts.bars(facts, ("image",), reading, "seconds since the command"),
    )
    yield from _section(
        "Timeline of a restore",
        "With lazy pages the process runs long before the image has come; plain restores read while bytes arrive; "
        "the eager flow fetches everything, then unpacks, then restores.",
        charts.timeline(facts),
    )
    sizes = _sizes(facts)
    yield from _section(
        "Lazy against eager: seconds to the first tick",
        "One line for each way. Each picture goes through the link of 20 ms and 200 Mbit/s.",
        charts.sweeps(
            facts,
            (
                ("megabytes", "size of the process, MB", _LINK),
                ("mbit", "bandwidth, Mbit/s", {"rtt_ms": _LINK["rtt_ms"], **sizes}),
                ("rtt_ms", "round-trip time, ms", {"mbit": _LINK["mbit"], **sizes}),
            ),
            "first_tick",
        ),
    )
    yield from _section(
        "Lazy against eager: seconds until the process could run",
        "One line for each way; the first bandwidth and the first round-trip time where the other one changes.",
        charts.sweeps(facts, tuple(_image_panels(facts)), "start"),
    )
    yield from _section(
        "Hit rates and requests",
        "Reads that the kernel did not answer from its own cache; the first run of each kind.",
        charts.reads(facts),
    )


def _sizes(facts: Sequence[Fact]) -> dict[str, float]:
    """The size that the sweeps over bandwidth and delay were made with."""
    for fact in facts:
        if not isinstance(fact, Sample) or fact.row != "links":
            continue
        if fact.conditions.get("mbit", _LINK["mbit"]) != _LINK["mbit"]:  # of the machine's other load there is none
            return {"megabytes": float(fact.conditions["megabytes"])}
    return {}


def _image_panels(facts: Sequence[Fact]) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Of `ckptfs bench`, whose first link is the one that the others are compared with."""
    for fact in facts:
        if isinstance(fact, Sample) and fact.row == "image":
            yield "mbit", "bandwidth, Mbit/s", {"rtt_ms": float(fact.conditions["rtt_ms"])}
            yield "rtt_ms", "round-trip time, ms", {"mbit": float(fact.conditions["mbit"])}
            return


def _section(title: str, words: str, *pictures: str) -> Iterator[str]:
    if any(pictures):
        yield f"<h2>{escape(title)}</h2><p>{escape(words)}</p>"
        yield f'<div class="pair">{"".join(pictures)}</div>'


def _runs(facts: Sequence[Fact]) -> Iterator[str]:
    samples = [fact for fact in facts if isinstance(fact, Sample)]
    if not samples:
        return
    yield f"<h2>Every run</h2><details><summary>{len(samples)} runs</summary>"
    yield _table("", "flow", "conditions", "values")
    for one in samples:
        where = ", ".join(f"{key} {value}" for key, value in one.conditions.items())
        what = ", ".join(f"{key} {number(value)}" for key, value in one.values.items())
        yield f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in (one.row, one.flow, where, what))}</tr>"
    yield "</table></details>"


def _table(*titles: str) -> str:
    return f"<table><tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"


def number(value: float | None) -> str:
    """Three digits that count, without powers of ten."""
    if value is None:
        return "–"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"
