"""What every command does where something is missing: one clear line, the exit code of its kind, nothing printed.

One suite over the commands as the command line has them. Arguments are made from their declarations, so a new command
is in every test; only what a declaration cannot say is in EXTRA and the tables below it.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ckptfs.cli import main
from tests.support.command import Result, ckptfs
from tests.support.each import each
from tests.support.fake_registry import FakeRegistry, Silent
from tests.support.other_user import as_nobody
from tests.support.tools import ROOT, free_port, require, wait_for

CORPUS = ROOT / "tests" / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"
MANIFESTS = "/manifests/"


def leaves(command: click.Command, *path: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield " ".join(path), command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from leaves(found, *path, name)


COMMANDS = dict(leaves(main))
OF_IMAGES = [name for name, command in COMMANDS.items() if any(p.name in ("reference", "references", "before", "source")
             for p in command.params)]  # fmt: skip

# What makes a command do its work, beyond its required parameters.
EXTRA = {
    "stub": ("--out", "{dir}/stub.tar"),
    "profile record": ("--out", "{dir}/profile", "--", "cat", "{{}}/config.dump"),
    "bench": ("--runs", "1", "--rtt", "1ms", "--rate", "0"),
}
# Exit codes that are not those of the others.
NEEDS_FUSE = {"mount": 8, "restore": 8, "profile record": 8, "bench": 8}
NEEDS_CRIU = {"restore": 8, "check": 8}
WITHOUT_CACHE = {"push", "profile show", "profile push"}  # these write nothing here
TELLS_ALL = {"check"}  # it says what it has found on standard output


def words(name: str, reference: str, folder: Path) -> list[str]:
    """A command line that the command takes."""
    furnish(folder)
    made, options = [], []
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            if parameter.required:
                options += [parameter.opts[-1], str(folder / "new")]
            if "--cache-dir" in parameter.opts:
                options += ["--cache-dir", str(folder / "cache")]
        elif parameter.name in ("reference", "references", "before", "after", "source"):
            made.append(reference)
        elif parameter.name in ("path", "paths"):
            made.append("checkpoint/inventory.img")
        elif parameter.name == "file":
            made.append(str(folder / "profile"))
        elif isinstance(parameter.type, click.Path):
            made.append(str(folder / ("page.html" if parameter.name == "out" else name.split()[0])))
        elif isinstance(parameter.type, click.Choice):
            made.append(parameter.type.choices[0])
        else:
            assert not parameter.required, f"{name}: what is {parameter.name}?"
    return [*name.split(), *made, *options, *(word.format(dir=folder) for word in EXTRA.get(name, ()))]


def assert_one_line(name: str, done: Result, code: int) -> None:
    assert done.code == code, (name, done)
    if name in TELLS_ALL and done.out:
        assert done.err == ""
        return
    assert done.out == "" and done.line.startswith("ckptfs: ") and len(done.line) > 20, (name, done)
    assert "internal error" not in done.err and "Traceback" not in done.err and "Errno" not in done.err


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        registry.add_layout(CORPUS, "repo")
        yield registry


@pytest.fixture
def folder() -> Iterator[Path]:
    """With what commands want to be there: a directory to mount on, a profile. Others can look into it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        yield furnish(Path(name))


def furnish(folder: Path) -> Path:
    folder.chmod(0o755)
    for name in ("mount", "umount", "status"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "profile").write_text('{"version": 1, "files": [], "runs": [], "recordings": 1}')
    return folder


@each("name", COMMANDS)
def test_words_that_it_does_not_take(name: str) -> None:
    done = ckptfs(*name.split(), "--no-such-option")
    assert_one_line(name, done, 2)
    assert f"See `ckptfs {name} --help`." in done.line
    if any(parameter.required for parameter in COMMANDS[name].params):
        assert_one_line(name, ckptfs(*name.split()), 2)
    else:
        assert_one_line(name, ckptfs(*name.split(), "one", "two", "three"), 2) if name != "profile record" else None


def test_usage_errors_are_sentences() -> None:
    said = [ckptfs("ls", "oci:x", *options).line for options in (["--memory", "much"], ["--jsn"], ["--view", "all"])]
    for line in said:
        assert line.endswith((". See `ckptfs ls --help`.", "? See `ckptfs ls --help`.")) and ".." not in line, line


def test_a_bug_says_how_to_see_more_of_it() -> None:
    program = "import sys, ckptfs.image; from ckptfs.cli import run; del ckptfs.image.open_image; "
    command = [sys.executable, "-c", program + "sys.exit(run(sys.argv[1:]))", "ls", "oci:x"]
    for options, shown in (([], False), (["-v"], True)):
        done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 1 and "run with -v for the traceback" in done.stderr
        assert ("Traceback" in done.stderr) is shown


def reads_configuration(name: str) -> bool:
    options = {word for parameter in COMMANDS[name].params for word in parameter.opts}
    return bool(options & {"--plain-http", "--cache-dir", "--config"})


