"""The command line as a user runs it: a process, an exit code, one line on stderr; and mounts that always end."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptfs.control.client import MountFiles
from tests.support.tools import ROOT

heard: list[str] | None = None  # a list: daemons say all they can (-vv), and it collects what everybody has said


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def line(self) -> str:
        """The one line that a failed command says."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


def ckptfs(*arguments: object, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout: float = 60) -> Result:
    """Run `ckptfs` with these arguments; never raises for a failed command."""
    done = subprocess.run(
        [sys.executable, "-m", "ckptfs", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        cwd=cwd,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    overhear(done.stdout, done.stderr)
    return Result(done.returncode, done.stdout, done.stderr)


def loud() -> tuple[str, ...]:
    """What to add to the words of a mount."""
    return () if heard is None else ("-vv",)


def overhear(*said: str) -> None:
    if heard is not None:
        heard.extend(said)


@dataclass(frozen=True)
class Mounted:
    path: Path
    first: dict[str, Any]
    cache: Path

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = ckptfs("status", self.path, "--json").json
        return answer

    @property
    def pid(self) -> int:
        return int(self.first["pid"])


@contextmanager
def mounted(
    reference: object, folder: Path, *options: object, cache: Path | None = None, figures: bool = True
) -> Iterator[Mounted]:
    """`reference` mounted on folder/mnt with a cache in folder/cache; unmounted afterwards whatever happens.

    figures    `first` is the first status; else it has no more than the daemon's pid.
    """
    target = folder / "mnt"
    target.mkdir(exist_ok=True, parents=True)
    cache = cache or folder / "cache"
    more = ("--json",) if figures else ()
    result = ckptfs("mount", reference, target, *more, "--cache-dir", cache, *options, *loud())
    assert result.code == 0, result.err
    try:
        first = result.json if figures else {"pid": json.loads(MountFiles.of(str(target)).state.read_text())["pid"]}
        yield Mounted(target, first, cache)
    finally:
        log = MountFiles.of(str(target)).log
        if log.exists():  # it goes with the mount
            overhear(log.read_text(errors="replace"))
        ended = ckptfs("umount", target)
        if ended.code != 0 and "nothing is mounted" not in ended.err:
            subprocess.run(["umount", "-l", str(target)], check=False)
            raise AssertionError(ended.err)
        assert not os.path.ismount(target)
