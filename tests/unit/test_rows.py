"""The table of reliability rows: every row of the plan has a line, and a test or a reason."""

import re
from pathlib import Path

from tests.support.rows import DOCUMENT, Row, filled, promises
from tests.support.tools import ROOT

PLAN = {"N": 16, "S": 6, "C": 8, "M": 12, "L": 11, "F": 5}


def test_every_row_is_promised_and_tested() -> None:
    promised = promises(DOCUMENT.read_text())
    rows = {f"{letter}{number}" for letter, count in PLAN.items() for number in range(1, count + 1)} | {"P10"}
    assert set(promised) == rows
    assert all(promise and hold for promise, hold in promised.values())
    marks = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__)
        for name in re.findall(r'mark\.row\("(\w+)"\)', path.read_text())
    }
    assert marks == rows


def test_what_was_measured_goes_into_the_document() -> None:
    document = "<!-- measured -->\nNot yet.\n\n| row | promise | to hold | tested by | measured | result |\n"
    document += "|---|---|---|---|---|---|\n| N1 | p | h | t | | |\n| N2 | p | h | t | old | holds |\n"
    rows = {
        "N1": Row(["passed", "skipped"], ["0 errors", "a|b"]),
        "N2": Row(["passed", "failed"], []),
    }
    lines = filled(document, rows).splitlines()
    assert lines[1].startswith("1 of 2 rows hold. Measured on 20")
    assert lines[5:] == [
        "| N1 | p | h | t | 0 errors; a/b; 1 tests skipped | holds |",
        "| N2 | p | h | t | 1 cases | **fails** |",
    ]
    assert promises(document) == {"N1": ("p", "h"), "N2": ("p", "h")}


def test_a_second_run_of_what_failed_keeps_the_rest(tmp_path: Path) -> None:
    table, other = tmp_path / "table.md", "x\n<!-- measured -->\nNot yet.\n"
    table.write_text("<!-- measured -->\n\n| N1 | p | h | t | 3 ms | holds |\n| N2 | p | h | t | | **fails** |\n")
    table.write_text(filled(table.read_text(), {"N2": Row(["passed"], ["5 ms"])}))
    assert table.read_text().splitlines()[2:] == [
        "| N1 | p | h | t | 3 ms | holds |",
        "| N2 | p | h | t | 5 ms | holds |",
    ]
    assert filled(other, {}, table).splitlines()[2].startswith("2 of 2 rows hold. ")