@each("name", [name for name in COMMANDS if reads_configuration(name)])
def test_a_configuration_that_is_not_there(name: str, folder: Path) -> None:
    """Every command that has to do with a registry or the cache takes --config."""
    first, *others = words(name, "localhost:1/repo:1", folder)
    second = [others.pop(0)] if len(name.split()) == 2 else []
    done = ckptfs(first, *second, "--config", folder / "none.toml", *others)
    assert_one_line(name, done, 2)
    assert "none.toml" in done.line


@pytest.mark.parametrize("reference", ["nginx:1", "localhost:5000/UPPER:1", "oci:"])
@each("name", OF_IMAGES)
def test_references_that_do_not_parse(name: str, reference: str, folder: Path) -> None:
    assert_one_line(name, ckptfs(*words(name, reference, folder)), 2)


@each("name", OF_IMAGES)
def test_nothing_of_that_name(name: str, registry: FakeRegistry, folder: Path) -> None:
    done = ckptfs(*words(name, registry.reference("nowhere:1"), folder))
    assert_one_line(name, done, 3)


@each("name", OF_IMAGES)
def test_a_refused_login(name: str, folder: Path) -> None:
    with FakeRegistry(auth="basic", users={"somebody": "secret"}) as registry:
        assert_one_line(name, ckptfs(*words(name, registry.reference("repo:latest"), folder)), 4)


@each("name", OF_IMAGES, at_once=len(OF_IMAGES))
def test_without_network(name: str, folder: Path) -> None:
    """Each waits 4 s and tries again."""
    done = ckptfs(*words(name, f"127.0.0.1:{free_port()}/repo:1", folder))
    assert_one_line(name, done, 5)
    assert "connection refused" in done.line


@each("name", OF_IMAGES)
def test_interrupted(name: str, folder: Path) -> None:
    """Ctrl-C: no traceback, no empty line, what a shell expects as exit code."""
    with FakeRegistry({(MANIFESTS, None): Silent()}) as registry:
        command = ["env", "--default-signal=INT"]  # a job in the background is started with the signal ignored
        command += [sys.executable, "-m", "ckptfs", *words(name, registry.reference("repo:latest"), folder)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
        deadline = time.monotonic() + 20
        while not registry.requests("GET", MANIFESTS) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    # Python ends itself by the signal when it came in the middle of an import; for a shell both are 130.
    assert process.returncode in (130, -signal.SIGINT), (name, err)
    assert (out, err) == ("", "ckptfs: interrupted\n"), name


@each("name", COMMANDS)
def test_as_somebody_else(name: str, registry: FakeRegistry, folder: Path) -> None:
    """A user who may write nowhere that the command names."""
    require("setpriv", "unshare", root=True)
    done = as_nobody("ckptfs", *words(name, registry.reference("repo:latest"), folder), fuse=True)
    assert done.returncode in (0, 2, 3, 7, 8) and "Traceback" not in done.stderr + done.stdout, (name, done)
    if name in OF_IMAGES and name not in WITHOUT_CACHE:
        assert_one_line(name, Result(done.returncode, done.stdout, done.stderr), 8)


@each("name", COMMANDS)
def test_without_fuse(name: str, registry: FakeRegistry, folder: Path) -> None:
    """Only what mounts needs it; all else works as ever."""
    require("unshare", root=True)
    command = shlex.join([sys.executable, "-m", "ckptfs", *words(name, registry.reference("repo:latest"), folder)])
    nodes = "; ".join(f"mknod -m 666 /dev/{node}" for node in ("null c 1 3", "zero c 1 5", "urandom c 1 9"))
    script = f"mount -t tmpfs none /dev && {nodes}; exec {command}"
    run = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
    )  # fmt: skip
    done = Result(run.returncode, run.stdout, run.stderr)
    if code := NEEDS_FUSE.get(name):
        assert_one_line(name, done, code)
        assert "/dev/fuse is missing" in done.line
    elif name == "check":
        assert done.code == 8 and "/dev/fuse is missing" in done.out
    else:
        assert done.code in (0, 3, 7, 8) and "/dev/fuse" not in done.err, (name, done)


