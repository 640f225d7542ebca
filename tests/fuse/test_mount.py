"""A real mount of real images: the tree, and the life of the mount as a user sees it."""

import errno
import json
import os
import select
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from ckptfs.control.client import MountFiles
from ckptfs.namespace import in_own_namespace
from ckptfs.namespace import mount as mount_kernel_files
from ckptfs.restore.runtimes import children
from ckptfs.settings import Sizes
from tests.support import golden
from tests.support.command import ckptfs, mounted
from tests.support.each import each
from tests.support.fake_registry import FakeRegistry
from tests.support.hanging import ended
from tests.support.other_user import as_nobody
from tests.support.tools import ROOT, require

pytestmark = pytest.mark.fuse

CORPUS = Path(__file__).parent.parent / "data" / "corpus"
LAYOUTS = sorted(CORPUS.glob("*/*.oci"))
DERIVED = ("rootfs-diff", "devshm-checkpoint", "volumes")


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fusermount3")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_raw_view_equals_the_eager_extraction(layout: Path, tmp_path: Path) -> None:
    with mounted(f"oci:{layout}", tmp_path, "--view", "raw") as mount:
        assert tree_of(mount.path) == golden.load(layout.with_suffix(".golden.json"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_checkpoint_view_adds_only_directories_beside_tars(layout: Path, tmp_path: Path) -> None:
    expected = golden.load(layout.with_suffix(".golden.json"))
    with mounted(f"oci:{layout}", tmp_path) as mount:
        found = tree_of(mount.path)
    shown = {p: e for p, e in found["entries"].items() if p.split("/")[0] not in DERIVED}
    assert shown == {p: e for p, e in expected["entries"].items() if p.split("/")[0] not in DERIVED}
    added = {p.split("/")[0] for p in found["entries"]} - {p.split("/")[0] for p in expected["entries"]}
    assert added == {d for d in DERIVED if f"{d}.tar" in expected["entries"]}


def tree_of(folder: Path) -> golden.Listing:
    """The listing of a mount as the corpus has them: whole seconds."""
    found = golden.directory_listing(folder)
    for entry in found["entries"].values():
        del entry["mtime_ns"]
    return found


LAYOUT = CORPUS / "counter" / "k8s-zstdchunked.oci"


def test_mount_point_is_read_only_and_typed(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        line = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(mount.path) in line)
        _, _, fstype, options, *_ = line.split()
        assert fstype == "fuse.ckptfs"
        assert {"ro", "nodev", "nosuid"} <= set(options.split(","))
        for attempt in (
            lambda: (mount.path / "new").touch(),
            lambda: (mount.path / "config.dump").unlink(),
            lambda: os.chmod(mount.path / "config.dump", 0o600),
            lambda: os.open(mount.path / "config.dump", os.O_RDWR),
            lambda: os.open(mount.path / "config.dump", os.O_WRONLY | os.O_TRUNC),
            lambda: os.mkdir(mount.path / "d"),
            lambda: os.rename(mount.path / "config.dump", mount.path / "x"),
            lambda: os.setxattr(mount.path / "config.dump", "user.x", b"1"),
        ):
            with pytest.raises(OSError) as caught:
                attempt()
            assert caught.value.errno == errno.EROFS


def test_absent_names_are_absent_and_known_to_the_kernel(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        before = None
        for _ in range(3):
            with pytest.raises(FileNotFoundError):
                os.stat(mount.path / "checkpoint" / "memfd.img")
            with pytest.raises(NotADirectoryError):
                os.stat(mount.path / "config.dump" / "x")
            before = before or time.monotonic()
        with pytest.raises(OSError) as caught:
            os.stat(mount.path / ("n" * 300))
        assert caught.value.errno == errno.ENAMETOOLONG


def test_rootfs_diff_is_an_overlay_lower_directory(tmp_path: Path) -> None:
    require(root=True)
    base = tmp_path / "base"
    for path in ("srv/gone.txt", "srv/gonedir/x", "srv/stays", "etc/passwd"):
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / path).write_text("from the base")
    merged = tmp_path / "merged"
    merged.mkdir()
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        diff = mount.path / "rootfs-diff"
        gone = os.stat(diff / "srv" / "gone.txt")
        assert stat.S_ISCHR(gone.st_mode) and gone.st_rdev == 0
        options = f"lowerdir={diff}:{base}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True)
        try:
            assert sorted(os.listdir(merged / "srv")) == ["stays"]
            assert (merged / "etc" / "passwd").read_text() != "from the base"
            assert (merged / "opt" / "app" / "fresh").exists()
            assert os.stat(merged / "data" / "hard1").st_nlink >= 2
        finally:
            subprocess.run(["umount", str(merged)], check=True)


def test_status_has_the_fields_that_the_product_names(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        (mount.path / "config.dump").read_bytes()
        status = mount.status()
        names = "reference digest view pid ready_ms round_trips_to_ready image_bytes cached_bytes complete network"
        assert set(names.split()) | {"reads", "prefetch", "verify", "errors"} <= set(status)
        assert set(status["network"]) == {"requests", "bytes", "retries", "errors", "in_flight"}
        reads = "count bytes memory_hits disk_hits misses wait_ms_p50 wait_ms_p99"
        assert set(reads.split()) <= set(status["reads"])
        assert set(status["prefetch"]) == {"bytes", "used_bytes"}
        assert status["view"] == "checkpoint" and status["reads"]["count"] >= 1 and status["errors"] == []
        assert str(mount.path) in ckptfs("status").out


def test_everything_cached_is_complete_and_mounts_offline(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        listing = tree_of(mount.path)
        _until(lambda: mount.status()["complete"])
    with mounted(f"oci:{LAYOUT}", tmp_path, "--offline") as mount:
        assert tree_of(mount.path) == listing


def test_a_mount_out_of_the_cache_imports_nothing_that_speaks_to_registries(tmp_path: Path) -> None:
    """That would be a quarter of its time. The registry is away, and urllib3 cannot be imported in any process."""
    with FakeRegistry() as registry:
        registry.add_layout(LAYOUT, "repo")
        _, name = next(key for key in registry.manifests if ":" in key[1])
        reference = registry.reference(f"repo@{name}")
        with mounted(reference, tmp_path) as mount:
            listing = tree_of(mount.path)
            _until(lambda: mount.status()["complete"])
    program = "import sys; sys.modules['urllib3'] = None; from ckptfs.__main__ import main; main()"
    command = [sys.executable, "-c", program, "mount", reference, mount.path, "--cache-dir", mount.cache]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    try:
        assert tree_of(mount.path) == listing
        status = mount.status()
        assert status["network"]["requests"] == 0 and status["complete"] and status["errors"] == []
    finally:
        assert ckptfs("umount", mount.path).code == 0


def test_second_mount_of_a_busy_directory_is_refused(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        again = ckptfs("mount", f"oci:{LAYOUT}", mount.path, "--cache-dir", mount.cache)
        assert again.code == 8 and "mounted already" in again.line
        assert (mount.path / "config.dump").exists()


@pytest.mark.parametrize("first_mend", ["umount", "mount"])
def test_killed_daemon_is_mended(first_mend: str, tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        expected = (mount.path / "checkpoint" / "pages-1.img").read_bytes()
        os.kill(mount.pid, signal.SIGKILL)
        _until(lambda: _errno_of(mount.path / "spec.dump") == errno.ENOTCONN)
        assert "dead" in ckptfs("status").out
        told = ckptfs("status", mount.path)
        assert told.code == 8 and told.line.endswith(f"is dead; run: ckptfs umount {mount.path}")
        if first_mend == "umount":
            assert ckptfs("umount", mount.path).code == 0
            assert not os.path.ismount(mount.path)
        again = ckptfs("mount", f"oci:{LAYOUT}", mount.path, "--cache-dir", mount.cache)
        assert again.code == 0, again.err
        assert (mount.path / "checkpoint" / "pages-1.img").read_bytes() == expected


def test_umount_goes_on_after_a_failure(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        done = ckptfs("umount", tmp_path, mount.path, "/proc")
        assert done.code == 8 and not os.path.ismount(mount.path)
        first, second = done.err.splitlines()
    assert f"nothing is mounted on {tmp_path}" in first and "/proc is a proc mount" in second


def test_the_mount_of_another_user_is_told_as_such(tmp_path: Path) -> None:
    require("setpriv", "unshare", root=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder, mounted(f"oci:{LAYOUT}", Path(folder)) as mount:
        os.chmod(folder, 0o755)
        done = as_nobody("ckptfs", "status", str(mount.path), fuse=True)
        assert done.returncode == 8 and "is mounted by another user (uid 0)" in done.stderr
        assert mount.status()["view"] == "checkpoint"


def test_a_last_status_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    stats = tmp_path / "gone" / "stats.json"
    stats.parent.mkdir()
    with mounted(f"oci:{LAYOUT}", tmp_path, "--stats", stats) as mount:
        assert os.listdir(stats.parent) == []
        stats.parent.rmdir()
        assert ckptfs("umount", mount.path).code == 0
        log = MountFiles.of(str(mount.path)).log
        assert f"the last status could not be written to {stats}: No such file" in log.read_text()
        log.unlink()


def test_umount_from_outside_ends_the_daemon(tmp_path: Path) -> None:
    require(root=True)
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        subprocess.run(["umount", str(mount.path)], check=True)
        _until(lambda: ended(mount.pid))


def test_names_of_sources_may_have_any_letters(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode("a, b\\c ü ".encode() + b"\xff.tar")
    with tarfile.open(source, "w") as archive:
        archive.add(LAYOUT, "layout")
    with mounted(f"archive:{source}", tmp_path) as mount:
        assert (mount.path / "layout/index.json").read_bytes() == (LAYOUT / "index.json").read_bytes()
        assert mount.status()["reference"] == f"archive:{source}"
    for words in (["ls"], ["ls", "--offline"], ["cache", "warm", "--quiet"]):
        assert ckptfs(*words, f"archive:{source}", "--cache-dir", tmp_path / "cache").code == 0


def test_foreground_stays_and_ends_with_its_mount(tmp_path: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    command = [sys.executable, "-m", "ckptfs", "mount", f"oci:{LAYOUT}", str(target), "--foreground"]
    stats = tmp_path / "stats.json"
    command += ["--cache-dir", str(tmp_path / "cache"), "--stats", str(stats)]
    with subprocess.Popen(command) as process:
        _until(lambda: os.path.ismount(target))
        assert (target / "config.dump").exists()
        assert process.poll() is None
        assert ckptfs("umount", target).code == 0
        assert process.wait(10) == 0
    assert json.loads(stats.read_text())["view"] == "checkpoint"


def test_foreground_prints_its_status_once_it_is_ready(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    words = [f"oci:{LAYOUT}", str(tmp_path / "mnt"), "--foreground", "--json", "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "ckptfs", "mount", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            status = json.loads(process.stdout.readline())
            assert (status["mountpoint"], status["pid"]) == (words[1], process.pid)
            assert (tmp_path / "mnt" / "config.dump").exists()
        finally:
            process.terminate()
        assert process.wait(10) == 0 and process.stdout.read() == ""


def test_foreground_is_one_process(tmp_path: Path) -> None:
    """However the option is written: a daemon that nobody needed waited beside it for as long as it stayed."""
    (tmp_path / "mnt").mkdir()
    words = ["mount", f"oci:{LAYOUT}", str(tmp_path / "mnt"), "-qf", "--cache-dir", str(tmp_path / "cache")]
    with subprocess.Popen([sys.executable, "-m", "ckptfs", *words]) as process:
        try:
            _until(lambda: os.path.ismount(tmp_path / "mnt"))
            assert children(process.pid) == set()
        finally:
            process.terminate()


def test_a_mount_keeps_no_descriptors_of_who_began_it(tmp_path: Path) -> None:
    """A lock of a script, or a pipe that somebody reads to its end."""
    (tmp_path / "mnt").mkdir()
    reader, writer = os.pipe()
    words = [f"oci:{LAYOUT}", str(tmp_path / "mnt"), "--cache-dir", str(tmp_path / "cache")]
    try:
        subprocess.run([sys.executable, "-m", "ckptfs", "mount", *words], pass_fds=[writer], check=True)
        os.close(writer)
        assert select.select([reader], [], [], 5)[0], "the daemon has the other end of the pipe"
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)
        assert ckptfs("umount", tmp_path / "mnt").code == 0


def test_a_mount_whose_status_cannot_be_printed_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    words = [f"oci:{LAYOUT}", str(tmp_path / "mnt"), "--json", "--cache-dir", str(tmp_path / "cache")]
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "ckptfs", "mount", *words], stdout=full, check=False)
    assert done.returncode == 8
    assert not os.path.ismount(tmp_path / "mnt")


def test_unmounting_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    assert ckptfs("umount", "/proc").code == 8
    nothing = ckptfs("umount", tmp_path)
    assert nothing.code == 8 and "nothing is mounted" in nothing.line


@each(
    "arguments, code, words",
    [
        (["mount", "no-registry", "{mnt}"], 2, "names no registry"),
        (["mount", "./a.tar", "{mnt}"], 2, "names no registry; write HOST"),
        (["mount", "docker://localhost:5000/a:1", "{mnt}"], 2, "is not a host name; write HOST"),
        (["profile", "show", "./a.json"], 2, "there is no file ./a.json, and reference"),
        (["restore", "localhost:5000/a:1", "a"], 2, "'a' is no option; options of the runtime follow --"),
        (["mount", "host.example/UPPER:x", "{mnt}"], 2, "repository name"),
        (["mount", "localhost:1/a:b@sha256:12", "{mnt}"], 2, "digest"),
        (["mount", "oci:{tmp}/nowhere", "{mnt}"], 3, "nowhere"),
        (["mount", "oci:{layout}:no-such-tag", "{mnt}"], 3, "no-such-tag"),
        (["mount", "oci:{layout}", "{tmp}/missing"], 8, "mkdir"),
        (["mount", "oci:{layout}", "{tmp}/two  words"], 8, "two  words'"),
        (["mount", "oci:{layout}", "{layout}"], 8, "not empty"),
        (["mount", "oci:{layout}", "{layout}/index.json"], 8, "not a directory; name an empty directory"),
        (["mount", "oci:{layout}", "{mnt}", "--stats", "/nonexist/f"], 2, "/nonexist/f cannot be written"),
        (["mount", "oci:{layout}", "{mnt}", "--ready-fd", "77"], 2, "descriptor 77 is not open for writing"),
        (["mount", "oci:{layout}", "{mnt}", "--ready-fd", "9" * 20], 2, "is not open for writing"),
        (["mount", "oci:{layout}", "{mnt}", "--cache-size", "9" * 400], 2, "is not a size"),
        (["mount", "oci:{layout}", "{mnt}", "--publish-index"], 2, "has no registry to keep an index; leave"),
        (["mount", "oci:{layout}", "{mnt}", "--ready-fd", "3"], 2, "descriptor 3 is not open for writing"),
        (["store", "{mnt}", "--ready-fd", "77"], 2, "descriptor 77 is not open for writing"),
        (["mount", "localhost:1/a:b", "{mnt}"], 5, "localhost:1"),
        (["mount", "oci:{layout}", "{mnt}", "--view", "odd"], 2, "--view"),
        (["mount", "oci:{layout}"], 2, "DIR"),
        (["mount", "localhost:1/a:b", "{mnt}", "--offline"], 3, "cache"),
        (["mount", "oci:{layout}", "{mnt}", "--read-deadline", "soon"], 2, "seconds"),
        (["cat", "oci:{layout}", "no/such/file"], 3, "no/such/file"),
        (["ls", "oci:{layout}", "no/such/dir"], 3, "no/such/dir"),
        (["cat", "oci:{layout}", "checkpoint"], 2, "checkpoint is a directory; `ckptfs ls REF checkpoint` lists it"),
        (["status", "{mnt}"], 8, "nothing is mounted"),
        (["status", "/proc"], 8, "is a proc mount, not one of ckptfs"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_bad_input_gets_one_line_and_its_code(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    filled = [a.format(mnt=mnt, tmp=tmp_path, layout=LAYOUT) for a in arguments]
    if filled[0] in ("mount", "cat", "ls"):
        filled += ["--cache-dir", str(tmp_path / "cache")]
    result = ckptfs(*filled)
    assert (result.code, words in result.line) == (code, True), result.err
    assert not os.path.ismount(mnt)


def test_strict_refuses_what_cannot_be_verified(tmp_path: Path) -> None:
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    plain = CORPUS / "counter" / "k8s-zstd.oci"
    result = ckptfs("mount", f"oci:{plain}", mnt, "--verify", "strict", "--cache-dir", tmp_path / "cache")
    assert result.code == 6 and "verified" in result.line and not os.path.ismount(mnt)
    with mounted(f"oci:{LAYOUT}", tmp_path, "--verify", "strict") as mount:
        assert mount.status()["verify"] == "chunk"


def test_cache_that_others_can_read_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o755)
    (tmp_path / "mnt").mkdir()
    result = ckptfs("mount", f"oci:{LAYOUT}", tmp_path / "mnt", "--cache-dir", cache)
    assert result.code == 8 and "chmod" in result.line


def test_ls_cat_and_cp_need_no_mount(tmp_path: Path) -> None:
    cache = ("--cache-dir", tmp_path / "cache")
    names = [entry["name"] for entry in ckptfs("ls", f"oci:{LAYOUT}", "--json", *cache).json]
    assert "checkpoint" in names and "rootfs-diff" in names
    assert "checkpoint/inventory.img" in ckptfs("ls", f"oci:{LAYOUT}", "-R", *cache).out.splitlines()
    config = ckptfs("cat", f"oci:{LAYOUT}", "config.dump", *cache)
    assert json.loads(config.out)["name"]
    copied = ckptfs("cp", f"oci:{LAYOUT}", "checkpoint", tmp_path / "copy", *cache)
    assert copied.code == 0, copied.err
    expected = golden.load(LAYOUT.with_suffix(".golden.json"))["entries"]
    found = tree_of(tmp_path / "copy")["entries"]
    assert found == {p.partition("/")[2]: e for p, e in expected.items() if p.startswith("checkpoint/")}


def test_every_command_has_help_with_an_example() -> None:
    from ckptfs.cli import COMMANDS

    for command in COMMANDS:
        result = ckptfs(command, "--help")
        assert result.code == 0 and f"ckptfs {command} " in result.out, command


def _errno_of(path: Path) -> int | None:
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno
    return None


def _until(condition: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_status_for_prometheus(tmp_path: Path) -> None:
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        lines = ckptfs("status", mount.path, "--prometheus").out.splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    assert any(line.startswith("ckptfs_up{") and line.endswith(" 1") for line in samples)
    image_bytes = next(line for line in samples if line.startswith("ckptfs_image_bytes{"))
    assert f'mountpoint="{mount.path}"' in image_bytes and float(image_bytes.rpartition(" ")[2]) > 0


def test_the_kernel_lets_many_reads_run_from_the_first_on(tmp_path: Path) -> None:
    require(root=True)
    connections = Path("/sys/fs/fuse/connections")
    seen_before = sorted(os.listdir(connections))
    found: list[int] = []
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        settings = connections / str(os.minor(mount.path.stat().st_dev))

        def look() -> None:
            if not settings.exists():
                mount_kernel_files("fusectl", str(connections))
            found.extend(int((settings / name).read_text()) for name in ("max_background", "congestion_threshold"))

        assert in_own_namespace(look) == ""
        assert found == [Sizes().max_background, Sizes().max_background * 3 // 4]
    assert sorted(os.listdir(connections)) == seen_before, "what is mounted for that is nobody else's"


def test_what_fails_in_a_namespace_of_its_own_is_told() -> None:
    require(root=True)
    assert "No such device" in in_own_namespace(lambda: mount_kernel_files("nothing", "/sys"))
