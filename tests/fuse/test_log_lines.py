"""What a log says of a registry that misbehaves: file, range, host, which try, when; and nothing that is secret."""

import contextlib
import errno
import os
import re
from pathlib import Path

import pytest

from ckptfs.control.client import MountFiles
from tests.support.chunked import add_chunked
from tests.support.command import ckptfs, mounted
from tests.support.fake_registry import FakeRegistry, Fault, Flip, Redirect, Reset, Silent, Status, Truncate
from tests.support.tools import require

pytestmark = pytest.mark.fuse

LAYOUT = Path(__file__).parent.parent / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"
LAZY = ("--no-background-fetch", "--prefetch", "none")
BLOB = "GET /v2/repo/blobs/"
PAGES = "checkpoint/pages-1.img"
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
RANGE = r"bytes=\d+-\d+"
NUMBER = r"(\d+)"
TRY = rf"GET {{host}}/v2/repo/blobs/sha256:[0-9a-f]{{{{64}}}} {RANGE} \(try {{number}}\)"


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fusermount3")


def read_through(
    folder: Path, registry: FakeRegistry, fault: Fault | None, *options: str
) -> tuple[int, str, list[str]]:
    """(errno of a read of the pages, what the daemon logged, errors in the status) while blobs have `fault`."""
    registry.add_layout(LAYOUT, "repo")
    code = 0
    with mounted(registry.reference("repo:latest"), folder, *LAZY, *options) as mount:
        if fault is not None:
            registry.script[BLOB, None] = fault
        try:
            with (mount.path / PAGES).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                os.pread(file.fileno(), 4096, 8192)
        except OSError as error:
            code = error.errno or 0
        registry.closing.set()
        return code, MountFiles.of(str(mount.path)).log.read_text(), mount.status()["errors"]


def pattern(registry: FakeRegistry, number: object) -> str:
    return TRY.format(host=re.escape(registry.host), number=number)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(Status(503), "503"), (Reset(100), "connection broke"), (Truncate(9), "ended .* early|connection broke")],
    ids=["503", "reset", "truncated"],
)
def test_every_try_and_the_reader_that_failed(fault: Fault, words: str, tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        code, log, errors = read_through(tmp_path, registry, fault, "-v", "--read-deadline", "2")
        assert code == errno.EIO
        tries = re.findall(rf"^{TIME} INFO .*{pattern(registry, NUMBER)}.*(?:{words}).*trying again in", log, re.M)
        assert tries[:2] == ["1", "2"], log
        assert re.search(rf"^{TIME} INFO ckptfs.engine.fetch: demand of bytes \d+-\d+ of sha256:\w+: ", log, re.M), log
        (line,) = [line for line in log.splitlines() if " ERROR " in line]
        assert re.match(
            rf"{TIME} ERROR .*: read {PAGES} at 8192 \(4096 bytes\): .*{pattern(registry, NUMBER)}", line
        ), line
        assert errors == [line.partition(" ERROR ckptfs.fuse.answers: ")[2]]


def test_without_v_only_what_a_reader_saw(tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        code, log, _ = read_through(tmp_path, registry, Status(404))
        assert code == errno.EIO
        assert len(log.splitlines()) == 1 and f"read {PAGES} at 8192" in log


def test_wrong_bytes_name_the_host_that_sent_them(tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        code, log, errors = read_through(tmp_path, registry, Flip())
        assert code == errno.EIO and "wrong bytes twice" in errors[0]
        assert re.search(
            rf"^{TIME} WARNING .*bytes \d+-\d+ of sha256:\w+ were wrong; {registry.host} sent them", log, re.M
        )
        assert re.search(rf"^{TIME} ERROR .*read {PAGES} at 8192", log, re.M)


def test_silence(tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        code, log, _ = read_through(tmp_path, registry, Silent(), "-v", "--read-deadline", "3")
        assert code == errno.EIO
        assert re.search(rf"INFO .*{pattern(registry, 1)}: too slow or silent; trying again", log), log


def test_every_request_with_vv_and_no_signature(tmp_path: Path) -> None:
    with FakeRegistry() as registry, FakeRegistry(storage_of=registry) as storage:
        registry.script[BLOB, None] = Redirect(storage.url)
        code, log, _ = read_through(tmp_path, registry, None, "-vv")
        assert code == 0
        assert re.search(rf"DEBUG .*GET {storage.host}/\S+ {RANGE} \(try 1\): 206", log), log
        assert "sig" not in log.lower().replace("signal", "") and "?" not in log


def test_many_files_that_fail_are_no_flood(tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        add_chunked(registry, {b"%d.bin" % n: os.urandom(100_000) for n in range(30)}, 64 << 10)
        with mounted(registry.reference("repo:latest"), tmp_path, *LAZY, "--view", "raw") as mount:
            registry.script[BLOB, None] = Status(403)
            failed = 0
            for path in [*mount.path.iterdir()] * 2:
                with contextlib.suppress(OSError):
                    path.read_bytes()
                    failed -= 1
                failed += 1
            log = MountFiles.of(str(mount.path)).log.read_text()
    lines = [line.partition(": read ")[2] for line in log.splitlines() if " ERROR " in line]
    assert failed > 50 and len(set(lines)) == len(lines) == 20


def test_a_command_without_a_mount(tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        registry.add_layout(LAYOUT, "repo")
        registry.script[BLOB, 2] = Status(500)
        done = ckptfs(
            "cp", registry.reference("repo:latest"), PAGES, tmp_path / "pages", "-v", "--cache-dir", tmp_path / "cache"
        )
    assert done.code == 0
    assert re.search(rf"^{TIME} INFO .*{pattern(registry, 1)} answered 500; trying again in \d", done.err, re.M), (
        done.err
    )
