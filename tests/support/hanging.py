"""Mounts whose registry stops answering: an image, a foreground mount, and how its readers must end.

Owns the image of rows L2 to L8: 64 MB of pages and a thousand small files. Called by tests of the life of mounts.
"""

import errno
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptfs.control.client import MountFiles
from tests.support.command import ckptfs, loud, overhear
from tests.support.fake_registry import FakeRegistry, Silent
from tests.support.readers import Ended, content
from tests.support.registry_faults import Fault
from tests.support.tars import member
from tests.support.tools import ROOT

TAR = "application/vnd.oci.image.layer.v1.tar"
BLOB = "GET /v2/repo/blobs/"
SMALL_FILES = 1000
LAZY = ("--prefetch", "none", "--no-background-fetch")
SILENT = Silent()
GONE = (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)
Figure = Callable[[str, object], None]


@functools.cache
def pages() -> bytes:
    return content(64 << 20)


@pytest.fixture(scope="session")
def hanging_layer() -> bytes:
    """A checkpoint of 64 MB with a thousand small files beside it."""
    small = [member(b"checkpoint/core-%d.img" % number, b"x" * 100) for number in range(SMALL_FILES)]
    parts = [member(b"config.dump", b"{}"), *small, member(b"checkpoint/pages-1.img", pages()), bytes(1024)]
    return b"".join(parts)


@pytest.fixture
def hanging(hanging_layer: bytes) -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        registry.add_image("repo", "latest", [(TAR, hanging_layer)])
        yield registry


@contextmanager
def foreground(
    folder: Path, *words: object, module: tuple[str, ...] = ("ckptfs",)
) -> Iterator[tuple[Path, "subprocess.Popen[str]"]]:
    """A mount on folder/mnt whose process is ours: its exit code can be asked. Its stderr is in folder/stderr."""
    target = folder / "mnt"
    target.mkdir(exist_ok=True)
    reader, writer = os.pipe()
    options = ["--foreground", "--ready-fd", writer, "--cache-dir", folder / "cache"]
    command = [sys.executable, "-m", *module, "mount", *words[:1], target, *options, *words[1:], *loud()]
    with (folder / "stderr").open("w") as log, os.fdopen(reader, "rb") as ready:
        process = subprocess.Popen(list(map(str, command)), pass_fds=[writer], cwd=ROOT, stderr=log, text=True)
        os.close(writer)
        try:
            assert ready.read() == b"ready\n", (folder / "stderr").read_text()
            yield target, process
        finally:
            ckptfs("umount", target)
            if process.poll() is None:
                process.kill()
                process.wait()
            MountFiles.of(str(target)).lock.unlink(missing_ok=True)
            overhear((folder / "stderr").read_text())


def hang(registry: FakeRegistry, mnt: Path, fault: Fault = SILENT) -> None:
    """From now on the layer's bytes do not come; its names are known."""
    assert len(os.listdir(mnt / "checkpoint")) == SMALL_FILES + 1
    registry.script = {(BLOB, None): fault}


def assert_told(results: list[Ended], count: int, told: int | None = None) -> None:
    """All readers have ended, with the right bytes or with an error; some of the chunks may have been here already."""
    assert len(results) == count
    assert all(one.right or one.errno in GONE for one in results), [one for one in results if not one.right][:5]
    assert sum(one.errno != 0 for one in results) >= (count // 2 if told is None else told)


def errno_of(action: Callable[[], object]) -> int:
    try:
        action()
    except OSError as error:
        return error.errno or -1
    return 0


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