@each("name", [name for name in OF_IMAGES if name not in ("mount", "profile record", "bench")])
def test_without_criu(name: str, registry: FakeRegistry, folder: Path) -> None:
    """Only what restores needs it. (mount, profile record and bench never start one, and would leave more to clean.)"""
    done = ckptfs(*words(name, registry.reference("repo:latest"), folder), env={"PATH": str(folder)})
    if code := NEEDS_CRIU.get(name):
        assert_one_line(name, done, code)
        assert "criu is not in PATH; install criu" in done.err + done.out
    else:
        assert done.code in (0, 3, 7), (name, done)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("cache", "info", "--cache-dir", "{folder}/closed/cache"), 8, "Permission denied; make it usable"),
        (("profile", "show", "{folder}/closed/profile"), 4, "may not be read by this user"),
        (("profile", "show", "{folder}/unreadable"), 4, "may not be read by this user"),
        (("ls", "oci:{folder}/closed/layout"), 4, "may not be read by this user"),
        (("check", f"oci:{CORPUS}", "--rootfs", "{folder}/closed/root"), 8, ""),
    ],
)
def test_what_may_not_be_looked_at(words: tuple[str, ...], code: int, said: str, folder: Path) -> None:
    require("setpriv", "unshare", root=True)
    (folder / "closed").mkdir(mode=0o700)
    (folder / "unreadable").touch(mode=0o600)
    done = as_nobody("ckptfs", *(word.format(folder=folder) for word in words), fuse=True)
    assert_one_line(words[0], Result(done.returncode, done.stdout, done.stderr), code)
    assert said in done.stderr


@pytest.mark.parametrize("words", [("ls", "oci:x"), ("status", "x"), ("mount", "localhost:1/a:b", "x")])
def test_in_a_directory_that_is_gone(words: tuple[str, ...], folder: Path) -> None:
    command = shlex.join([sys.executable, "-m", "ckptfs", *words])
    script = f"mkdir {folder}/here && cd {folder}/here && rmdir {folder}/here && exec {command}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert_one_line(words[0], Result(done.returncode, done.stdout, done.stderr), 2)
    assert "cd to one that is" in done.stderr


def test_a_cache_of_somebody_else(registry: FakeRegistry, folder: Path) -> None:
    (folder / "cache").mkdir(mode=0o755)
    done = ckptfs("ls", registry.reference("repo:latest"), "--cache-dir", folder / "cache")
    assert_one_line("ls", done, 8)
    assert "chmod" in done.line


# Standard output that nobody reads, or that takes nothing: whatever prints, and however.
PRINTING = ("ls -R", "ls --json", "cat", "show", "diff", "inspect", "memparse -s a", "memparse -p 1", "profile show",
            "config show", "completion bash", "ls --help", "--help", "--version", "")  # fmt: skip


def printing(words: str, folder: Path) -> list[str]:
    furnish(folder)
    image, cache = f"oci:{CORPUS}", ["--cache-dir", str(folder / "cache")]
    name, *options = words.split() or [""]
    arguments = {"cat": [image, "checkpoint/pages-1.img"], "diff": [image, image], "profile": [str(folder / "profile")]}
    if "--help" in options or name in ("config", "completion", "--help", "--version"):
        return [name, *options]
    return [name, *options, *arguments.get(name, [image]), *cache] if name else []


def shell(redirected: str, *words: str) -> Result:
    """The command with a shell's redirection behind it."""
    command = f"{shlex.join([sys.executable, '-m', 'ckptfs', *words])} {redirected}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=ROOT,
                          check=False, timeout=60)  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


@each("name", PRINTING)
def test_a_reader_that_has_had_enough(name: str, folder: Path) -> None:
    """`ckptfs ls | head`: no failure, nothing said."""
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, "-m", "ckptfs", *printing(name, folder)], stdout=writer, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(writer)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "internal error" not in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("redirected", "why"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
@each("name", PRINTING)
def test_an_output_that_cannot_be_written(name: str, redirected: str, why: str, folder: Path) -> None:
    done = shell(redirected, *printing(name, folder))
    assert (done.code, done.line) == (8, f"ckptfs: cannot write the output: {why}")


def test_closed_streams_do_not_matter_where_nothing_is_printed(folder: Path) -> None:
    require("fusermount3", root=True)
    words = [f"oci:{CORPUS}", str(folder / "mount"), "--cache-dir", str(folder / "cache")]
    assert shell(">&- 2>&- <&-", "mount", *words).code == 0
    try:
        assert (folder / "mount" / "config.dump").read_bytes()
    finally:
        assert shell(">&- 2>&- <&-", "umount", str(folder / "mount")).code == 0


def test_errors_that_nobody_can_be_told() -> None:
    assert shell("2>/dev/full", "ls", "oci:/nowhere").code == shell("2>&-", "ls", "oci:/nowhere").code == 3


@pytest.mark.parametrize(("name", "kind"), [("ls", "zstd"), ("index", "gzip")])
def test_interrupted_while_a_layer_does_not_come(name: str, kind: str, folder: Path) -> None:
    """Threads that wait for it may do so for a minute more, and nobody waits for them."""
    with FakeRegistry({("blobs/", None): Silent()}) as registry:
        registry.add_image("repo", "latest", [(f"application/vnd.oci.image.layer.v1.tar+{kind}", bytes(100_000))])
        command = ["env", "--default-signal=INT"]
        command += [sys.executable, "-m", "ckptfs", *words(name, registry.reference("repo:latest"), folder)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            wait_for("a request", lambda: bool(registry.requests("GET", "blobs/")))
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=10)
        finally:
            process.kill()
            process.wait()
    assert (process.returncode, err) == (130, "ckptfs: interrupted\n")
