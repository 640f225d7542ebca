"""Rows S1 and S4 to S6 through real commands: what is secret stays in the process, whatever goes wrong."""

import base64
import errno
import json
import os
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptfs.control.client import MountFiles
from tests.support.command import ckptfs, mounted
from tests.support.fake_registry import FakeRegistry, Redirect, Reset, Silent, Status, Trickle, Truncate
from tests.support.hanging import ended
from tests.support.other_user import as_nobody, let_in
from tests.support.tools import ROOT, require, unavailable, wait_for

pytestmark = pytest.mark.fuse

LAYOUT = Path(__file__).parent.parent / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"
PASSWORD = "canary-password-81c2"
BLOB = "GET /v2/repo/blobs/"
Figure = Callable[[str, object], None]


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fusermount3")


class Trail:
    """Everything that commands leave behind where somebody may read it, and the canaries to look for."""

    def __init__(self, folder: Path, *registries: FakeRegistry) -> None:
        self.folder = folder
        self.registries = registries
        self.texts: list[str] = []
        auths = {r.host: {"auth": base64.b64encode(f"user:{PASSWORD}".encode()).decode()} for r in registries}
        (folder / "auth.json").write_text(json.dumps({"auths": auths}))
        self.env = {"REGISTRY_AUTH_FILE": str(folder / "auth.json")}

    def run(self, *arguments: object) -> int:
        result = ckptfs(*arguments, "-vv", env=self.env)
        self.texts += [result.out, result.err]
        return result.code

    def mount(self, reference: str, *options: object) -> int:
        """Mount, read everything, look at the status, unmount; with what the daemon wrote."""
        target = self.folder / "mnt"
        target.mkdir(exist_ok=True)
        stats, record = self.folder / "stats.json", self.folder / "reads.jsonl"
        files = ("--stats", stats, "--record", record, "--read-deadline", 4)
        code = self.run("mount", reference, target, "--cache-dir", self.folder / "cache", "--json", *files, *options)
        if code == 0:
            for path in sorted(target.rglob("*")):
                try:
                    if stat.S_ISREG(path.lstat().st_mode):
                        path.read_bytes()
                except OSError as error:
                    self.texts.append(str(error))
            self.run("status")
            self.run("status", target, "--json")
            daemon = json.loads(self.texts[-2])["pid"]
            for name in ("cmdline", "environ"):
                self.texts.append(Path(f"/proc/{daemon}/{name}").read_bytes().decode(errors="replace"))
            self.texts.append(MountFiles.of(str(target)).log.read_text())  # gone once the mount has ended well
            assert self.run("umount", target) == 0
        left = MountFiles.of(str(target))
        for file in (left.log, left.state, stats, record):
            if file.exists():
                self.texts.append(file.read_text())
        left.log.unlink(missing_ok=True)
        return code

    def check(self) -> int:
        """No canary anywhere; returns how many characters and bytes were searched."""
        canaries = {PASSWORD, "canary-userinfo", "canary-signature", "canary-error-body", "canary-helper"}
        canaries |= {base64.b64encode(f"user:{PASSWORD}".encode()).decode()}
        canaries |= {token for registry in self.registries for token in registry.tokens}
        text = "\n".join(self.texts)
        for canary in canaries:
            assert canary not in text, text[max(0, text.index(canary) - 200) :][:500]
        cache = [file.read_bytes() for file in self.folder.joinpath("cache").rglob("*") if file.is_file()]
        for data in cache:
            assert not [canary for canary in canaries if canary.encode() in data]
        return len(text) + sum(map(len, cache))


def registry(**options: object) -> FakeRegistry:
    made = FakeRegistry(users={"user": PASSWORD}, **options)  # type: ignore[arg-type]
    made.add_layout(LAYOUT, "repo")
    return made


@pytest.fixture
def storage() -> Iterator[FakeRegistry]:
    with registry() as origin, FakeRegistry(storage_of=origin) as storage:
        yield storage


@pytest.mark.row("S1")
def test_tokens_and_signed_urls(tmp_path: Path, storage: FakeRegistry, record_property: Figure) -> None:
    with registry(auth="bearer", token_life=0.5) as r:
        r.script = {(BLOB, None): Redirect(storage.url, life=0.3)}
        trail = Trail(tmp_path, r)
        reference = r.reference("repo:latest")
        assert trail.mount(reference) == 0
        for command in (("ls", reference, "-R"), ("cat", reference, "config.dump"), ("cache", "warm", reference)):
            assert trail.run(*command, "--cache-dir", tmp_path / "cache") == 0
        assert r.tokens and storage.requests("GET") and "canary-signature" in storage.requests("GET")[0].query
        searched = trail.check()
    record_property("figure", f"0 hits in {searched:,} characters of tokens and signed URLs")


