"""scripts/bench: runs rows, writes the results and the report.

Owns the command line and what happens around a row: its tools are looked for, its failure costs that row only, the
machine has to be quiet. Needs root, as criu does.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from bench.lab import Lab, environment
from bench.quiet import wait_until_idle
from bench.rows import Row, all_rows
from ckptfs.bench.charts import timeline
from ckptfs.bench.machine import stamp
from ckptfs.bench.report import cells, write_report
from ckptfs.bench.results import Absent, Fact, Figure, ResultFile, read_results
from ckptfs.errors import CkptfsError
from tests.support.criu import why_criu_does_not_work
from tests.support.tools import use_setup_tools
from tests.support.workload import scratch

RESULTS = Path(__file__).parent / "results"
_QUIET = 0.15  # CPUs that others may use while we measure


def main() -> int:
    try:
        return _main()
    except CkptfsError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code


def _main() -> int:
    rows = all_rows()
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"rows: {', '.join(f'{row.name} ({row.title.lower()})' for row in rows)}",
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="which figures, e.g. P2 P7; all when none is named")
    parser.add_argument("--quick", action="store_true", help="smaller images and fewer runs: a look, not a result")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where results go (default {RESULTS})")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only make the report of these results")
    parser.add_argument("--patience", type=float, default=60, help="most seconds to wait for a quiet machine, each row")
    options = parser.parse_args()
    if options.report:
        _write(list(read_results(options.report)), options.report[0])
        return 0
    names = {row.name.lower(): row for row in rows}
    if unknown := [name for name in options.rows if name.lower() not in names]:
        parser.error(f"no row {' '.join(unknown)}; there are {' '.join(row.name for row in rows)}")
    if problem := _problem():
        print(f"bench: {problem}", file=sys.stderr)
        return 8
    signal.signal(signal.SIGTERM, _stop)
    return _run([names[name.lower()] for name in options.rows] or list(rows), options)


def _run(rows: list[Row], options: argparse.Namespace) -> int:
    environment()
    here = stamp()
    stem = f"{here.date[:19].replace(':', '')}-{here.commit or here.version}{'-quick' if options.quick else ''}"
    results = ResultFile(options.out / f"{stem}.jsonl", here)
    failed = []
    with ExitStack() as stack:
        lab = Lab(Path(stack.enter_context(scratch())), results, stack, quick=options.quick)
        for row in rows:
            lab.say(f"{row.name}: {row.title}")
            if missing := [need for need in row.needs if shutil.which(need) is None]:
                lab.add(Absent(row.name, f"needs {' '.join(missing)}"))
                continue
            busy = wait_until_idle(_QUIET, options.patience)
            if busy > _QUIET:
                lab.say(f"  the machine is not quiet: {busy:.1f} CPUs are busy with something else")
            began = time.monotonic()
            try:
                row.measure(lab)
            except (RuntimeError, AssertionError, OSError, ArithmeticError, LookupError) as error:
                failed.append(row.name)
                lab.add(Absent(row.name, f"failed: {' '.join(str(error).split())[:500]}"))
                if os.environ.get("BENCH_TRACEBACK"):
                    raise
            after = wait_until_idle(_QUIET, 0)
            lab.sample(row.name, "others before and after", 0, {}, busy_before=busy, busy_after=after)
            lab.say(f"  took {time.monotonic() - began:.0f} s")
    print(results.path)
    _write(results.facts, results.path)
    return 1 if failed else 0


def _write(facts: list[Fact], beside: Path) -> None:
    """The page, the figures as a table for docs/performance.md, and the timeline as a picture of its own."""
    page, table, picture = (beside.with_suffix(suffix) for suffix in (".html", ".md", ".svg"))
    write_report(facts, page)
    table.write_text(_markdown_table(facts), encoding="utf-8")
    if svg := timeline(facts):
        picture.write_text(svg, encoding="utf-8")
    print(page)


def _markdown_table(facts: Sequence[Fact]) -> str:
    """The figures as a table for a document; those that are not held stand in bold."""
    lines = ["| | figure | hold | measured | range, runs | peer, same run |", "|---|---|---|---|---|---|"]
    for fact in facts:
        if isinstance(fact, Figure):
            row, name, hold, value, spread, peer = cells(fact)
            shown = f"**{value}**" if fact.held is False else value
            lines.append(f"| {row} | {name} | {hold} | {shown} | {spread} | {peer} |")
        elif isinstance(fact, Absent):
            lines.append(f"| {fact.row} | not measured: {fact.why} | | | | |")
    return "\n".join(lines) + "\n"


def _problem() -> str:
    use_setup_tools()
    if not Path("/dev/fuse").exists():
        return "no /dev/fuse, so nothing can be mounted"
    return why_criu_does_not_work()


def _stop(*_: object) -> NoReturn:
    sys.exit(143)  # unwinds: everything is ended and unmounted


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
