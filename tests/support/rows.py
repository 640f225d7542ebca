"""The table behind `scripts/test --faults`: one line per row of the reliability plan, with the figure that was held.

A test says which row it is with `@pytest.mark.row("N1")`, and what it measured with `record_property("figure", …)`.
What each row promises is in docs/reliability.md; a row there without a test is named as one that does not hold.
A pytest plugin, loaded by tests/conftest.py; adds one mark and two options.
"""

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
_FIGURE_WIDTH = 260  # of a cell: more is cut
_STAMP = "<!-- measured -->"


@dataclass
class Row:
    """What the tests of one row came to."""

    outcomes: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """ "failed" if any test did; skipped ones count when there are no others."""
        return next((word for word in ("failed", "passed", "skipped") if word in self.outcomes), "no test")

    @property
    def figure(self) -> str:
        """What was recorded, or how many cases there were."""
        skipped = self.outcomes.count("skipped") if self.outcome != "skipped" else 0
        passed = self.outcomes.count("passed")
        figures = self.figures or ([f"{passed} cases"] if passed else [])
        return "; ".join([*figures, *([f"{skipped} tests skipped"] if skipped else [])])


_ROWS = pytest.StashKey[dict[str, Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", action="store_true", help="print the table of reliability rows at the end")
    parser.addoption("--rows-to", type=Path, action="append", default=[], help="write what was measured into it")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(name): the row of the reliability plan that this test holds")
    config.stash[_ROWS] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.when == "call" or report.outcome != "passed":
        for mark in item.iter_markers("row"):
            row = item.config.stash[_ROWS].setdefault(mark.args[0], Row())
            row.outcomes.append(report.outcome)
            row.figures += [f"{value}" for name, value in item.user_properties if name == "figure"]
    return report  # type: ignore[return-value]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if config.getoption("--rows"):
        terminalreporter.section("reliability rows")
        promised = promises(DOCUMENT.read_text()) if DOCUMENT.exists() else {}
        for name in sorted({*rows, *(promised if not config.option.file_or_dir else ())}, key=_order):
            row = rows.get(name, Row())
            promise, hold = promised.get(name, ("", ""))
            terminalreporter.write_line(f"{name:4} {row.outcome:8} {promise}")
            for label, text in (("to hold", hold), ("measured", row.figure)):
                if text:
                    terminalreporter.write_line(f"{'':13} {label}: {text}")
        passed = sum(row.outcome == "passed" for row in rows.values())
        terminalreporter.write_line(f"{passed} of {len(rows)} rows hold")
    where = _where()  # before a document is changed
    for document in config.getoption("--rows-to"):
        document.write_text(filled(document.read_text(), rows, DOCUMENT, where))


def promises(document: str) -> dict[str, tuple[str, str]]:
    """row -> (promise, figure to hold), out of the table of docs/reliability.md."""
    found = (_cells(line) for line in document.splitlines())
    return {
        cells[0]: (cells[1], cells[2]) for cells in found if len(cells) == 6 and re.fullmatch(r"[A-Z]\d+", cells[0])
    }


def filled(document: str, rows: dict[str, Row], table: Path | None = None, where: str = "") -> str:
    """The document with what was measured in its table, and when and where.

    How many rows hold is counted in its own table, which keeps what a run of some tests has not measured again; in that
    of the document `table` where it has none.
    """
    lines = document.splitlines()
    for number, line in enumerate(lines):
        cells = _cells(line)
        if len(cells) == 6 and cells[0] in rows:
            row = rows[cells[0]]
            figure = row.figure.replace("|", "/")
            cells[4] = figure if len(figure) <= _FIGURE_WIDTH else figure[:_FIGURE_WIDTH].rpartition(";")[0] + "; …"
            cells[5] = {"passed": "holds", "failed": "**fails**"}.get(row.outcome, row.outcome)
            lines[number] = f"| {' | '.join(cells)} |"
    if _STAMP in lines:
        results = _results(lines) or (_results(table.read_text().splitlines()) if table is not None else [])
        said = f"{results.count('holds')} of {len(results)} rows hold. {where or _where()}."
        lines[lines.index(_STAMP) + 1] = said
    return "\n".join(lines) + "\n"


def _results(lines: list[str]) -> list[str]:
    return [cells[5] for cells in map(_cells, lines) if len(cells) == 6 and re.fullmatch(r"[A-Z]\d+", cells[0])]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []


def _order(name: str) -> tuple[str, int]:
    return re.sub(r"\d", "", name), int(re.sub(r"\D", "", name) or 0)


def _where() -> str:
    command = ["git", "-C", str(DOCUMENT.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    kernel = platform.release().partition("-")[0]
    machine = f"{os.cpu_count()} CPUs, Linux {kernel}, Python {platform.python_version()}"
    return f"Measured on {date.today()} at commit {commit or 'unknown'} on {machine}"
