"""The table behind `scripts/test --faults`: one line per row of the reliability plan, with the figure that was held.

A test says which row it is with `@pytest.mark.row("N1")`, and what it measured with `record_property("figure", …)`.
A pytest plugin, loaded by tests/conftest.py; adds one mark and one option.
"""

import re
from collections.abc import Iterator

import pytest

_ROWS = pytest.StashKey[dict[str, tuple[str, str]]]()
_RANK = {"failed": 2, "skipped": 1, "passed": 0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", action="store_true", help="print the table of reliability rows at the end")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(name): the row of the reliability plan that this test holds")
    config.stash[_ROWS] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.when == "call" or report.outcome != "passed":
        figures = [f"{value}" for name, value in item.user_properties if name == "figure"]
        for mark in item.iter_markers("row"):
            rows = item.config.stash[_ROWS]
            outcome, held = rows.get(mark.args[0], ("passed", ""))
            worst = max(outcome, report.outcome, key=_RANK.__getitem__)
            rows[mark.args[0]] = (worst, "; ".join(filter(None, [held, *figures])))
    return report  # type: ignore[return-value]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--rows"):
        return
    terminalreporter.section("reliability rows")
    rows = config.stash[_ROWS]
    for name in sorted(rows, key=lambda name: (re.sub(r"\d", "", name), int(re.sub(r"\D", "", name) or 0))):
        outcome, figures = rows[name]
        terminalreporter.write_line(f"{name:5} {outcome:8} {figures}")
    passed = sum(outcome == "passed" for outcome, _ in rows.values())
    terminalreporter.write_line(f"{passed} of {len(rows)} rows hold")
