"""Reads of a checkpoint's directory as a list, made before the clock starts and replayed under it.

Owns the order (as criu would read, as a recorded trace says, or everything) and the replay, which only calls pread: it
does the same on a mount and on an unpacked copy. Called by `ckptfs bench` and the benchmark's rows.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import NamedTuple

from ckptfs.criu.restore_plan import PageRun, RestorePlan, Stage, plan_restore
from ckptfs.errors import FormatError, NotFoundError, UnavailableError
from ckptfs.settings import MiB

_PIECE = (
    1 * MiB
)  # most that CRIU's lazy-pages daemon reads at once (criu/uffd.c); plain restores read as fast as they can


class Piece(NamedTuple):
    """Bytes [offset, offset + length) of the file `path`, relative to the directory that is read."""

    path: str
    offset: int
    length: int


Stream = tuple[Piece, ...]  # read one after another
Step = tuple[Stream, ...]  # streams that are read at the same time


@dataclass(frozen=True, slots=True)
class Reading:
    """`start`: what is read before the process runs; `rest`: what follows. Steps wait for one another."""

    what: str
    start: tuple[Step, ...]
    rest: tuple[Step, ...] = ()

    @property
    def start_bytes(self) -> int:
        return sum(_bytes(step) for step in self.start)

    @property
    def bytes(self) -> int:
        return self.start_bytes + sum(_bytes(step) for step in self.rest)


def reading_of(directory: Path, *, lazy: bool) -> Reading:
    """What a restore reads of the directory, with lazy pages or without; everything where it holds no checkpoint."""
    images = directory / "checkpoint"
    if not (images / "inventory.img").exists():
        return Reading("every file, one after another", ((whole_files(directory),),))
    sizes = {path.name: path.stat().st_size for path in images.iterdir() if path.is_file()}

    def read(name: str) -> bytes | None:
        with _translated(name):
            return (images / name).read_bytes() if name in sizes else None

    plan = plan_restore(read, sizes, lazy=lazy)
    start = (_metadata(plan, sizes), *(_step(stage) for stage in plan.stages if stage.name != "transfer"))
    rest = tuple(_step(stage) for stage in plan.stages if stage.name == "transfer")
    return Reading("what criu reads" + (" with lazy pages" if lazy else ""), start, rest)


def recorded_reading(trace: Path) -> Reading:
    """A trace of accesses: JSON lines with path, offset and length, in their order. FormatError for other lines."""
    pieces = []
    for number, line in enumerate(trace.read_text(errors="replace").splitlines(), 1):
        try:
            value = json.loads(line)
            pieces.append(Piece(str(value["path"]), int(value["offset"]), int(value["length"])))
            if min(pieces[-1].offset, pieces[-1].length) < 0:
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError):
            raise FormatError(
                f"{trace}, line {number} is no access", hint='write lines like {"path": …, "offset": 0, "length": 4096}'
            ) from None
    if not pieces:
        raise NotFoundError(f"{trace} has no reads", hint="it is complete when the mount has ended")
    return Reading(f"the trace {trace.name}", ((tuple(pieces),),))


def whole_files(directory: Path) -> Stream:
    """Every regular file below the directory, whole, by name."""
    found = []
    for top, names, files in os.walk(directory):
        names.sort()
        for name in sorted(files):
            path = Path(top, name)
            if path.is_file() and not path.is_symlink():
                found.append(Piece(str(path.relative_to(directory)), 0, path.stat().st_size))
    return tuple(found)


def replay(directory: Path, steps: Sequence[Step]) -> int:
    """Reads the steps; returns how many bytes came. NotFoundError, UnavailableError where a file cannot be read."""
    count, over = 0, Event()
    for step in steps:
        if len(step) == 1:
            count += _replay_stream(directory, step[0])
            continue
        with ThreadPoolExecutor(max_workers=len(step) or 1) as pool:
            try:
                count += sum(pool.map(partial(_replay_stream, directory, over=over), step))
            except BaseException:
                over.set()  # else the pool waits until all of them have read everything
                raise
    return count


def _replay_stream(directory: Path, stream: Stream, over: Event | None = None) -> int:
    count, buffer = 0, memoryview(bytearray(_PIECE))
    with ExitStack() as stack:
        opened: dict[str, int] = {}
        for path, offset, length in _pieces(stream):
            if over is not None and over.is_set():
                break
            if path not in opened and len(opened) == 64:  # as many files as criu has open; a tree may have thousands
                stack.close()
                opened.clear()
            with _translated(path):
                if path not in opened:
                    opened[path] = os.open(directory / path, os.O_RDONLY)
                    stack.callback(os.close, opened[path])
                count += os.preadv(opened[path], [buffer[:length]], offset)
    return count


def _pieces(stream: Stream) -> Iterator[Piece]:
    for path, offset, length in stream:
        for at in range(offset, offset + length, _PIECE):
            yield Piece(path, at, min(_PIECE, offset + length - at))


def _metadata(plan: RestorePlan, sizes: dict[str, int]) -> Step:
    return (tuple(Piece(f"checkpoint/{name}", 0, sizes[name]) for name in plan.metadata if name in sizes),)


def _step(stage: Stage) -> Step:
    return tuple(_stream(runs) for runs in stage.streams)


def _stream(runs: Iterable[PageRun]) -> Stream:
    return tuple(Piece(f"checkpoint/{run.file}", run.offset, run.length) for run in runs)


def _bytes(step: Step) -> int:
    return sum(piece.length for stream in step for piece in stream)


@contextmanager
def _translated(path: str) -> Iterator[None]:
    """OSError into what it means for who measures: a mount gives EIO where its registry does not answer."""
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(f"the image has no {path}", hint="was the trace recorded on a mount of it?") from None
    except OSError as error:
        hint = "is the registry there? `ckptfs ls REF` must work"
        raise UnavailableError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
