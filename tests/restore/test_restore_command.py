"""`ckptfs restore`: real containers of podman run again, with runc, lazily and not, and nothing of it stays."""

import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from ckptfs.bench.link import ShapedLink
from ckptfs.control.client import MountFiles
from tests.support.blobs import TAR
from tests.support.command import Result, ckptfs
from tests.support.criu import Checkpoint
from tests.support.disks import disk_of
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import FakeRegistry
from tests.support.other_user import as_nobody
from tests.support.podman import BASE, Podman, PodmanCheckpoint
from tests.support.push import push_to_layout
from tests.support.restored import assert_nothing_left, restored, start
from tests.support.tars import END, member
from tests.support.tools import ROOT, run, wait_for
from tests.support.workload import kill_tree

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]


@pytest.mark.parametrize("options", [[], ["--no-lazy-pages"], ["--eager"]], ids=["lazy", "plain", "eager"])
def test_a_container_runs_again(
    options: list[str], reference: str, base: str, podman_checkpoint: PodmanCheckpoint, tmp_path: Path
) -> None:
    with restored(tmp_path, reference, "--base", base, *options) as container:
        container.assert_continues(podman_checkpoint.last_tick["none"])
        container.assert_delta()
        assert container.first["lazy"] == (not options)
        assert container.first["rootfs"] == "registry"
        if not options:
            assert container.process.stdout is not None
            assert json.loads(container.process.stdout.readline())["event"] == "resident"
    assert container.code == 0
    assert container.events[-1]["exit_code"] == 128 + signal.SIGKILL
    assert container.err == ""


def test_three_times_in_a_row(
    podman_image_refs: dict[str, str], base: str, podman_checkpoint: PodmanCheckpoint, tmp_path: Path
) -> None:
    for _ in range(3):
        with restored(tmp_path, podman_image_refs["gzip"], "--base", base, "--name", "three") as container:
            container.assert_continues(podman_checkpoint.last_tick["none"])
            container.assert_delta()


def test_the_base_from_a_directory(
    podman: Podman, reference: str, podman_checkpoint: PodmanCheckpoint, tmp_path: Path
) -> None:
    """Directories that the delta only leads through keep the mode and owner of the base."""
    mounted = podman.isolation.path(podman("image", "mount", BASE))
    root = tmp_path / "root"
    shutil.copytree(mounted, root, symlinks=True)
    podman("image", "unmount", BASE)
    (root / "data").chmod(0o750)
    os.chown(root / "data", 7, 8)
    with restored(tmp_path, reference, "--rootfs", root) as container:
        container.assert_continues(podman_checkpoint.last_tick["none"])
        container.assert_delta()
        status = (container.root / "data").stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o750, 7, 8)
    assert (root / "data/deleted.txt").exists()  # the base itself is not touched


def test_the_base_that_podman_has(
    podman: Podman, reference: str, podman_checkpoint: PodmanCheckpoint, tmp_path: Path
) -> None:
    """Without any option: config.dump says the image's id, and it is in the storage of this machine."""
    enter = ("nsenter", f"--target={podman.isolation.pid}", "--mount", "--root", "--wd")
    with restored(tmp_path, reference, prefix=enter) as container:
        container.assert_continues(podman_checkpoint.last_tick["none"])
        container.assert_delta()
        assert container.first["rootfs"].startswith("containers-storage:")


def test_detached(reference: str, base: str, podman_checkpoint: PodmanCheckpoint, tmp_path: Path) -> None:
    """The command returns; what it leaves behind ends with the container."""
    place, cache = tmp_path / "place", tmp_path / "cache"
    done = ckptfs("restore", reference, "--base", base, "--detach", "--json", "--dir", place, "--cache-dir", cache)
    assert done.code == 0, done.err
    pid = done.json["pid"]
    try:
        assert Path(f"/proc/{pid}").exists()
        assert (Path(f"/proc/{pid}/root") / "data/added.txt").exists()
        assert len(ckptfs("status", place / "image", "--json").json["digest"]) == 71
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_for("the directory to go", lambda: not place.exists())
    assert_nothing_left(tmp_path)


