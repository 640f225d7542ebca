"""P12: an image of 100 000 small files: mount, `find` of all, memory of the daemon; beside pull, unpack and find."""

import subprocess
import time
from pathlib import Path

from bench.flows import status_of
from bench.lab import LOOPBACK, Lab
from bench.rows import Row
from ckptfs.bench.machine import usage
from tests.support.command import mounted
from tests.support.images import extract

_DIRECTORIES = 1000
_REPOSITORY = "bench/files:zstd-chunked"


def _measure(lab: Lab) -> None:
    count = 20_000 if lab.quick else 100_000
    reference = _image(lab, count)
    conditions = {**LOOPBACK.conditions, "files": count}
    mounts, finds, memory = [], [], []
    for number in range(max(lab.few, 2)):
        with lab.room() as room:
            lab.cold(_REPOSITORY)
            began = time.time()
            with mounted(reference, room, "--view", "raw", figures=False) as mount:
                mounts.append(time.time() - began)
                finds.append(_find(mount.path, count))
                found = usage(mount.pid)
                memory.append(found.peak_rss / 1e6)
                facts = {"requests": status_of(mount)["network"]["requests"], "cpu": found.cpu, "rss": found.rss}
        lab.sample("P12", "ckptfs", number, conditions, mount=mounts[-1], find=finds[-1], **facts)
    with lab.room() as room:
        lab.cold(_REPOSITORY)
        began = time.time()
        copy = extract(reference, room / "eager")
        pulled = time.time() - began
        found_there = _find(copy, count)
    lab.sample("P12", "skopeo, tar", 0, conditions, mount=pulled, find=found_there)
    files = f"{count} files"
    lab.figure("P12", f"mount, {files}", mounts, "s", limit=3, peer="skopeo, tar", peer_value=pulled)
    lab.figure("P12", f"find of all, {files}", finds, "s", limit=6, peer="find on the disk", peer_value=found_there)
    lab.figure("P12", f"most memory, {files}", memory, "MB", limit=250)


def _image(lab: Lab, count: int) -> str:
    """Files of 200 bytes in a thousand directories, pushed by buildah as zstd:chunked."""
    lab.say(f"  an image of {count} files …")
    with lab.room() as room:
        root = room / "root"
        for directory in range(_DIRECTORIES):
            folder = root / f"package-{directory % 50}" / f"module-{directory}"
            folder.mkdir(parents=True)
            for file in range(count // _DIRECTORIES):
                (folder / f"file-{file}.txt").write_text(f"{directory} {file} contents of a small file\n" * 5)
        lab.builder.build(root, "files")
        return lab.builder.push("files", "bench/files", "zstd:chunked")


def _find(directory: Path, count: int) -> float:
    """Seconds that find takes; RuntimeError unless it finds that many files."""
    began = time.time()
    found = subprocess.run(["find", directory, "-type", "f"], capture_output=True, check=True).stdout
    took = time.time() - began
    if (lines := found.count(b"\n")) != count:
        raise RuntimeError(f"find says {lines} files, not {count}")
    return took


ROW = Row("P12", "Many files", _measure, ("buildah", "skopeo", "find"))
