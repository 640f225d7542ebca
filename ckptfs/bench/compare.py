"""`ckptfs bench`: one image, lazily and eagerly, over a slow link in front of its registry.

Owns the order of runs, their folders and their clock. Every run starts with an empty cache of its own; other mounts and
the node's cache are never touched, nor are the kernel's caches dropped. No criu: what it would read is replayed
(reading.py). Called by the command line.
"""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ckptfs.bench.charts import require_plots
from ckptfs.bench.link import ShapedLink
from ckptfs.bench.machine import stamp
from ckptfs.bench.reading import Reading, Step, reading_of, recorded_reading, replay
from ckptfs.bench.relay import Relay
from ckptfs.bench.report import write_report
from ckptfs.bench.results import Absent, Figure, ResultFile, Sample, Series, figure
from ckptfs.bench.watch import Watcher
from ckptfs.configuration import load
from ckptfs.control.client import MountFiles, ask
from ckptfs.errors import CacheError, CkptfsError, NotFoundError, UnavailableError, UsageError
from ckptfs.fuse.mountpoint import canonical, mount_at
from ckptfs.interrupts import interruptible
from ckptfs.model.oci import Reference
from ckptfs.settings import Registries
from ckptfs.terminal import printable

_PULL, _SKOPEO = "ckptfs pull", "skopeo, tar"
_WATCHED = -1
_NAMES = {"lazy": "ckptfs, lazy pages", "plain": "ckptfs, plain restore"}
_IN_VAIN = {NotFoundError.exit_code, CacheError.exit_code}  # what there is not, or this machine refuses: a full disk


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare. `links`: (round-trip time in seconds, bits per second). `trace`: recorded reads, not criu's."""

    reference: Reference
    out: Path
    links: tuple[tuple[float, float], ...] = ((0.020, 200e6),)
    runs: int = 3
    trace: Path | None = None
    plain_http: bool = False
    registries: Registries = field(default_factory=Registries)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where the results are, and the figures that say it in short.

    absent      what could not be measured, and why
    exit_code   of the first error that kept something from being measured; 0 without one
    """

    results: Path
    report: Path
    figures: tuple[Figure, ...]
    absent: tuple[Absent, ...]
    exit_code: int


def compare(wanted: Comparison, say: Callable[[str], None]) -> Outcome:
    """Run everything and write results and report to `wanted.out`; `say` is told of each run."""
    with interruptible(signal.SIGINT, signal.SIGTERM):
        return _compare(wanted, say)


def _compare(wanted: Comparison, say: Callable[[str], None]) -> Outcome:
    require_plots()
    if wanted.reference.kind == "archive":
        raise UsageError("an archive cannot be pulled", hint="push it to a registry or an oci: layout first")
    here = stamp()
    relayed = Relay(wanted.reference, plain_http=wanted.plain_http, registries=wanted.registries)
    with _workshop(wanted.out) as folder, relayed as relay:
        results = ResultFile(folder / f"{here.date[:19].replace(':', '')}.jsonl", here)
        runner = _Runner(folder, relay, results, say)
        readings = runner.readings(wanted.trace)
        for rtt, rate in wanted.links:
            for number in range(wanted.runs):
                runner.all_ways(readings, number, rtt, rate)
        runner.all_ways(readings, _WATCHED, *wanted.links[0])
        figures = tuple(_figures(results, wanted))
        for one in figures:
            results.add(one)
        page = results.path.with_suffix(".html")
        write_report(results.facts, page, title=f"{printable(str(wanted.reference))}: lazy against eager")
        written, report = (file.rename(wanted.out / file.name) for file in (results.path, page))
    absent = tuple(fact for fact in results.facts if isinstance(fact, Absent))
    return Outcome(written, report, figures, absent, runner.failed.exit_code if runner.failed is not None else 0)


@contextlib.contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """A directory in `out` for all that is written until the results are complete; nothing of it stays."""

    def refused(error: OSError) -> CacheError:
        return CacheError(f"cannot write {out}: {error.strerror}", hint="name another directory with --out")

    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".bench-", dir=out)
    except OSError as error:
        raise refused(error) from None
    with temporary as folder:
        try:
            yield Path(folder).resolve()  # by which a mount and its daemon know it
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise refused(error) from None


@dataclass(slots=True)
class _Runner:
    """Runs flows; the run with the number _WATCHED is watched, not timed. `failed`: the first error of one."""

    folder: Path
    relay: Relay
    results: ResultFile
    say: Callable[[str], None]
    failed: CkptfsError | None = field(default=None, init=False)
    _count: int = field(default=0, init=False)

    def readings(self, trace: Path | None) -> dict[str, Reading]:
        """What the lazy flows read, by name; looked up on a mount that no link slows down."""
        if trace is not None:
            return {"ckptfs": recorded_reading(trace)}
        with self._room() as room, self._mounted(self.relay.address, room) as directory:
            lazy = reading_of(directory, lazy=True)
            if not lazy.rest:
                return {"ckptfs": lazy}
            return {_NAMES["lazy"]: lazy, _NAMES["plain"]: reading_of(directory, lazy=False)}

    def all_ways(self, readings: dict[str, Reading], number: int, rtt: float, rate: float) -> None:
        """Every way once, in turns: networks change from minute to minute. Raises where not one can be measured."""
        for name, reading in readings.items():
            with self._measured(name, rtt, rate):
                self.lazily(name, reading, number, rtt, rate)
        reading = next(iter(readings.values()))
        with self._measured(_PULL, rtt, rate):
            self.eagerly(_PULL, self._pulled, reading, number, rtt, rate)
        if _skopeo_is_here():
            with self._measured(_SKOPEO, rtt, rate):
                self.eagerly(_SKOPEO, self._copied_and_unpacked, reading, number, rtt, rate)
        if self.failed is not None and not any(isinstance(fact, Sample) for fact in self.results.facts):
            raise self.failed

    @contextlib.contextmanager
    def _measured(self, flow: str, rtt: float, rate: float) -> Iterator[None]:
        """One way; when it fails, what the others have measured stays."""
        try:
            yield
        except CkptfsError as error:
            if error.exit_code in _IN_VAIN:
                raise
            self.failed = self.failed or error
            absent = Absent("image", f"{flow}; {_link(rtt, rate)}: {error}")
            if absent not in self.results.facts:
                self.results.add(absent)
            self.say(f"{_link(rtt, rate)}: {flow}: not measured: {error}")

    def lazily(self, flow: str, reading: Reading, number: int, rtt: float, rate: float) -> None:
        with self._room() as room, ShapedLink(self.relay.address, rtt=rtt, rate=rate) as link:
            watcher = Watcher(link, room / "mnt") if number == _WATCHED else None
            with watcher or contextlib.nullcontext():
                began = time.monotonic()
                with self._mounted(link.address, room) as directory:
                    ready = time.monotonic() - began
                    replay(directory, reading.start)
                    start = time.monotonic() - began
                    early = link.stats().bytes_down if watcher is None else 0
                    replay(directory, reading.rest)
                    every = time.monotonic() - began
                    status = ask(MountFiles.of(str(directory)), "status")
            marks = {"mounted": ready, "process could run": start, "all read": every}
            if watcher is not None:
                self._series(flow, rtt, rate, watcher, marks)
                return
            reads, prefetch = status["reads"], status["prefetch"]
            values = {"ready": ready, "start": start, "all": every, "bytes_at_start": early}
            values |= {"bytes": link.stats().bytes_down, "requests": status["network"]["requests"]}
            values |= {
                "reads": reads["count"],
                **{name: reads[name] for name in ("memory_hits", "disk_hits", "misses")},
            }
            values |= {"prefetched": prefetch["bytes"], "prefetched_used": prefetch["used_bytes"]}
            self._sample(flow, number, rtt, rate, values)

    def eagerly(
        self, flow: str, pull: Callable[[str, Path], Path], reading: Reading, number: int, rtt: float, rate: float
    ) -> None:
        """The same reads after everything has been pulled and unpacked."""
        with self._room() as room, ShapedLink(self.relay.address, rtt=rtt, rate=rate) as link:
            watcher = Watcher(link) if number == _WATCHED else None
            with watcher or contextlib.nullcontext():
                began = time.monotonic()
                directory = pull(f"{link.address}/{self.relay.repository}:{self.relay.tag}", room)
                ready = time.monotonic() - began
                replay(directory, _existing(directory, reading.start))
                start = time.monotonic() - began
                replay(directory, _existing(directory, reading.rest))
                every = time.monotonic() - began
            if watcher is not None:
                marks = {"unpacked": ready, "process could run": start, "all read": every}
                self._series(flow, rtt, rate, watcher, marks)
                return
            count = link.stats().bytes_down
            values = {"ready": ready, "start": start, "all": every, "bytes_at_start": count, "bytes": count}
            self._sample(flow, number, rtt, rate, values)

    @contextlib.contextmanager
    def _mounted(self, host: str, room: Path) -> Iterator[Path]:
        """The image on room/mnt, with a cache in the room."""
        target = room / "mnt"
        target.mkdir()
        reference = f"{host}/{self.relay.repository}:{self.relay.tag}"
        # The port that is configured is for a mount of the user's, which may have it.
        metrics = () if load().values["metrics"].value is None else ("--metrics", "0")
        try:
            _ckptfs("mount", reference, target, "--cache-dir", room / "cache", "--json", *metrics)
            yield target
        finally:
            # An interrupt can come when it is mounted and the command not at its end.
            if mount_at(canonical(str(target))) is not None:
                _ckptfs("umount", target, finish=True)

    def _pulled(self, reference: str, room: Path) -> Path:
        _ckptfs("pull", reference, room / "eager", "--quiet")
        return room / "eager"

    def _copied_and_unpacked(self, reference: str, room: Path) -> Path:
        """skopeo fetches, tar unpacks layer by layer; whiteouts are not applied."""
        copy, target = room / "copy", room / "eager"
        target.mkdir()
        # What is signed by whom is the business of who pulls to run it: this copy is read once and removed.
        skopeo = ("skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false")
        _run(*skopeo, f"docker://{reference}", f"dir:{copy}")
        for layer in json.loads((copy / "manifest.json").read_text())["layers"]:
            blob = copy / layer["digest"].partition(":")[2]
            _run("tar", "--extract", "--file", blob, "--directory", target)
            if os.geteuid() != 0:  # a checkpoint/ of mode 0600, as runc makes it, only root can enter
                _run("chmod", "--recursive", "u+rwX", target)
        return target

    @contextlib.contextmanager
    def _room(self) -> Iterator[Path]:
        self._count += 1
        room = self.folder / str(self._count)
        room.mkdir()
        try:
            yield room
        finally:
            shutil.rmtree(room, ignore_errors=True)

    def _sample(self, flow: str, number: int, rtt: float, rate: float, values: dict[str, float]) -> None:
        self.results.add(Sample("image", flow, number, _conditions(rtt, rate), values))
        start, every = values["start"], values["all"]
        self.say(f"{_link(rtt, rate)}: {flow}: process could run after {start:.2f} s, all read after {every:.2f} s")

    def _series(self, flow: str, rtt: float, rate: float, watcher: Watcher, marks: dict[str, float]) -> None:
        self.results.add(Series("image", flow, _conditions(rtt, rate), Watcher.columns, watcher.points, marks))


def _figures(results: ResultFile, wanted: Comparison) -> Iterator[Figure]:
    """Per link and flow: how much sooner than eagerly, and how much was fetched for it."""
    for rtt, rate in wanted.links:
        runs: dict[str, list[Sample]] = {}
        for fact in results.facts:
            if isinstance(fact, Sample) and fact.conditions == _conditions(rtt, rate):
                runs.setdefault(fact.flow, []).append(fact)
        link = _link(rtt, rate)
        peer: dict[str, Any] = {}
        for flow in (_SKOPEO, _PULL):  # the last one there is what the lazy ways are compared with
            if flow in runs:
                seconds = [run.values["start"] for run in runs.pop(flow)]
                peer = {"peer": flow, "peer_value": median(seconds)}
                yield figure("image", f"{flow}: until the process could run; {link}", seconds, "s")
        for flow, found in runs.items():
            seconds = [run.values["start"] for run in found]
            yield figure("image", f"{flow}: until the process could run; {link}", seconds, "s", **peer)
            megabytes = [run.values["bytes_at_start"] / 1e6 for run in found]
            yield figure("image", f"{flow}: fetched by then; {link}", megabytes, "MB")


def _skopeo_is_here() -> bool:
    return all(shutil.which(tool) for tool in ("skopeo", "tar", "zstd"))


def _existing(directory: Path, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Without what only a mount shows: the contents of archives, the unpacked side of nested layouts."""
    return tuple(
        tuple(tuple(piece for piece in stream if (directory / piece.path).exists()) for stream in step)
        for step in steps
    )


