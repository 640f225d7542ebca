"""The parts of a restore, without a container: bundle, directory, the machine's conditions, criu's words, the watch."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckptfs.errors import FormatError, RestoreError, UsageError
from ckptfs.restore import checking
from ckptfs.restore.bundle import Bundle
from ckptfs.restore.container import stop_signal
from ckptfs.restore.runtimes import criu_complaint, way_out, write_criu_config
from ckptfs.restore.supervise import Relay, Watch, become_subreaper
from ckptfs.restore.workplace import Workplace, check_name
from ckptfs.settings import Settings
from tests.support.other_user import as_nobody
from tests.support.tools import ROOT, require

STATE = "ckptfs-restore.json"
SPEC: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "hostname": "web-1",
    "process": {"args": ["/srv"], "terminal": False},
    "root": {"path": "/somewhere/else", "readonly": True},
    "hooks": {"prestart": [{"path": "/bin/sh"}]},
    "annotations": {"org.criu.config": "/etc/shadow", "kept": "yes"},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/etc/hosts", "type": "bind", "source": "/run/gone/hosts", "options": ["bind"]},
        {"destination": "/data", "type": "bind", "source": "/run/gone/data", "options": ["rbind"]},
        {"destination": "/srv", "type": "bind", "source": "/run/gone/srv", "options": ["bind"]},
    ],
    "linux": {
        "cgroupsPath": "/kubepods/x",
        "namespaces": [{"type": "pid"}, {"type": "ipc", "path": "/run/gone/ipc"}, {"type": "network"}],
    },
}


@pytest.fixture
def place(tmp_path: Path) -> Any:
    with Workplace(tmp_path / "place") as place:
        yield place
    assert not (tmp_path / "place").exists()


def written(place: Workplace, binds: dict[str, str], network: str = "") -> dict[str, Any]:
    bundle = Bundle(place, place / "image", json.loads(json.dumps(SPEC)), {}, binds, network)
    bundle.write(Path("/the/root"), "web")
    document: dict[str, Any] = json.loads((place / "bundle" / "config.json").read_text())
    return document


def test_a_bundle_for_this_machine(place: Workplace, tmp_path: Path) -> None:
    spec = written(place, {"/data": str(tmp_path), "/srv": str(tmp_path)}, network="/proc/self/ns/net")
    assert spec["root"] == {"path": "/the/root", "readonly": True}
    assert "hooks" not in spec
    assert spec["annotations"] == {"kept": "yes"}
    assert spec["linux"]["cgroupsPath"] == "/ckptfs-web"
    assert spec["linux"]["namespaces"] == [
        {"type": "pid"},
        {"type": "ipc"},
        {"type": "network", "path": "/proc/self/ns/net"},
    ]
    sources = {mount["destination"]: mount["source"] for mount in spec["mounts"]}
    assert sources["/data"] == sources["/srv"] == str(tmp_path)
    assert Path(sources["/etc/hosts"]).read_text().startswith("127.0.0.1 localhost web-1\n")


def test_a_namespace_named_by_a_process_is_of_the_other_machine(place: Workplace) -> None:
    """Whoever has the number here, it is somebody else: the container would be in the network of the machine itself."""
    require("unshare", "ip", root=True)
    kinds = {"network": "net", "pid": "pid", "ipc": "ipc"}
    joined = [{"type": kind, "path": f"/proc/{os.getpid()}/ns/{name}"} for kind, name in kinds.items()]
    bundle = Bundle(place, place / "image", {"linux": {"namespaces": joined}}, {}, {}, "")
    bundle.write(Path("/the/root"), "web")
    netns = str(place / "bundle" / "netns")
    assert joined == [{"type": "network", "path": netns}, {"type": "pid"}, {"type": "ipc"}]
    assert os.stat(netns).st_ino != os.stat("/proc/self/ns/net").st_ino


def test_a_network_for_a_container_without_one(place: Workplace) -> None:
    """It was in that of the machine, whatever was named."""
    bundle = Bundle(place, place / "image", {"linux": {"namespaces": [{"type": "pid"}]}}, {}, {}, "/proc/self/ns/net")
    with pytest.raises(UsageError, match="--network: the container has the network of its machine"):
        bundle.write(Path("/the/root"), "web")


def test_a_volume_that_is_mounted_twice_is_one(place: Workplace) -> None:
    volume = place / "image/volumes/data"
    volume.mkdir(parents=True)
    (volume / "file").write_text("kept\n")
    both = [{"destination": where, "type": "bind", "source": "/gone", "options": ["rbind"]} for where in ("/a", "/b")]
    config = {"namedVolumes": [{"volumeName": "data", "dest": where} for where in ("/a", "/b")]}
    bundle = Bundle(place, place / "image", {"mounts": both, "linux": {}}, config, {}, "")
    bundle.write(Path("/the/root"), "web")
    first, second = (mount["source"] for mount in bundle.spec["mounts"])
    assert first == second != str(volume)
    assert (Path(first) / "file").read_text() == "kept\n"


def test_mounts_that_this_machine_lacks_are_named_together(place: Workplace, tmp_path: Path) -> None:
    with pytest.raises(RestoreError, match=r"/data \(was /run/gone/data\), /srv \(was /run/gone/srv\).*--bind"):
        written(place, {})


def test_binds_must_mean_something(place: Workplace, tmp_path: Path) -> None:
    binds = {"/data": str(tmp_path), "/srv": str(tmp_path), "/other": str(tmp_path)}
    with pytest.raises(UsageError, match="--bind /other"):
        written(place, binds)
    with pytest.raises(UsageError, match="there is no /nowhere"):
        written(place, {**binds, "/data": "/nowhere"})


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        ({"mounts": [{"destination": "/data", "options": [["rbind"], {}]}]}, {}),
        ({"mounts": [{"destination": "/data", "options": 5}]}, {}),
        ({"mounts": [5]}, {}),
        ({"mounts": {}}, {}),
        ({"linux": {"namespaces": 5}}, {}),
        ({"linux": {"namespaces": [{"type": "ipc", "path": [1]}]}}, {}),
        ({"linux": {"namespaces": [{"type": [], "path": "/run/gone"}]}}, {}),
        ({"linux": {"gidMappings": "x"}}, {}),
        ({"linux": [], "annotations": [], "root": 5}, {}),
        ({"hostname": "\ud800", "mounts": [{"destination": "/etc/hosts", "type": "bind", "source": "/gone"}]}, {}),
        ({"mounts": [{"destination": "/data", "type": "bind", "source": "/"}]}, {"namedVolumes": 5}),
        ({"mounts": [{"destination": "/dev/shm", "type": "bind", "source": "/gone"}] * 2}, {"shmSize": "x"}),
    ],
    ids=str,
)
def test_a_spec_that_is_none_is_refused_or_left_to_the_runtime(
    spec: dict[str, Any], config: dict[str, Any], place: Workplace
) -> None:
    bundle = Bundle(place, place / "image", spec, config, {}, "")
    with contextlib.suppress(FormatError):
        bundle.write(Path("/the/root"), "web")
        bundle.annotate("key", "value")
        assert bundle.spec["annotations"] == {"key": "value"}


@pytest.mark.parametrize(
    ("said", "number"),
    [("37", 37), ("SIGUSR1", signal.SIGUSR1), ("0", 15), ("65", 15), ("9999999999", 15), ("SIG", 15), (None, 15)],
)
def test_the_stop_signal(said: str | None, number: int, place: Workplace) -> None:
    spec = {"annotations": {"org.opencontainers.image.stopSignal": said}}
    assert stop_signal(Bundle(place, place / "image", spec, {}, {}, "")) == number


def test_a_directory_in_use_is_refused(place: Workplace) -> None:
    """By another process: the lock is one of those that belong to a process (fcntl(2))."""
    code = "import sys, pathlib; from ckptfs.restore.workplace import Workplace\n"
    code += "Workplace(pathlib.Path(sys.argv[1])).__enter__()"
    done = subprocess.run(
        [sys.executable, "-c", code, place.path], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "RestoreError" in done.stderr and f"{place.path} exists; name another with --dir\n" in done.stderr
    assert place.path.exists()


def test_what_is_no_kept_restore_is_not_to_be_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A path of the user's own, of whatever kind, or above which there is no directory; and one that was kept."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, there in (("file", "file"), ("folder", "folder"), ("file/below", "file")):
        with pytest.raises(RestoreError) as refused, Workplace(tmp_path / name):
            pass
        assert str(refused.value) == f"{tmp_path / there} exists; name another with --dir"
    with Workplace(tmp_path / "kept", keep=True):
        pass
    with pytest.raises(RestoreError) as refused, Workplace(tmp_path / "kept"):
        pass
    assert str(refused.value).endswith(f"a restore was kept there; when you have seen it: rm -r {tmp_path / 'kept'}")
    assert caplog.messages[0].endswith(f"when you have seen it: rm -r {tmp_path / 'kept'}")


def test_restores_that_begin_together_after_a_crash(tmp_path: Path) -> None:
    """Each finds what all have left, its own directory too: it is removed once, and none is in another's way."""
    names = [f"place-{number}" for number in range(4)]
    for name in (*names, *(f"gone-{number}" for number in range(20))):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).write_text('{"pid": 999999999}')
        for number in range(20):
            (tmp_path / name / f"file-{number}").touch()
    code = "import sys, pathlib; from ckptfs.restore.workplace import Workplace\nprint(flush=True)\n"
    code += "input()\nwith Workplace(pathlib.Path(sys.argv[1])) as place: assert (place / 'work').is_dir()"
    pipe = subprocess.PIPE
    pipes = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "text": True, "cwd": ROOT}
    begun = [subprocess.Popen([sys.executable, "-c", code, tmp_path / name], **pipes) for name in names]  # type: ignore[call-overload]
    for process in begun:
        process.stdout.readline()  # it has imported all
    for process in begun:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=30)[1] for process in begun] == [""] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_is_closed_to_this_user_has_no_image() -> None:
    require("setpriv", "unshare", root=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as closed:
        (Path(closed) / "storage").mkdir()
        script = "import pathlib, shutil; from ckptfs.restore import image_store; shutil.which = str\n"
        script += f"image_store._graph_root = lambda: pathlib.Path({closed!r}, 'storage')\n"
        script += "print([image_store.local_image({'rootfsImageID': 'ab12'})])"
        done = as_nobody(sys.executable, "-c", script, fuse=True)
    assert (done.stdout, done.stderr) == ("['']\n", "")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "x" * 64])
