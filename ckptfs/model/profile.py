"""The profile of an image: which parts of its files real restores read, in which order and when.

    {"version": 1, "recordings": 2, "files": ["checkpoint/pages-1.img"], "runs": [[0, 131072, 4096, 412], ...]}

A run is [file, offset, length, milliseconds since the mount began]; runs are in the order of their times and do not
overlap. Bytes in, values out; made by prefetch/working_set.py. The document comes from whoever may push to the
repository: everything in it is bounded and checked here, once. A wrong one costs speed and nothing else.
"""

import bisect
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from ckptfs.errors import FormatError, LimitExceeded
from ckptfs.model.oci import parse_json
from ckptfs.model.paths import plain
from ckptfs.settings import KiB, Limits

_VERSION = 1
_GAP = 64 * KiB  # bytes between two runs that are fetched with them: the engine's coalesce_gap
_TOGETHER = 1000  # milliseconds between neighbours that become one run; later ones need not come that early
LATEST = 24 * 3600 * 1000  # milliseconds
_MOST_RECORDINGS = 1 << 20


class Run(NamedTuple):
    """Bytes [offset, offset + length) of the file `path` of the checkpoint view, `at` milliseconds after the mount."""

    path: bytes
    offset: int
    length: int
    at: int


class Profile(NamedTuple):
    """`recordings`: of how many restores."""

    runs: tuple[Run, ...]
    recordings: int = 1

    @property
    def total(self) -> int:
        """Bytes of all runs."""
        return sum(run.length for run in self.runs)

    @property
    def paths(self) -> tuple[bytes, ...]:
        """In the order of their first use."""
        return tuple(dict.fromkeys(run.path for run in self.runs))


def joined(runs: Iterable[Run], limits: Limits) -> tuple[Run, ...]:
    """The runs without overlaps, near neighbours of about the same time as one, in the order of their times.

    LimitExceeded when there are too many.
    """
    files: dict[bytes, list[Run]] = defaultdict(list)
    for run in runs:
        files[run.path].append(run)
    out: list[Run] = []
    for found in files.values():
        pieces = _unread(sorted(found, key=lambda run: (run.at, run.offset)))
        out.extend(_joined(sorted(pieces, key=lambda run: run.offset)))
    if len(out) > limits.profile_runs:
        raise LimitExceeded(f"the profile has more than {limits.profile_runs} runs")
    return tuple(sorted(out, key=lambda run: (run.at, run.path, run.offset)))


def merged(profiles: Iterable[Profile], limits: Limits) -> Profile:
    """The profile of all their restores: what any of them read, at the earliest time that one did."""
    found = list(profiles)
    recordings = min(sum(profile.recordings for profile in found), _MOST_RECORDINGS)
    return Profile(joined((run for profile in found for run in profile.runs), limits), recordings)


def encode_profile(profile: Profile) -> bytes:
    """The document; the same bytes for the same profile."""
    numbers = {path: number for number, path in enumerate(profile.paths)}
    document = {
        "version": _VERSION,
        "recordings": profile.recordings,
        "files": [os.fsdecode(path) for path in numbers],
        "runs": [[numbers[run.path], run.offset, run.length, run.at] for run in profile.runs],
    }
    return json.dumps(document, separators=(",", ":")).encode()


def decode_profile(data: bytes, limits: Limits) -> Profile:
    """The profile out of its document. FormatError for whatever is not as it should be."""
    if len(data) > limits.profile_bytes:
        raise LimitExceeded(f"the profile is larger than {limits.profile_bytes} bytes")
    value = parse_json(data, "profile")
    if not isinstance(value, dict) or value.get("version") != _VERSION:
        raise FormatError(f"not a profile of version {_VERSION}")
    files, runs, recordings = value.get("files"), value.get("runs"), value.get("recordings", 1)
    if not isinstance(files, list) or not isinstance(runs, list) or not _number(recordings, 1, _MOST_RECORDINGS):
        raise FormatError("the profile has no list of files and of runs, or no number of recordings")
    if len(runs) > limits.profile_runs or len(files) > len(runs):
        raise LimitExceeded(f"the profile has more than {limits.profile_runs} runs, or more files than runs")
    paths = [_path(name, limits) for name in files]
    found = tuple(_run(run, paths, limits) for run in runs)
    if len(set(paths)) != len(paths) or any(a.at > b.at for a, b in pairwise(found)):
        raise FormatError("the profile names a file twice, or its runs are not in order")
    _check_overlaps(found)
    return Profile(found, recordings)


def _unread(runs: list[Run]) -> Iterator[Run]:
    """Of one file, by time: the parts of each run that no earlier one has."""
    starts: list[int] = []  # what has been read, sorted, without overlaps
    ends: list[int] = []
    for run in runs:
        lo, hi = run.offset, run.offset + run.length
        first = bisect.bisect_left(ends, lo)
        last = bisect.bisect_right(starts, hi)
        at = lo
        for begun, ended in zip(starts[first:last], ends[first:last], strict=True):
            if at < begun:
                yield run._replace(offset=at, length=begun - at)
            at = max(at, ended)
        if at < hi:
            yield run._replace(offset=at, length=hi - at)
        if first < last:
            lo, hi = min(lo, starts[first]), max(hi, ends[last - 1])
        starts[first:last] = [lo]
        ends[first:last] = [hi]


def _joined(runs: list[Run]) -> Iterator[Run]:
    """Of one file, by offset, without overlaps."""
    current = runs[0]
    for run in runs[1:]:
        end = current.offset + current.length
        if run.offset <= end + _GAP and abs(run.at - current.at) <= _TOGETHER:
            length = run.offset + run.length - current.offset
            current = current._replace(length=length, at=min(current.at, run.at))
        else:
            yield current
            current = run
    yield current


def _run(value: object, paths: list[bytes], limits: Limits) -> Run:
    if not isinstance(value, list) or len(value) != 4:
        raise FormatError("a run of the profile is not [file, offset, length, milliseconds]")
    file, offset, length, at = value
    if not (_number(file, 0, len(paths) - 1) and _number(at, 0, LATEST)):
        raise FormatError("a run of the profile names no file, or no time")
    if not (_number(offset, 0, limits.file_bytes) and _number(length, 1, limits.file_bytes)):
        raise FormatError("a run of the profile has no place in a file")
    return Run(paths[file], offset, length, at)


def _path(name: object, limits: Limits) -> bytes:
    try:
        path = plain(os.fsencode(name), limits) if isinstance(name, str) else b""
    except UnicodeError:
        path = b""
    if not path:
        raise FormatError("the profile names something that is no path")
    return path


def _check_overlaps(runs: tuple[Run, ...]) -> None:
    """A profile must not make anybody go through a large file many times over."""
    ends: dict[bytes, int] = {}
    for run in sorted(runs, key=lambda run: run.offset):
        if run.offset < ends.get(run.path, 0):
            raise FormatError("runs of the profile overlap")
        ends[run.path] = run.offset + run.length


def _number(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