def _link(rtt: float, rate: float) -> str:
    return f"{rtt * 1000:g} ms, {rate / 1e6:g} Mbit/s" if rate else f"{rtt * 1000:g} ms, no cap"


def _conditions(rtt: float, rate: float) -> dict[str, str | float]:
    return {"rtt_ms": rtt * 1000, "mbit": rate / 1e6}


def _ckptfs(*words: str | Path, finish: bool = False) -> None:
    """Another command of this program; its error is ours."""
    done = _start(sys.executable, "-m", "ckptfs", *words, finish=finish)
    if done.returncode:
        message = _last_line(done).removeprefix("ckptfs: ")
        error = CkptfsError(message or f"ckptfs {words[0]} ended with {done.returncode}")
        error.exit_code = done.returncode
        raise error


def _run(*words: str | Path) -> None:
    done = _start(*words)
    if done.returncode:
        raise UnavailableError(f"{words[0]} failed: {_last_line(done) or 'it said nothing'}")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Why it failed; what stands above are log lines."""
    return (done.stderr.strip().splitlines() or [""])[-1]


def _start(*words: str | Path, finish: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. An interrupt is for us; we pass it on and wait, or only wait if it has to `finish`.

    subprocess.run would kill it, and a `ckptfs mount` that is killed leaves its daemon behind.
    """
    command, pipe = [os.fspath(word) for word in words], subprocess.PIPE
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, process_group=0
    ) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            if not finish:
                process.send_signal(signal.SIGINT)
            process.communicate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