@pytest.mark.row("S1")
@pytest.mark.parametrize(
    ("fault", "on"),
    [
        (Status(500, body=b"canary-error-body"), BLOB),
        (Status(403, body=b"<a>canary-error-body</a>"), BLOB),
        (Status(400, body=b'{"errors": [{"code": "canary-error-body", "message": ""}]}'), "manifests/"),
        (Status(401, headers={"WWW-Authenticate": 'Bearer realm="http://u:canary-userinfo@127.0.0.1/"'}), "manifests/"),
        (
            Status(401, headers={"WWW-Authenticate": 'Bearer realm="ftp://x/",service="canary-error-body"'}),
            "manifests/",
        ),
        (Redirect(url="http://user:canary-userinfo@127.0.0.1:1/x?Signature=canary-signature"), BLOB),
        (Redirect(url="http://127.0.0.1:1/x?Signature=canary-signature"), BLOB),
        (Redirect(url="ftp://canary-userinfo:x@127.0.0.1/x?Signature=canary-signature"), "manifests/"),
        (Redirect(url="http://[canary-error-body"), BLOB),
        (Reset(), BLOB),
        (Truncate(100), "manifests/"),
        (Trickle(0.01), "/token"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value.strip("/ "),
)
def test_faults(fault: object, on: str, tmp_path: Path) -> None:
    with registry(auth="bearer", script={(on, None): fault}) as r:
        trail = Trail(tmp_path, r)
        assert trail.mount(r.reference("repo:latest")) in (0, 4, 5, 6)
        trail.check()


@pytest.mark.row("S1")
@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_refused_passwords(auth: str, tmp_path: Path) -> None:
    with registry(auth=auth) as r:
        r.users["user"] = "another"
        trail = Trail(tmp_path, r)
        assert trail.mount(r.reference("repo:latest")) == 4
        trail.check()


@pytest.mark.row("S1")
def test_references_and_helpers(tmp_path: Path) -> None:
    with registry(auth="basic") as r:
        trail = Trail(tmp_path, r)
        for reference in (f"user:canary-userinfo@{r.host}/repo:latest", f"https://user:canary-userinfo@{r.host}/repo"):
            assert trail.run("ls", reference) == 2
        helper = tmp_path / "docker-credential-leaky"
        helper.write_text("#!/bin/sh\necho canary-helper; echo canary-helper >&2; exit 1\n")
        helper.chmod(0o755)
        (tmp_path / "auth.json").write_text(json.dumps({"credHelpers": {r.host: "leaky"}}))
        trail.env["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        assert trail.run("ls", r.reference("repo:latest")) == 4
        trail.check()


# -- S4: other users ---------------------------------------------------------------------------------------------------


@pytest.mark.row("S4")
def test_another_user_sees_nothing(tmp_path: Path, record_property: Figure) -> None:
    require("setpriv", root=True)
    let_in(tmp_path)  # not kept out by a directory above
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        files = MountFiles.of(str(mount.path))
        cached = next(path for path in mount.cache.rglob("*") if path.is_file())
        connect = f"import socket; socket.socket(socket.AF_UNIX).connect({str(files.socket)!r})"
        refused = [
            as_nobody("cat", str(mount.path / "config.dump")),
            as_nobody("ls", str(mount.path)),
            as_nobody("cat", str(cached)),
            as_nobody(sys.executable, "-c", connect, fuse=True),
        ]
        for attempt in refused:
            assert attempt.returncode != 0 and "Permission denied" in attempt.stderr, attempt
        assert "PermissionError" in refused[-1].stderr, "it was python that was refused, not by whom"
        assert stat.S_IMODE(files.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(files.directory.stat().st_mode) == 0o700
    record_property("figure", f"{len(refused)} of {len(refused)} refused: mount, cache, socket")


# -- S5: memory --------------------------------------------------------------------------------------------------------


ATTACH = """
import ctypes, sys
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
print("attached" if ptrace(16, int(sys.argv[1]), None, None) == 0 else ctypes.get_errno())
"""


@pytest.fixture
def cores() -> Iterator[None]:
    """Whoever is started may dump core, as far as its parent is concerned."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    most = resource.RLIM_INFINITY if os.geteuid() == 0 else before[1]
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)


def test_cores_are_dumped_here(tmp_path: Path, cores: None) -> None:
    """Or the next test would prove nothing; what the kernel does with a core is the machine's to say."""
    with subprocess.Popen([sys.executable, "-c", "import os; os.abort()"], cwd=tmp_path) as process:
        _, status = os.waitpid(process.pid, 0)
        process.returncode = -signal.SIGABRT
    if resource.getrlimit(resource.RLIMIT_CORE)[0] == 0:
        unavailable("no process may dump core here")
    assert os.WCOREDUMP(status)


@pytest.mark.row("S5")
def test_no_core_and_no_debugger(tmp_path: Path, cores: None, record_property: Figure) -> None:
    before = set(Path("/").iterdir())
    with mounted(f"oci:{LAYOUT}", tmp_path) as mount:
        limits = Path(f"/proc/{mount.pid}/limits").read_text().splitlines()
        assert next(line for line in limits if "core file" in line).split()[4:6] == ["0", "0"]
        score = int(Path(f"/proc/{mount.pid}/oom_score_adj").read_text())
        may_lower = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16) >> 24 & 1
        assert not may_lower or score < 0
        if os.geteuid() == 0:
            attached = as_nobody(sys.executable, "-c", ATTACH, str(mount.pid), fuse=True)
            assert attached.stdout == f"{errno.EPERM}\n", attached
            if shutil.which("gcore"):
                gcore = as_nobody("gcore", "-o", "/var/tmp/core", str(mount.pid))
                assert gcore.returncode != 0 and "not permitted" in gcore.stdout + gcore.stderr, gcore
        os.kill(mount.pid, signal.SIGABRT)
        wait_for("the daemon ends", lambda: ended(mount.pid))
    assert set(Path("/").iterdir()) == before and not list(tmp_path.glob("core*"))
    record_property("figure", "no core after SIGABRT; gcore and ptrace by another user are refused")


@pytest.mark.row("S5")
def test_a_command_that_reads_an_image_leaves_no_core(tmp_path: Path) -> None:
    with registry(script={(BLOB, None): Silent()}) as r:
        command = [sys.executable, "-m", "ckptfs", "ls", r.reference("repo:latest"), "--cache-dir", str(tmp_path / "c")]
        shell = f"ulimit -c unlimited && cd {tmp_path} && PYTHONPATH={ROOT} exec {shlex.join(command)}"
        with subprocess.Popen(["bash", "-c", shell]) as process:
            wait_for("it reads", lambda: r.requests(BLOB))
            process.send_signal(signal.SIGABRT)
            _, status = os.waitpid(process.pid, 0)
            process.returncode = -signal.SIGABRT
    assert os.WTERMSIG(status) == signal.SIGABRT and not os.WCOREDUMP(status)
    assert not list(tmp_path.glob("core*"))


@pytest.mark.row("S5")
def test_the_owner_of_a_mount_cannot_read_the_memory_of_its_daemon(tmp_path: Path) -> None:
    require("setpriv", root=True)
    script = f"""
mkdir -p "$HOME/mnt" && ckptfs mount oci:{LAYOUT} "$HOME/mnt" --json > "$HOME/status" || exit 1
pid=$(grep -o '"pid": [0-9]*' "$HOME/status" | grep -o '[0-9]*$')
test -r "$HOME/mnt/config.dump" && echo readable
for file in mem environ maps; do head -c 1 /proc/$pid/$file && echo open; done
python3 -c '{ATTACH}' $pid
ckptfs umount "$HOME/mnt" && echo unmounted
"""
    done = as_nobody("sh", "-c", script, fuse=True)
    assert done.stdout.split() == ["readable", str(errno.EPERM), "unmounted"], done
    assert done.stderr.count("Permission denied") == 3, done


@pytest.mark.row("S5")
def test_only_ciphertext_is_on_disk(tmp_path: Path, record_property: Figure) -> None:
    key = tmp_path / "key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    with mounted(f"oci:{LAYOUT}", tmp_path) as plain:
        pages = (plain.path / "checkpoint" / "pages-1.img").read_bytes()
        config = (plain.path / "config.dump").read_bytes()
    encrypted = tmp_path / "encrypted"
    with registry() as r, mounted(r.reference("repo:latest"), tmp_path, "--cache-key", key, cache=encrypted) as mount:
        assert (mount.path / "checkpoint" / "pages-1.img").read_bytes() == pages
        wait_for("everything is cached", lambda: mount.status()["complete"])
    on_disk = b"".join(file.read_bytes() for file in encrypted.rglob("*") if file.is_file())
    samples = [pages[at : at + 64] for at in range(0, len(pages) - 64, 4096)]
    samples = [sample for sample in samples if len(set(sample)) > 16] + [config[:200], b"sha256:", b"pages-1.img"]
    assert len(on_disk) > len(pages) // 2 and not [sample for sample in samples if sample in on_disk]
    record_property("figure", f"{len(samples)} samples of the image, none in {len(on_disk):,} bytes of cache")
    with mounted(r.reference("repo:latest"), tmp_path, "--offline", "--cache-key", key, cache=encrypted) as mount:
        assert (mount.path / "checkpoint" / "pages-1.img").read_bytes() == pages


@pytest.mark.row("S5")
def test_only_ciphertext_is_in_files_without_a_name(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)

    def nameless(pid: int) -> bytes:
        files = [file for file in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(file).startswith("/var/tmp/")]
        return b"".join(file.read_bytes() for file in files)

    with registry() as r:
        with mounted(r.reference("repo:latest"), tmp_path, "--ephemeral") as mount:
            pages = (mount.path / "checkpoint" / "pages-1.img").read_bytes()
            samples = [pages[at : at + 64] for at in range(0, len(pages) - 64, 4096)]
            samples = [sample for sample in samples if len(set(sample)) > 16]
            wait_for("what is read in the files", lambda: any(sample in nameless(mount.pid) for sample in samples))
        with mounted(r.reference("repo:latest"), tmp_path, "--ephemeral", "--cache-key", key) as mount:
            assert (mount.path / "checkpoint" / "pages-1.img").read_bytes() == pages
            wait_for("as much in the files", lambda: len(nameless(mount.pid)) > len(pages) // 2)
            wait_for("everything is cached", lambda: mount.status()["complete"])
            on_disk = nameless(mount.pid)
            assert not [sample for sample in samples if sample in on_disk]


@pytest.mark.row("S5")
def test_a_cache_has_one_key(tmp_path: Path) -> None:
    keys = {name: tmp_path / name for name in ("right", "wrong", "short", "open", "missing")}
    for name in ("right", "wrong", "short", "open"):
        keys[name].write_bytes(os.urandom(32) if name != "short" else b"short of a byte")
        keys[name].chmod(0o600 if name != "open" else 0o644)

    def ls(*options: object) -> tuple[int, str]:
        done = ckptfs("ls", r.reference("repo:latest"), "--cache-dir", tmp_path / "cache", *options)
        return done.code, done.err

    with registry() as r:
        assert ls("--cache-key", keys["right"]) == (0, "")
        for name, code, words in (
            ("wrong", 8, "another key"),
            ("short", 2, "15 bytes"),
            ("open", 2, "chmod 600"),
            ("missing", 2, "No such file"),
        ):
            got, said = ls("--cache-key", keys[name])
            assert (got, words in said, len(said.splitlines())) == (code, True, 1), said
        assert ls()[0] == 8 and "--cache-key" in ls()[1]
        environment = {"CKPTFS_CACHE_KEY_FILE": str(keys["right"]), "CKPTFS_CACHE_DIR": str(tmp_path / "cache")}
        assert ckptfs("ls", r.reference("repo:latest"), env=environment).code == 0
        assert ckptfs("cache", "clear", "--cache-dir", tmp_path / "cache").code == 0
        assert ls() == (0, "")
        code, said = ls("--cache-key", keys["right"])
        assert code == 8 and "not encrypted" in said


@pytest.mark.row("S5")
def test_a_cache_that_is_used_without_a_key_does_not_become_an_encrypted_one(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    with registry() as r, mounted(r.reference("repo:latest"), tmp_path) as mount:
        reference = r.reference("repo:latest")
        assert ckptfs("cache", "clear", "--force", "--cache-dir", mount.cache).code == 0
        for _ in range(2):
            refused = ckptfs("ls", reference, "--cache-dir", mount.cache, "--cache-key", key)
            assert refused.code == 8 and "is not encrypted" in refused.line
            (mount.path / "checkpoint" / "pages-1.img").read_bytes()
        assert not ckptfs("cache", "info", "--json", "--cache-dir", mount.cache).json["encrypted"]


# -- S6: nothing stays -------------------------------------------------------------------------------------------------


@pytest.mark.row("S6")
def test_nothing_stays_of_an_ephemeral_mount_or_a_cleared_cache(tmp_path: Path, record_property: Figure) -> None:
    began = time.time()
    with registry() as r:
        with mounted(r.reference("repo:latest"), tmp_path, "--ephemeral") as mount:
            config = (mount.path / "config.dump").read_bytes()
            (mount.path / "checkpoint" / "pages-1.img").read_bytes()
        assert not (tmp_path / "cache").exists()
        with mounted(r.reference("repo:latest"), tmp_path) as mount:
            (mount.path / "config.dump").read_bytes()
            refused = ckptfs("cache", "clear", "--cache-dir", mount.cache)
            assert refused.code == 8 and "--force" in refused.line
        assert ckptfs("cache", "clear", "--cache-dir", mount.cache).code == 0
    searched = 0
    canary = config[100:180]
    for place in (tmp_path, Path("/run/ckptfs"), Path("/var/tmp"), Path("/tmp")):
        for directory, below, names in os.walk(place):  # passes over what it cannot list: a dead mount of somebody else
            if place == Path("/tmp"):
                below.clear()
            for file in (Path(directory, name) for name in names):
                try:
                    if file.is_file() and not file.is_symlink() and file.stat().st_mtime >= began:
                        searched += 1
                        assert canary not in file.read_bytes(), file
                except OSError:
                    continue  # another test's
    record_property("figure", f"0 hits in {searched} files")