def test_names_that_no_runtime_takes(name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        check_name(name)


def test_what_is_beside_a_restore_and_not_one_is_left_alone(tmp_path: Path) -> None:
    """Another program's directory, and one that says it is a restore and is another user's."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "state.json").write_text('{"serial": 3}')
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / STATE).write_text(json.dumps({"runtime": str(program), "name": "x"}))
    os.chown(tmp_path / "theirs", 65534, 65534)
    (tmp_path / "link").symlink_to("theirs")
    with Workplace(tmp_path / "place"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"app", "theirs", "link", "program"}


def fake_criu(folder: Path, version: str, *, check: str = "Looks good.", feature: str = "supported") -> None:
    """A program that answers as criu does; what is not empty and not the good answer fails."""
    script = f"""#!/bin/sh
    case "$*" in
      --version) echo "Version: {version}" ;;
      check) echo "{check}" >&2; [ "{check}" = "Looks good." ] ;;
      *) echo "uffd-noncoop is {feature}"; [ "{feature}" = supported ] ;;
    esac
    """
    (folder / "criu").write_text(script)
    (folder / "criu").chmod(0o755)


@pytest.mark.parametrize(
    ("version", "kernel", "answers", "refused"),
    [
        ("4.1.1", "6.18.0", {}, ""),
        ("4.0", "6.12.9-amd64", {}, ""),
        ("3.17.1", "6.13.0", {}, "criu 3.17.1 is too old for Linux 6.13.0"),
        ("3.14", "5.10.0", {}, "criu 3.14 is too old"),
        ("4.1.1", "3.10.0", {"check": "Kernel is too old"}, "criu does not work on Linux 3.10.0: Kernel is too old"),
        ("4.1.1", "4.4.0", {"feature": "not supported"}, "no lazy pages on Linux 4.4.0"),
    ],
)
def test_criu_and_kernel(
    version: str, kernel: str, answers: dict[str, str], refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_criu(tmp_path, version, **answers)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(platform, "release", lambda: kernel)
    found = list(checking.kernel(Settings(), lazy=True))
    bad = [finding for finding in found if not finding.ok]
    if not refused:
        assert bad == []
        return
    assert len(bad) == 1 and bad[0].detail.startswith(refused) and bad[0].hint
    with pytest.raises(RestoreError):
        bad[0].require()


def test_the_first_error_that_explains(tmp_path: Path) -> None:
    log = tmp_path / "restore.log"
    log.write_text(
        "(00.029837) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
        "tar: Error is not recoverable: exiting now\n"
        "(00.098786)      1: Error (criu/files-reg.c:2294): File . has bad mode 040755 (expect 040555)\n"
        "(00.100434) Error (criu/cr-restore.c:2320): Restoring FAILED.\n"
    )
    assert criu_complaint(log) == "(criu/files-reg.c:2294): File . has bad mode 040755 (expect 040555)"
    assert criu_complaint(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("said", "option"),
    [
        ("(criu/sk-inet.c:903): inet: Connected TCP socket in image", "--tcp-established"),
        ("(criu/sk-unix.c:1): unix: External socket found in image. Consider using", "--ext-unix-sk"),
    ],
)
def test_an_option_that_the_restore_was_not_given_is_named(said: str, option: str, tmp_path: Path) -> None:
    """In criu's words of 4.1.1, whose dumps of such sockets fail on Linux 6.18."""
    hint = f"the checkpoint was made with {option}, and is restored with it: -- {option}"
    assert way_out(said, tmp_path) == hint
    assert (
        way_out("(criu/cr-restore.c:2320): something else", tmp_path)
        == f"the logs are in {tmp_path} (stay with --keep)"
    )


