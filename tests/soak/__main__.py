"""What scripts/soak runs: each part of the reliability plan that takes long, short by default, whole with --full.

    python -m tests.soak [--full] [--only PART ...] [--hours H] [--json FILE]

Prints a table: part, row of the plan, figure, result. Ends with 1 when a part did not hold.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.soak.kills import kill_loop
from tests.soak.load import MIB, Load, run_load
from tests.support.chunked import PAGES, add_chunked
from tests.support.command import mounted
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import FakeRegistry
from tests.support.readers import content
from tests.support.sources import client, copy_image
from tests.support.tools import ROOT, use_setup_tools

NAME = "repo:latest"
CHUNK = 64 * 1024
LAZY = ("--prefetch", "none", "--no-background-fetch")


@dataclass(frozen=True)
class Result:
    part: str
    row: str
    figure: str
    ok: bool
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    full: bool
    hours: float
    folder: Path

    def long(self, short: float, whole: float) -> float:
        return whole if self.full else short


@contextmanager
def registry(size: int) -> Iterator[FakeRegistry]:
    with FakeRegistry() as fake:
        add_chunked(fake, {b"config.dump": b"{}", PAGES: content(size)}, CHUNK)
        yield fake


def kills(run: Run) -> Result:
    size = 32 * MIB
    with registry(size) as fake:
        found = kill_loop(fake, fake.reference(NAME), size, run.folder, int(run.long(8, 500)))
    return Result("kills", "C1", str(found), not found.wrong and found.kept >= 0.95 * found.finished and not found.left)


def load(run: Run) -> Result:
    """64 readers x 8 processes on one mount whose caches hold a part of the file."""
    seconds = 3600 * run.hours or run.long(40, 600)
    what = Load(processes=8, threads=64, seconds=seconds, reset_every=10)
    with registry(64 * MIB) as fake:
        small = ("--memory", "16M", "--cache-size", "32M")
        with mounted(fake.reference(NAME), run.folder, *small) as mount:
            found = run_load(fake, [mount.path / PAGES.decode()], [mount.pid], what)
            errors = mount.status()["errors"]
    hours = seconds / 3600
    slope = f", RSS {found.slope():+.1f} MiB/h" if hours >= 0.15 else ""
    grown = found.slope() < 1.0 if hours >= 1 else found.growth() < 16 * MIB
    quiet = not found.wrong and not found.errors and not errors
    return Result("load", "L10", f"{seconds:.0f} s: {found}{slope}", quiet and grown and found.more_descriptors() <= 16)


def mounts(run: Run) -> Result:
    """16 mounts with one cache, each with readers; then how much was fetched."""
    seconds, count = run.long(30, 600), 16
    size = 64 * MIB
    with registry(size) as fake, ExitStack() as stack:
        cache = run.folder / "cache"
        made = [
            stack.enter_context(mounted(fake.reference(NAME), run.folder / str(number), cache=cache))
            for number in range(count)
        ]
        files, pids = [mount.path / PAGES.decode() for mount in made], [mount.pid for mount in made]
        found = run_load(fake, files, pids, Load(processes=1, threads=8, seconds=seconds, reset_every=10))
        fetched = sum(mount.status()["network"]["bytes"] for mount in made) / size
        errors = [error for mount in made for error in mount.status()["errors"]]
    quiet = not found.wrong and not found.errors and not errors
    figure = f"{count} mounts, {seconds:.0f} s: {found}, fetched {fetched:.2f} x the image"
    return Result("mounts", "C5", figure, quiet and found.growth() < count * 8 * MIB and fetched <= 1.1)


def outage(run: Run) -> Result:
    """A registry that is away for 2, 12 and 55 s, five less than the deadline."""
    figures, ok = [], True
    with registry(8 * MIB) as fake, DockerRegistry() as real, client(fake) as source, client(real.host) as target:
        copy_image(source, target)
        for seconds in (2, 12, 55) if run.full else (2, 5):
            with mounted(real.reference(NAME), run.folder / str(seconds), *LAZY) as mount:
                real.stop()
                began = time.monotonic()
                reader = [sys.executable, "-m", "tests.soak.reader", str(mount.path / PAGES.decode()), "64", "1", "1"]
                process = subprocess.Popen(reader, cwd=ROOT, stdout=subprocess.PIPE, text=True)
                time.sleep(seconds)
                real.start()
                out, _ = process.communicate(timeout=120)
                took = time.monotonic() - began
            found = json.loads(out)
            errors = {name: count for name, count in found.items() if name.startswith("E")}
            ok = ok and not errors and not found["wrong"]
            figures.append(f"{seconds} s: {found['reads']} reads, {errors or 'no error'}, data after {took:.0f} s")
    return Result("outage", "N12", f"away for {'; '.join(figures)}", ok)


def rows(run: Run) -> Result:
    """The tests of all rows, with the numbers of the plan: 10^6 random reads, 500 kills of a cache, 200 starts."""
    if not run.full:
        return Result("rows", "all", "only with --full; scripts/test --faults has them short", True)
    whole = {"READS": 1_000_000, "STARTS": 200, "KILLS": 500, "TOKENS": 30, "SECONDS": int(3600 * run.hours or 1800)}
    environment = {**os.environ, **{f"CKPTFS_SOAK_{name}": str(count) for name, count in whole.items()}}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "row", "--rows", "--timeout=0"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout[done.stdout.find("reliability rows") :])
    held = re.search(r"(\d+) of (\d+) rows hold", done.stdout)
    return Result("rows", "all", held[0] if held else "no table", done.returncode == 0)


def fuzz(run: Run) -> Result:
    """Every parser, guided by coverage; needs atheris."""
    if importlib.util.find_spec("atheris") is None:
        return Result("fuzz", "M7", "skipped: pip install atheris", True)
    seconds = int(run.long(3, 240))
    command = [sys.executable, "-m", "tests.soak.fuzz"]
    targets = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    crashes, executed = [], 0
    environment = {**os.environ, "TMPDIR": str(run.folder)}  # where the inputs lie, which atheris' end leaves behind
    for name in targets:
        words = [*command, name, str(seconds)]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        count = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        executed += int(count[1]) if count else 0
        if done.returncode:
            crashes.append(name)
            print(done.stdout[-2000:], done.stderr[-3000:], file=sys.stderr)
            for file in run.folder.glob("fuzz-*/crash-*"):
                print(f"{name}: {file.read_bytes().hex()}", file=sys.stderr)
                file.unlink()
    figure = f"{len(targets)} parsers, {seconds} s each: {executed} inputs, crashes: {', '.join(crashes) or 'none'}"
    return Result("fuzz", "M7", figure, not crashes)


PARTS: dict[str, Callable[[Run], Result]] = {part.__name__: part for part in (kills, load, mounts, outage, fuzz, rows)}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="as long as the plan says: about three hours")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--hours", type=float, default=0.0, help="how long the part `load` takes, for slopes")
    parser.add_argument("--json", type=Path, help="write one line of JSON for each part to this file")
    options = parser.parse_args()
    use_setup_tools()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # mounts are ended on the way out
    results = []
    for name in options.only:
        folder = Path(tempfile.mkdtemp(prefix=f"soak-{name}-"))
        began = time.monotonic()
        try:
            found = PARTS[name](Run(options.full, options.hours, folder))
        except Exception as error:
            found = Result(name, "", f"{type(error).__name__}: {error}", False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found = Result(found.part, found.row, found.figure, found.ok, round(time.monotonic() - began, 1))
        results.append(found)
        print(f"{found.part:10} {found.row:4} {'holds' if found.ok else 'FAILS':6} {found.figure}", flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(found)) + "\n" for found in results))
    return 0 if all(found.ok for found in results) else 1


if __name__ == "__main__":
    sys.exit(main())
