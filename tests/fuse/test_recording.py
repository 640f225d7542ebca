"""What a mount records of its reads, how it tells that it is ready, and what it does while nobody asks."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import ckptfs, mounted
from tests.support.fake_registry import FakeRegistry, Trickle
from tests.support.tools import require, wait_for

pytestmark = pytest.mark.fuse

LAYOUT = Path(__file__).parent.parent / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fusermount3")


def test_every_read_is_recorded_in_order(tmp_path: Path) -> None:
    record = tmp_path / "reads.jsonl"
    with FakeRegistry() as registry:
        registry.add_layout(LAYOUT, "repo")
        reference = registry.reference("repo:latest")
        with mounted(reference, tmp_path, "--record", record, "--no-background-fetch") as mount:
            (mount.path / "config.dump").read_bytes()
            wait_for("the record", lambda: record.exists() and record.read_text())
            early = [json.loads(line) for line in record.read_text().splitlines()]
            assert [fact["path"] for fact in early] == ["config.dump"]
            size = (mount.path / "checkpoint" / "pages-1.img").stat().st_size
            (mount.path / "checkpoint" / "pages-1.img").read_bytes()
            (mount.path / "rootfs-diff" / "etc" / "passwd").read_bytes()
            count = mount.status()["reads"]["count"]
    facts = [json.loads(line) for line in record.read_text().splitlines()]
    assert record.stat().st_mode & 0o777 == 0o600
    assert all(set(fact) == {"t_ms", "path", "offset", "length", "hit", "wait_ms", "pid", "command"} for fact in facts)
    assert len(facts) in (count, count - 1), "all but the read that told that the mount is ready"
    times = [fact["t_ms"] for fact in facts]
    assert times == sorted(times) and 0 < times[0] < 30_000
    pages = [fact for fact in facts if fact["path"] == "checkpoint/pages-1.img"]
    assert sum(fact["length"] for fact in pages) == size and not pages[0]["hit"]
    assert facts[-1]["path"] == "rootfs-diff/etc/passwd" and {fact["hit"] for fact in facts} == {True, False}


def test_who_waited_and_for_how_long(tmp_path: Path) -> None:
    record = tmp_path / "reads.jsonl"
    with FakeRegistry({("GET /v2/repo/blobs/", None): Trickle(0.02, 4096)}) as registry:
        registry.add_layout(LAYOUT, "repo")
        options = ("--record", record, "--no-background-fetch", "--prefetch", "none")
        with mounted(registry.reference("repo:latest"), tmp_path, *options) as mount:
            pages = mount.path / "checkpoint" / "pages-1.img"
            with subprocess.Popen(["dd", f"if={pages}", "of=/dev/null", "bs=4k", "count=1"], stderr=-3) as reader:
                assert reader.wait(30) == 0
            (mount.path / "config.dump").read_bytes()
    facts = [json.loads(line) for line in record.read_text().splitlines()]
    first = next(fact for fact in facts if fact["path"] == "checkpoint/pages-1.img")
    assert (first["command"], first["pid"], first["hit"]) == ("dd", reader.pid, False)
    assert 10 < first["wait_ms"] < 30_000
    assert all(fact["wait_ms"] == 0 for fact in facts if fact["hit"])
    assert {fact["pid"] for fact in facts if fact["path"] == "config.dump"} == {os.getpid()}


def test_recorded_ranges_are_those_that_were_read(tmp_path: Path) -> None:
    record = tmp_path / "reads.jsonl"
    rng = random.Random(1)
    with mounted(f"oci:{LAYOUT}", tmp_path, "--record", record) as mount:
        wait_for("everything is here", lambda: mount.status()["complete"])
        path = mount.path / "checkpoint" / "pages-1.img"
        size, wanted = path.stat().st_size, []
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for _ in range(20):
                offset = rng.randrange(size - 4096)
                wanted.append((offset, len(os.pread(file.fileno(), 4096, offset))))
    facts = [json.loads(line) for line in record.read_text().splitlines()]
    spans = [(f["offset"], f["offset"] + f["length"]) for f in facts if f["path"] == "checkpoint/pages-1.img"]
    for offset, length in wanted:
        for at in range(offset, offset + length, 512):
            assert any(start <= at < end for start, end in spans), (offset, spans)
    assert sum(end - start for start, end in spans) < 20 * 16384


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    done = ckptfs("mount", f"oci:{LAYOUT}", tmp_path / "mnt", "--record", tmp_path / "no" / "where")
    assert done.code == 2 and "--record" in done.line and not os.path.ismount(tmp_path / "mnt")


def test_readiness_is_told_to_descriptor_and_service_manager(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.settimeout(20)
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "ckptfs", "mount", f"oci:{LAYOUT}", str(tmp_path / "mnt"), "--foreground"]
    command += ["--ready-fd", str(writer), "--cache-dir", str(tmp_path / "cache")]
    env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    with subprocess.Popen(command, pass_fds=[writer], env=env) as process, told, os.fdopen(reader, "rb") as ready:
        os.close(writer)
        assert ready.read() == b"ready\n"
        assert (tmp_path / "mnt" / "config.dump").read_bytes()
        assert told.recv(100) == b"READY=1"
        assert ckptfs("umount", tmp_path / "mnt").code == 0
        assert process.wait(10) == 0


def test_segments_that_another_process_evicted_are_let_go(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        wait_for("everything is here", lambda: mount.status()["complete"])

        def deleted() -> int:
            links = [fd.readlink() for fd in Path(f"/proc/{mount.pid}/fd").iterdir() if fd.is_symlink()]
            return sum(link.name.endswith(".seg (deleted)") for link in links)

        assert ckptfs("cache", "clear", "--force", "--cache-dir", mount.cache).code == 0
        wait_for("they are closed", lambda: deleted() == 0, patience=12)
        assert ckptfs("cache", "info", "--json", "--cache-dir", mount.cache).json["in_use"]
        assert (mount.path / "checkpoint" / "pages-1.img").read_bytes()
