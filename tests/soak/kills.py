"""Row C1 with real mounts: daemons killed while they fill the cache, mounted again, and every byte compared."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.support.chunked import PAGES
from tests.support.command import ckptfs, mounted
from tests.support.fake_registry import FakeRegistry
from tests.support.readers import content


@dataclass
class Kills:
    """`kept` of `finished` cached bytes were there after the kill; `longest`: ms until a second mount was ready."""

    loops: int = 0
    wrong: int = 0
    finished: int = 0
    kept: int = 0
    longest: float = 0.0
    left: int = 0

    def __str__(self) -> str:
        kept = f"{self.kept / max(self.finished, 1):.1%} of {self.finished / 1e6:.0f} MB kept"
        ready = f"mounted again within {self.longest:.0f} ms"
        return f"{self.loops} kills, {self.wrong} wrong files, {kept}, {self.left} files left behind, {ready}"


def kill_loop(registry: FakeRegistry, reference: str, size: int, folder: Path, loops: int, seed: int = 1) -> Kills:
    """`reference` has a file PAGES that holds content(size)."""
    random, found, expected = Random(seed), Kills(), content(size)
    target, cache = folder / "mnt", folder / "cache"
    target.mkdir(parents=True)
    for number in range(loops):
        started = ckptfs("mount", reference, target, "--json", "--cache-dir", cache)
        assert started.code == 0, started.err
        time.sleep(random.random() * 0.6)
        finished = ckptfs("status", target, "--json").json["cached_bytes"]
        os.kill(started.json["pid"], signal.SIGKILL)
        ckptfs("umount", target)
        with mounted(reference, folder, cache=cache) as mount:
            found.longest = max(found.longest, mount.first["ready_ms"])
            found.finished += finished
            found.kept += min(finished, mount.status()["cached_bytes"])
            found.wrong += (mount.path / PAGES.decode()).read_bytes() != expected
        found.loops += 1
        found.left += len([path for path in cache.rglob("*") if path.is_file() and "tmp" in path.name])
        assert ckptfs("cache", "clear", "--cache-dir", cache).code == 0
        registry.log.clear()
        assert not os.path.ismount(target), f"loop {number} left a mount"
    return found