def test_criu_configuration(tmp_path: Path) -> None:
    path = write_criu_config(tmp_path / "criu.conf", lazy=True, images_dir=Path("/a"), work_dir=Path("/b"))
    assert path.read_text() == "images-dir /a\nwork-dir /b\nlazy-pages\n"


# -- staying with it ---------------------------------------------------------------------------------------------------

TALKER = """
import os, signal, sys, time
def bye(*_):
    os.write(2, b"x" * int(sys.argv[1]))
    os._exit(7)
signal.signal(signal.SIGTERM, bye if int(sys.argv[1]) else signal.SIG_IGN)
os.write(2, b"up")
time.sleep(60)
"""


@contextmanager
def talker(size: int) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """A process that says `size` bytes when it is asked to end, 0: that does not end; and where it says them."""
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", TALKER, str(size)], stderr=writer)
    os.close(writer)
    assert os.read(reader, 2) == b"up"
    try:
        yield process, reader
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def after(seconds: float, action: Callable[[], object]) -> Callable[[], None]:
    return threading.Timer(seconds, action).start


def stop(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def test_a_container_that_talks_while_it_stops_is_heard(tmp_path: Path) -> None:
    """More than a pipe holds."""
    with talker(300_000) as (process, reader), open(tmp_path / "heard", "wb") as heard:
        code = Watch(process.pid, signal.SIGTERM, 5.0, [Relay(reader, heard.fileno())]).run(None, stop, stop)
    assert code == 7
    assert (tmp_path / "heard").read_bytes() == b"x" * 300_000


def test_a_full_disk_costs_the_output_and_not_the_container(caplog: pytest.LogCaptureFixture) -> None:
    with talker(300_000) as (process, reader), open("/dev/full", "wb") as full:
        code = Watch(process.pid, signal.SIGTERM, 5.0, [Relay(reader, full.fileno())]).run(None, stop, stop)
    assert code == 7
    assert [record.getMessage() for record in caplog.records] == [
        "what the container says is no longer passed on: No space left on device"
    ]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_slow_reader_gets_everything(blocking: bool) -> None:
    """Whether its pipe blocks or not."""
    theirs, ours = os.pipe()
    os.set_blocking(ours, blocking)
    heard = bytearray()

    def read() -> None:
        while data := os.read(theirs, 30_000):
            heard.extend(data)
            time.sleep(0.01)

    late = threading.Thread(target=read)
    with talker(300_000) as (process, reader):
        running = after(0.3, late.start)
        code = Watch(process.pid, signal.SIGTERM, 5.0, [Relay(reader, ours)]).run(
            None, lambda: (stop(), running()), stop
        )
    os.close(ours)
    late.join()
    os.close(theirs)
    assert code == 7
    assert heard == b"x" * 300_000


def test_a_reader_that_takes_nothing_does_not_keep_a_container() -> None:
    theirs, ours = os.pipe()
    with talker(300_000) as (process, reader):
        began = time.monotonic()
        code = Watch(process.pid, signal.SIGTERM, 0.5, [Relay(reader, ours)]).run(None, stop, stop)
        assert time.monotonic() - began < 5
    os.close(ours)
    os.close(theirs)
    assert code == 128 + signal.SIGKILL


def test_a_container_that_does_not_stop_is_killed() -> None:
    """After a while, or at once when it is asked again."""
    for patience, running in ((0.3, stop), (30.0, lambda: (stop(), after(0.3, stop)()))):
        with talker(0) as (process, reader):
            began = time.monotonic()
            code = Watch(process.pid, signal.SIGTERM, patience, [Relay(reader, None)]).run(None, running, stop)
            assert code == 128 + signal.SIGKILL
            assert 0.3 <= time.monotonic() - began < 5


def test_a_container_that_an_engine_has_reaped_has_ended() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    told: list[str] = []
    code = Watch(process.pid, signal.SIGTERM, 5.0, []).run(None, lambda: told.append("running"), lambda: None)
    assert (code, told) == (None, ["running"])


ORPHANS = """
import glob, os, subprocess, sys, time
subprocess.run(["sh", "-c", "sleep 0.1 & :"])
time.sleep(0.5)
stats = [open(file).read().rpartition(")") for file in glob.glob("/proc/[0-9]*/stat")]
sys.exit(sum(name.endswith("(sleep") and rest.split()[:2] == ["Z", str(os.getppid())] for name, _, rest in stats))
"""


def test_orphans_of_a_container_do_not_stay_as_zombies() -> None:
    """Whoever was their reaper, in place of that it is us: criu's trees without a PID namespace."""
    become_subreaper()
    process = subprocess.Popen([sys.executable, "-c", ORPHANS])
    code = Watch(process.pid, signal.SIGTERM, 5.0, []).run(None, lambda: None, lambda: None)
    process.wait()
    assert code == 0
