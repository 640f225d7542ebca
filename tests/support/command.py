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


def ckptfs(*arguments: object, env: dict[str, str] | None = None, timeout: float = 60) -> Result:
    """Run `ckptfs` with these arguments; never raises for a failed command."""
    done = subprocess.run(
        [sys.executable, "-m", "ckptfs", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return Result(done.returncode, done.stdout, done.stderr)


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
def mounted(reference: object, folder: Path, *options: object, cache: Path | None = None) -> Iterator[Mounted]:
    """`reference` mounted on folder/mnt with a cache in folder/cache; unmounted afterwards whatever happens."""
    target = folder / "mnt"
    target.mkdir(exist_ok=True, parents=True)
    cache = cache or folder / "cache"
    result = ckptfs("mount", reference, target, "--json", "--cache-dir", cache, *options)
    assert result.code == 0, result.err
    try:
        yield Mounted(target, result.json, cache)
    finally:
        ended = ckptfs("umount", target)
        if ended.code != 0 and "nothing is mounted" not in ended.err:
            subprocess.run(["umount", "-l", str(target)], check=False)
            raise AssertionError(ended.err)
        assert not os.path.ismount(target)