def test_detached_with_paths_of_the_users_directory(podman: Podman, reference: str, tmp_path: Path) -> None:
    """What stays with the container works elsewhere."""
    mounted = podman.isolation.path(podman("image", "mount", BASE))
    shutil.copytree(mounted, tmp_path / "root", symlinks=True)
    podman("image", "unmount", BASE)
    words = ["--rootfs", "root", "--detach", "--json", "--dir", "place", "--cache-dir", "cache"]
    done = ckptfs("restore", reference, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert (Path(f"/proc/{done.json['pid']}/root") / "data/added.txt").exists()
    os.kill(done.json["pid"], signal.SIGKILL)
    wait_for("the directory to go", lambda: not (tmp_path / "place").exists())
    assert_nothing_left(tmp_path)


def test_kept(reference: str, base: str, tmp_path: Path) -> None:
    """Everything stays to be looked at; what the command says to type at the end takes it all away."""
    process = start(tmp_path, reference, "--base", base, "--keep")
    assert process.stdout is not None
    os.kill(json.loads(process.stdout.readline())["pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    place = tmp_path / "place"
    assert (place / "merged/data/added.txt").exists() and (place / "image/checkpoint").exists()
    assert (place / "work/restore.log").stat().st_size > 0
    _, _, how = err.partition("when you have seen it: ")
    script = how.replace("ckptfs", shlex.join([sys.executable, "-m", "ckptfs"]))
    run("sh", "-ec", script, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert_nothing_left(tmp_path)


def test_a_killed_restore_is_swept_by_the_next(reference: str, base: str, tmp_path: Path) -> None:
    process = start(tmp_path, reference, "--base", base)
    assert process.stdout is not None
    pid = json.loads(process.stdout.readline())["pid"]
    process.kill()
    process.wait()
    os.kill(pid, signal.SIGKILL)
    process.communicate()  # the container had its output there
    wait_for("the end of the container", lambda: not Path(f"/proc/{pid}/root/data").exists())
    assert (tmp_path / "place").exists()
    failed = ckptfs("restore", reference, "--dir", tmp_path / "other", "--cache-dir", tmp_path / "cache")
    assert failed.code == 3
    assert_nothing_left(tmp_path)


def test_signals(reference: str, base: str, tmp_path: Path) -> None:
    """The first asks the container to stop (this one does not listen), the second kills it."""
    with restored(tmp_path, reference, "--base", base) as container:
        container.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert container.process.poll() is None
        container.process.send_signal(signal.SIGINT)
        assert container.process.wait(10) == 0


@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.6])
def test_interrupted_on_the_way(
    seconds: float, reference: str, base: str, registry: DockerRegistry, tmp_path: Path
) -> None:
    with ShapedLink(registry.host, rate=10e6) as link:
        here = reference.replace(registry.host, link.address)
        process = start(tmp_path, here, "--base", base, "--no-lazy-pages")
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) in ((130, ""), (-signal.SIGINT, ""))  # -2: before Python has come to our code
    assert err.strip() == "ckptfs: interrupted" or process.returncode < 0
    assert_nothing_left(tmp_path)
    assert "criu-root" not in Path("/proc/self/mountinfo").read_text()


def test_the_registry_goes_away(
    podman: Podman, registry: DockerRegistry, base: str, scratch_folder: Path, tmp_path: Path
) -> None:
    """Pages that cannot be had end the container with an error; it does not go on with wrong ones or hang."""
    podman.run_ticker("large", 64)
    archive = scratch_folder / "large.tar"
    podman("container", "checkpoint", f"--export={archive}", "--compress=none", "large")
    podman("rm", "large")
    push_to_layout(archive, scratch_folder / "large")
    archive.unlink()
    podman.isolation.run(
        "skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{scratch_folder}/large:latest",
        f"docker://{registry.reference('restore/large:1')}",
    )  # fmt: skip
    with ShapedLink(registry.host, rate=20e6) as link:
        options = ["--base", base, "--read-deadline", "2"]
        process = start(tmp_path, f"{link.address}/restore/large:1", *options)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "running"
    out, err = process.communicate(timeout=60)
    assert process.returncode == 5, (out, err)
    assert "pages of the container's memory could not be read" in err
    assert_nothing_left(tmp_path)


def test_processes_without_a_container(single_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Plain criu; the tree's root may be no child of anybody but the command."""
    push_to_layout(single_checkpoint.images, tmp_path / "layout")
    single_checkpoint.put_back()
    offset = len(single_checkpoint.output_bytes)
    with restored(tmp_path, f"oci:{tmp_path}/layout:latest") as container:
        assert container.first["runtime"] == "criu"
        ticks = wait_for("a tick", lambda: single_checkpoint.output.lines(what="tick", offset=offset))
        assert ticks[0].number == single_checkpoint.last_tick("ticker") + 1
    kill_tree(container.pid)


# -- by an engine ------------------------------------------------------------------------------------------------------


def test_podman_unmodified(podman: Podman, reference: str, podman_checkpoint: PodmanCheckpoint, tmp_path: Path) -> None:
    settings = tmp_path / "containers.conf"
    settings.write_text('[engine]\nruntime="runc"\ncgroup_manager="cgroupfs"\nevents_logger="file"\n')
    environment = {**os.environ, "CONTAINERS_CONF": str(settings), "PYTHONPATH": str(ROOT)}

    def restore(*options: str) -> list[dict[str, object]]:
        words = ["restore", reference, "--engine", "podman", "--json", "--dir", str(tmp_path / "place"), *options]
        command = [sys.executable, "-m", "ckptfs", *words, "--cache-dir", str(tmp_path / "cache")]
        return [json.loads(line) for line in podman.isolation.run(*command, env=environment).stdout.splitlines()]

    try:
        for _ in range(3):
            began = time.time()
            running, resident = restore("--name", "lazily")
            assert (running["lazy"], resident["event"]) == (True, "resident")
            new = wait_for("a tick", lambda: [t.number for t in podman.ticks("lazily") if t.at > began])  # noqa: B023
            assert 0 < new[0] <= podman_checkpoint.last_tick["none"] + 1
            assert new == list(range(new[0], new[0] + len(new)))
            root = podman.isolation.path(podman("mount", "lazily"))
            assert (root / "data/added.txt").read_text() == "added\n"
            assert (root / "etc/os-release").read_text() == "changed\n"
            assert not (root / "data/deleted.txt").exists()
            assert_nothing_left(tmp_path)
            with pytest.raises(RuntimeError, match="podman has a container lazily already"):
                restore("--name", "lazily")
            # It is podman's alone: the next checkpoint does not go where criu was sent for this restore.
            podman("container", "checkpoint", "lazily")
            podman("rm", "--force", "--time=0", "lazily")
    finally:
        podman("rm", "--force", "--time=0", "--ignore", "lazily")
    assert_nothing_left(tmp_path)


def test_a_stub_is_small_and_an_image_too(reference: str, tmp_path: Path) -> None:
    import tarfile

    criu, cache = tmp_path / "criu", ("--cache-dir", tmp_path / "cache")
    targets = ["--out", tmp_path / "stub.tar", "--image", f"oci:{tmp_path}/stub:ck"]
    done = ckptfs("stub", reference, "--mount", tmp_path / "mnt", "--criu-dir", criu, "--json", *targets, *cache)
    assert done.code == 0, done.err
    assert done.json["bytes"] == (tmp_path / "stub.tar").stat().st_size < 128 * 1024
    with tarfile.open(tmp_path / "stub.tar") as archive:
        names = set(archive.getnames())
        spec = json.load(archive.extractfile("spec.dump"))  # type: ignore[arg-type]
    assert {"config.dump", "rootfs-diff.tar", "deleted.files", "checkpoint/inventory.img"} <= names
    assert not any("pages" in name or name.startswith("rootfs-diff/") for name in names)
    assert spec["annotations"]["org.criu.config"] == str(criu / "criu.conf")
    assert (criu / "images").readlink() == tmp_path / "mnt" / "checkpoint"
    assert "lazy-pages" in (criu / "criu.conf").read_text().splitlines()
    assert "checkpoint/inventory.img" in ckptfs("ls", f"oci:{tmp_path}/stub:ck", "-R", *cache).out


def test_a_stub_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    """What fails changes neither the archive of before nor where criu is sent; nobody else can read the archive."""
    container = {"checkpoint/inventory.img": b"x", "spec.dump": b"{}", "config.dump": b"{}", "rootfs-diff.tar": b"x"}
    layers = {"small": container, "large": {**container, "devshm-checkpoint.tar": bytes(1 << 20)}, "other": {"x": b""}}
    criu, out, cache = tmp_path / "criu", tmp_path / "out", ("--cache-dir", tmp_path / "cache")
    criu.mkdir()
    with disk_of(out, "size=128k"), FakeRegistry() as registry:
        for tag, files in layers.items():
            tar = b"".join(member(name.encode(), data) for name, data in files.items()) + END
            registry.add_image("repo", tag, [(TAR, tar)])

        def stub(tag: str, mount: str, name: str = "stub.tar") -> Result:
            words = ["--out", out / name, "--mount", tmp_path / mount, "--criu-dir", criu]
            return ckptfs("stub", registry.reference(f"repo:{tag}"), *words, *cache)

        def state() -> dict[Path, object]:
            paths = sorted(path for folder in (criu, out) for path in folder.rglob("*"))
            return {p: p.readlink() if p.is_symlink() else p.is_file() and p.read_bytes() for p in paths}

        assert (done := stub("small", "first")).code == 0, done.err
        assert (out / "stub.tar").stat().st_mode & 0o777 == 0o600
        first = state()
        assert first[criu / "images"] == tmp_path / "first/checkpoint"
        for tag, code, said in (
            ("none", 3, "no tag 'none'"),
            ("other", 7, "is not a checkpoint"),
            ("large", 8, "new.tar cannot be written: No space left on device"),
        ):
            done = stub(tag, "second", "new.tar")
            assert (done.code, state()) == (code, first) and said in done.line, done
        assert "exists" in stub("small", "second").line and state() == first
        assert (done := stub("small", "second", "new.tar")).code == 0, done.err
        assert (criu / "images").readlink() == tmp_path / "second/checkpoint"
        command = ["stub", registry.reference("repo:small"), "--out", "x.tar", "--mount", "/mnt"]
        refused = as_nobody("ckptfs", *command, fuse=True)
        assert (refused.returncode, refused.stderr[-13:]) == (8, ": --criu-dir\n")


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refusals(reference: str, base: str, single_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """One line that says what to do, the exit code of its kind, and nothing left. `check` says the same."""
    foreign = tmp_path / "foreign"
    shutil.copytree(single_checkpoint.images, foreign)
    core = next(foreign.glob("core-*.img"))
    data = bytearray(core.read_bytes())
    assert data[12:14] == b"\x08\x01"  # core_entry.mtype: X86_64
    data[13] = 3
    core.write_bytes(data)
    push_to_layout(foreign, tmp_path / "arm")
    push_to_layout(single_checkpoint.images, tmp_path / "processes")
    processes = f"oci:{tmp_path}/processes:latest"
    no_criu = {"PATH": "/usr/bin:/bin"}
    if shutil.which("criu", path=no_criu["PATH"]):
        no_criu = {"PATH": ""}
    cases: list[tuple[list[str], dict[str, str], int, str]] = [
        ([reference], {}, 3, "the base image is missing"),
        ([reference, "--base", base], no_criu, 8, "criu is not in PATH; install criu"),
        ([reference, "--base", base, "--runtime", "crun"], {}, 8, "made with runc"),
        ([reference, "--base", base, "--runtime", "criu"], {}, 8, "is of a container"),
        ([reference, "--rootfs", str(tmp_path / "none")], {}, 3, "is no directory"),
        ([base], {}, 7, "holds no checkpoint"),
        ([f"oci:{tmp_path}/arm:latest"], {}, 7, "the checkpoint is of a arm64 machine, this one is amd64"),
        ([processes, "--engine", "podman"], {}, 7, "no spec.dump, without which podman cannot restore it"),
        ([reference, "--base", base, "--bind", "/nowhere=/tmp"], {}, 2, "the container has no such mount"),
        ([reference, "--engine", "podman", "--rootfs", str(tmp_path)], {}, 2, "--rootfs means nothing to podman"),
        ([reference, "--engine", "containerd", "--runtime", "crun"], {}, 2, "containerd restores with runc"),
        ([reference, "--base", base, "--rootfs", str(tmp_path)], {}, 2, "name the same thing"),
    ]
    for arguments, environment, code, words in cases:
        common = ["--cache-dir", tmp_path / "cache"]
        done = ckptfs("restore", *arguments, "--dir", tmp_path / "place", *common, env=environment)
        assert (done.code, done.out) == (code, ""), (arguments, done.err)
        assert words in done.line
        assert_nothing_left(tmp_path)
        if code != 2:
            checked = ckptfs("check", *arguments, *common, "--json", env=environment)
            assert checked.code == code and checked.json["ok"] is False, (arguments, checked.out, checked.err)
        elif "--bind" not in arguments:
            checked = ckptfs("check", *arguments, *common, env=environment)
            assert (checked.code, checked.line) == (code, done.line)


def test_what_means_nothing_to_processes(single_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of a host, without a container: they were restored as if nothing had been said."""
    push_to_layout(single_checkpoint.images, tmp_path / "layout")
    for option, value in (
        ("--rootfs", tmp_path),
        ("--base", "containers-storage:none"),
        ("--bind", "/data=/tmp"),
        ("--network", "/proc/self/ns/net"),
    ):
        common = (f"oci:{tmp_path}/layout:latest", option, value, "--cache-dir", tmp_path / "cache")
        done = ckptfs("restore", *common, "--dir", tmp_path / "place")
        said = f"{option} means nothing to processes without a container"
        assert (done.code, done.out) == (2, "") and said in done.line
        if option in ("--rootfs", "--base"):
            checked = ckptfs("check", *common)
            assert checked.code == 2 and said in checked.out
    assert_nothing_left(tmp_path)


def test_strict_means_the_base_image_too(reference: str, base: str, tmp_path: Path) -> None:
    """Its files are run as well. One that this node has streamed once can be checked chunk by chunk."""
    common = ["--base", base, "--cache-dir", tmp_path / "cache"]
    for options, setting in ((["--verify", "strict"], {}), ([], {"CKPTFS_VERIFY": "strict"})):
        done = ckptfs("restore", reference, *common, "--dir", tmp_path / "place", *options, env=setting)
        assert (done.code, done.out) == (6, "") and "cannot be verified chunk by chunk" in done.line, done.err
        assert_nothing_left(tmp_path)
        checked = ckptfs("check", reference, *common, "--json", *options, env=setting)
        assert (checked.code, checked.json["ok"]) == (6, False)
    warmed = ckptfs("cache", "warm", base, "--view", "raw", "--cache-dir", tmp_path / "cache")
    assert warmed.code == 0, warmed.err
    with restored(tmp_path, reference, "--base", base, "--verify", "strict") as container:
        container.assert_delta()


def test_check_says_yes(reference: str, base: str, tmp_path: Path) -> None:
    done = ckptfs("check", reference, "--base", base, "--json", "--cache-dir", tmp_path / "cache")
    assert done.code == 0, done.out
    assert done.json["ok"] is True
    subjects = [finding["subject"] for finding in done.json["findings"]]
    assert {"criu version", "kernel", "lazy pages", "architecture", "runtime", "base image"} <= set(subjects)
    assert not MountFiles.of(str(tmp_path / "place")).socket.exists()
