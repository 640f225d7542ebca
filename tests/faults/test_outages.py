"""Rows N12, N13 and L11: a registry that goes away under a mount, comes back or does not, and was away all along.

Real mounts and a real docker-registry, which is stopped as an operator stops it; the default time limits, but for the
deadline where a test says so.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from ckptfs.settings import KiB, MiB, Timeouts
from tests.support.chunked import PAGES, add_chunked
from tests.support.command import ckptfs, mounted
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import FakeRegistry
from tests.support.faulty import Record
from tests.support.hanging import LAZY, errno_of
from tests.support.sources import client, copy_image
from tests.support.tools import require, run, wait_for

pytestmark = [pytest.mark.fuse, pytest.mark.registry]

CHUNK = 64 * KiB
DATA = Random(31).randbytes(8 * MiB)
REPO = "repo:latest"


@pytest.fixture
def registry() -> Iterator[DockerRegistry]:
    """One of its own: it will be stopped."""
    require("docker-registry", "fusermount3")
    with FakeRegistry() as fake, client(fake) as source, DockerRegistry() as registry:
        add_chunked(fake, {b"config.dump": b"{}", PAGES: DATA}, CHUNK)
        with client(registry.host, timeouts=Timeouts()) as target:
            copy_image(source, target)
        yield registry


other = registry


def pages(folder: Path) -> int:
    file = os.open(folder / PAGES.decode(), os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    return file


def read(file: int, chunk: int) -> None:
    assert os.pread(file, CHUNK, chunk * CHUNK) == DATA[chunk * CHUNK : (chunk + 1) * CHUNK]


@pytest.mark.row("N12")
def test_misses_wait_for_a_registry_that_comes_back(
    registry: DockerRegistry, other: DockerRegistry, tmp_path: Path, record_property: Record
) -> None:
    """Two at the same time; the 55 s of the plan are in scripts/soak."""

    def away(registry: DockerRegistry, seconds: int) -> tuple[int, float, float]:
        """(how long it was away, when a cached read was answered, when the last miss was)"""
        with mounted(registry.reference(REPO), tmp_path / str(seconds), *LAZY) as mount:
            file = pages(mount.path)
            read(file, 10)
            registry.stop()
            began = time.monotonic()
            with ThreadPoolExecutor(16) as pool:
                reads = [pool.submit(read, file, chunk) for chunk in range(20, 100, 5)]
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                read(file, 10)
                cached = time.monotonic() - began
                time.sleep(seconds - cached)
                registry.start()
                for done in reads:
                    done.result()
            waited = time.monotonic() - began
            os.close(file)
            assert mount.status()["errors"] == []
        return seconds, cached, waited

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(away, (registry, other), (2, 12)))
    for seconds, cached, waited in found:
        record_property("figure", f"away for {seconds} s: 16 misses, 0 errors, data after {waited:.1f} s")
        assert cached < 0.5
        assert waited < seconds + 5


@pytest.mark.row("N12")
def test_a_registry_that_never_comes_back(registry: DockerRegistry, tmp_path: Path, record_property: Record) -> None:
    deadline = 4
    with mounted(registry.reference(REPO), tmp_path, *LAZY, "--read-deadline", deadline) as mount:
        file = pages(mount.path)
        read(file, 10)
        registry.stop()
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda chunk: errno_of(lambda: read(file, chunk)), range(20, 100, 10)))
        took = time.monotonic() - began
        read(file, 10)
        os.close(file)
    record_property("figure", f"for ever: EIO after {took:.1f} s with a deadline of {deadline} s")
    assert found == [errno.EIO] * 8
    assert abs(took - deadline) <= 1.0


@pytest.mark.row("N12")
def test_nothing_is_missed_when_all_is_here(registry: DockerRegistry, tmp_path: Path, record_property: Record) -> None:
    with mounted(registry.reference(REPO), tmp_path) as mount:
        wait_for("background fetch", lambda: mount.status()["complete"], step=0.1)
        registry.stop()
        file = pages(mount.path)
        for _ in range(3):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            for chunk in range(len(DATA) // CHUNK):
                read(file, chunk)
        os.close(file)
        assert mount.status()["errors"] == []
    record_property("figure", "after the background fetch: 0 errors in 384 reads")


@pytest.mark.alone
@pytest.mark.row("N13")
def test_a_second_mount_needs_no_network(registry: DockerRegistry, tmp_path: Path, record_property: Record) -> None:
    """In a network namespace with nothing in it: whoever opened a socket would get an error."""
    require("unshare", root=True)
    cache, target = tmp_path / "cache", tmp_path / "mnt"
    with mounted(registry.reference(REPO), tmp_path, cache=cache) as mount:
        wait_for("background fetch", lambda: mount.status()["complete"], step=0.1)
    registry.stop()
    target.mkdir(exist_ok=True)
    listening = f"""
import sys
def hear(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto") and isinstance(arguments[1], (tuple, int)):
        open({str(tmp_path / "heard")!r}, "a").write(event)
sys.addaudithook(hear)
from ckptfs.cli import run
sys.exit(run(sys.argv[1:]))
"""
    times = []
    for how in (("-m", "ckptfs"), ("-m", "ckptfs"), ("-c", listening)):
        command = ["unshare", "--net", sys.executable, *how, "mount", registry.reference(REPO), target, "--json"]
        try:
            run(*map(str, command), "--offline", "--cache-dir", str(cache))
            status = ckptfs("status", target, "--json").json
            times.append(status["ready_ms"])
            assert (target / PAGES.decode()).read_bytes() == DATA
            assert ckptfs("status", target, "--json").json["network"]["requests"] == 0
        finally:
            ckptfs("umount", target)
    record_property("figure", f"--offline without a network: ready after {min(times):.0f} ms, no socket opened")
    assert min(times) <= 500
    assert not (tmp_path / "heard").exists(), "a socket was opened, or a name asked for"


@pytest.mark.row("L11")
def test_the_mount_after_a_crash_is_warm(registry: DockerRegistry, tmp_path: Path, record_property: Record) -> None:
    cache = tmp_path / "cache"
    with mounted(registry.reference(REPO), tmp_path, cache=cache) as mount:
        wait_for("background fetch", lambda: mount.status()["complete"], step=0.1)
        os.kill(mount.pid, signal.SIGKILL)
        registry.stop()
        began = time.monotonic()
        with mounted(registry.reference(REPO), tmp_path, "--offline", cache=cache) as again:  # mends the dead one
            file = pages(again.path)
            read(file, 3)
            took = time.monotonic() - began
            os.close(file)
    record_property("figure", f"killed, mended and mounted, first bytes after {took:.2f} s, without the registry")
    assert took <= 1.0


@pytest.mark.row("N13")
def test_a_tag_is_remembered_while_its_registry_is_away(registry: DockerRegistry, tmp_path: Path) -> None:
    """Without --offline as well: it is tried, and what was seen last is shown."""
    with mounted(registry.reference(REPO), tmp_path) as mount:
        wait_for("background fetch", lambda: mount.status()["complete"], step=0.1)
        first = mount.first["digest"]
    registry.stop()
    with mounted(registry.reference(REPO), tmp_path) as mount:
        assert mount.first["digest"] == first
        assert (mount.path / PAGES.decode()).read_bytes() == DATA
