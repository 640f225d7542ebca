"""Results of a benchmark in a file and back, and the page that is made of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ckptfs.bench.charts import sweeps
from ckptfs.bench.machine import stamp, usage
from ckptfs.bench.report import page, write_report
from ckptfs.bench.results import Absent, Fact, Figure, ResultFile, Sample, Series, Stamp, figure, read_results
from ckptfs.errors import FormatError, UsageError
from tests.support.tools import ROOT

STAMP = Stamp("2026-01-01T00:00:00+00:00", "0123456789ab", "0.1", "6.18", "a machine", 0.1)
RESTORE = {"ready": 0.3, "first_tick": 0.5, "resident": 6.0}
READS = {"reads": 10, "memory_hits": 4, "disk_hits": 1, "misses": 5, "requests": 7}
POINTS = ((0.0, 0.0, 0.0), (1.0, 1e6, 2e6), (2.0, 3e6, 4e6))


def facts(name: str = "ckptfs, lazy pages") -> list[Fact]:
    link = {"rtt_ms": 20.0, "mbit": 200.0, "megabytes": 64}
    return [
        STAMP,
        Sample("P2", name, 0, link, {**RESTORE, **READS}),
        Sample("links", name, 0, {**link, "megabytes": 256}, {**RESTORE, **READS}),
        Series("timeline", name, link, ("seconds", "fetched", "read"), POINTS, {"mounted": 0.3, "first tick": 0.5}),
        figure("P2", f"first tick of {name}", [0.5, 0.3, 0.4], "s", limit=0.35, peer="skopeo", peer_value=7.0),
        Figure("P7", "warm reads ÷ bindfs", 0.9, "×", 0.8, least=True),
        Absent("P9", "needs a profile"),
    ]


def test_a_file_gives_back_what_was_added(tmp_path: Path) -> None:
    first, *others = facts()
    assert isinstance(first, Stamp)
    results = ResultFile(tmp_path / "new" / "results.jsonl", first)
    for fact in others:
        results.add(fact)
    assert list(read_results([results.path])) == results.facts == facts()


def test_figures_are_medians_and_know_whether_they_hold() -> None:
    _, _, _, _, first, warm, _ = facts()
    assert isinstance(first, Figure)
    assert isinstance(warm, Figure)
    assert (first.value, first.low, first.high, first.runs) == (0.4, 0.3, 0.5, 3)
    assert (first.held, warm.held, Figure("P1", "a", 1.0, "s").held) == (False, True, None)


def test_the_page_is_written_in_every_locale(tmp_path: Path) -> None:
    script = "from tests.unit.test_bench_results import *; write_report(facts(), Path('report.html'))"
    ascii_only = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **ascii_only}, check=True)
    assert "0.3 – 0.5, 3" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_row_that_ended_early_has_a_page() -> None:
    """What others did on the machine is noted without a link; of the sweeps there is no other bandwidth."""
    others = Sample("links", "others before and after", 0, {}, {"busy_before": 0.0, "busy_after": 0.1})
    assert "others before and after" in page([*facts(), others], "A page")


def test_no_cap_and_no_delay_have_a_place_in_the_picture() -> None:
    links = ((5.0, 100.0), (5.0, 400.0), (5.0, 0.0), (0.0, 100.0), (50.0, 100.0))
    runs = [Sample("image", "ckptfs pull", 0, {"rtt_ms": rtt, "mbit": mbit}, {"start": 1.0}) for rtt, mbit in links]
    panels = (("mbit", "bandwidth", {"rtt_ms": 5.0}), ("rtt_ms", "delay", {"mbit": 100.0}))
    svg = sweeps(runs, panels, "start")
    at = [float(x) for x in re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="[\d.]+" style="fill: #56b4e9', svg)]
    first, second = at[:3], at[3:6]
    assert first == sorted(first) and second == sorted(second)
    assert min(second[1] - second[0], second[2] - second[1], first[1] - first[0], first[2] - first[1]) > 20
    assert "no cap" in svg


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        list(read_results([tmp_path / "nowhere"]))


@pytest.mark.parametrize("line", ["", "{", "[]", '{"kind": "other"}', '{"kind": "absent"}'])
def test_lines_that_are_no_results_are_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(f'{{"kind": "absent", "row": "P1", "why": "x"}}\n{line}\n')
    with pytest.raises(FormatError, match="line 2 is no result"):
        list(read_results([path]))


def test_the_page_says_what_came_out_and_needs_nothing_else(tmp_path: Path) -> None:
    write_report(facts(), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 5  # limits, bars, timeline, one panel of sweeps, hit rates
    for words in (
        "commit 0123456789ab",
        "≤ 0.35 s",
        "0.4 s",
        "missed",
        "held",
        "needs a profile",
        "first tick: 0.50 s",
    ):
        assert words in text
    assert not re.search(r'<script|<link|<img|@import|(?:src|href)="(?!#)', re.sub(r'xlink:href="#[^"]*"', "", text))
    assert not re.search(r"url\((?!#)", text)


def test_the_same_facts_give_the_same_page() -> None:
    assert page(facts(), "title") == page(facts(), "title")


def test_names_cannot_write_into_the_page() -> None:
    text = page(facts(name="<script>lazy</script>"), "<b>")
    assert "<script" not in text
    assert "<b>" not in text


def test_a_page_of_nothing_is_a_page() -> None:
    assert "<svg" not in page([STAMP], "nothing")


def test_the_machine_is_described() -> None:
    here = stamp()
    assert here.kernel
    assert here.machine
    assert usage(1).rss > 0
