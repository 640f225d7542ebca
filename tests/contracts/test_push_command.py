"""`ckptfs push` as a user runs it: what it prints, where it ends, and what it says when it cannot."""

import gzip
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ckptfs.bench.link import ShapedLink
from tests.support.command import ckptfs
from tests.support.docker_registry import DockerRegistry
from tests.support.each import each
from tests.support.push import manifest_of, push_to_layout, tree_images, two_checkpoints
from tests.support.tools import ROOT, require, run, wait_for
from tests.support.trees import layout_of

pytestmark = pytest.mark.registry


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as criu leaves it."""
    return tree_images(tmp_path_factory.mktemp("images") / "images")


def test_a_root_that_cannot_be_written_to(images: Path, tmp_path: Path) -> None:
    """As in many a pod: there is room where --work-dir says, or nowhere."""
    require("unshare", root=True)
    closed = "for d in /tmp /var/tmp; do mount --bind $d $d; mount -o remount,bind,ro $d; done"
    script = f'mount --bind $0 /mnt; {closed}; cd /proc; exec "$@"'
    shutil.copytree(images, tmp_path / "images")
    push = [sys.executable, "-m", "ckptfs", "push", "/mnt/images", "oci:/mnt/layout:1"]
    for work, code, said in (([], 8, "no directory for temporary files; name one: TMPDIR=DIR"), (["/mnt"], 0, "sent ")):
        command = ["unshare", "--mount", "sh", "-c", script, tmp_path, *push, *(f"--work-dir={one}" for one in work)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == code and said in done.stderr, done


def test_it_prints_the_reference_with_its_digest(images: Path, registry: DockerRegistry, tmp_path: Path) -> None:
    reference = registry.reference("command/tree:1")
    pushed = ckptfs("push", images, reference)
    assert pushed.code == 0, pushed.err
    pinned = pushed.out.strip()
    assert pinned.startswith(f"{reference}@sha256:") and pinned.count("\n") == 0
    assert pushed.err.startswith("sent ") and pushed.err.count("\n") == 1
    listed = ckptfs("ls", pinned, "checkpoint", "--cache-dir", tmp_path / "cache")
    assert sorted(listed.out.split()) == sorted(os.listdir(images))
    again = ckptfs("push", images, reference, "--quiet")
    assert (again.code, again.out.strip(), again.err) == (0, pinned, "")


def test_on_top_of_another(images: Path, registry: DockerRegistry) -> None:
    first, second = registry.reference("command/parent:1"), registry.reference("command/parent:2")
    missing = ckptfs("push", images, second, "--parent", first)
    assert missing.code == 3 and "command/parent" in missing.err and missing.err.count("\n") == 1
    assert ckptfs("push", images, first).code == 0
    pushed = ckptfs("push", images, second, "--parent", first)
    assert pushed.code == 0 and f"of memory are in {first}, 0 B have changed" in pushed.err
    third = ckptfs("push", images, registry.reference("command/parent:3"), "--parent", second, "--json").json
    assert third["parent"]["changed"] == 0 and [layer["reused"] for layer in third["layers"]].count(True) >= 1


def test_facts_as_json(images: Path, registry: DockerRegistry) -> None:
    reference = registry.reference("command/facts:1")
    command = ("push", images, reference, "--json", "--name", "web", "--annotation", "team=a=b")
    facts = ckptfs(*command).json
    assert set(facts) == {"reference", "digest", "size", "layers", "parent", "sent", "present", "rootfs"}
    assert facts["reference"] == reference and facts["rootfs"] is None and facts["parent"] is None
    assert facts["sent"] > sum(layer["size"] for layer in facts["layers"]) and facts["present"] == 0
    assert [layer["role"] for layer in facts["layers"]] == ["meta", "pages"]
    assert sum(layer["files"] for layer in facts["layers"]) >= len(os.listdir(images))
    manifest = registry.manifest(f"command/facts@{facts['digest']}")
    assert isinstance(manifest["layers"], list)
    assert [layer["digest"] for layer in facts["layers"]] == [layer["digest"] for layer in manifest["layers"]]
    notes = manifest["annotations"]
    assert isinstance(notes, dict)
    assert notes["team"] == "a=b"
    assert notes["io.kubernetes.cri-o.annotations.checkpoint.name"] == "web"
    again = ckptfs(*command).json
    assert (again["digest"], again["sent"], again["present"]) == (facts["digest"], 0, facts["sent"])


@pytest.mark.parametrize("form", ["archive", "archive:", "gzip", "layout", "oci:", "reference"])
def test_every_kind_of_source_gives_the_same_image(form: str, registry: DockerRegistry, tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    archive = tmp_path / "first.tar"
    source: Path | str = archive
    expected = push_to_layout(archive, tmp_path / "expected").manifest.digest
    if form == "archive:":
        source = f"archive:{archive}"
    elif form == "gzip":
        source = tmp_path / "first.tar.gz"
        source.write_bytes(gzip.compress(archive.read_bytes(), 1))
    elif form in ("layout", "oci:"):
        layout = layout_of(archive.read_bytes(), tmp_path / "layout")
        source = layout if form == "layout" else f"oci:{layout}:latest"
    elif form == "reference":
        layout = layout_of(archive.read_bytes(), tmp_path / "layout")
        source = registry.reference("command/plain:1")
        run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:latest", f"docker://{source}")
    pushed = ckptfs("push", source, f"oci:{tmp_path}/out:1", "--json", "--work-dir", tmp_path)
    assert pushed.code == 0, pushed.err
    assert pushed.json["digest"] == str(expected)
    leftovers = set(os.listdir(tmp_path)) - {"first.tar", "second.tar", "first.tar.gz", "layout", "expected", "out"}
    assert not leftovers


def test_the_root_file_system_as_well(registry: DockerRegistry, tmp_path: Path) -> None:
    base = io.BytesIO()
    with tarfile.open(fileobj=base, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("etc/gone"))
    layout = layout_of(base.getvalue(), tmp_path / "base")
    name = registry.reference("command/base:1")
    run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:latest", f"docker://{name}")
    folder = tmp_path / "flat"
    folder.mkdir()
    tree_images(folder / "checkpoint")
    (folder / "config.dump").write_text(json.dumps({"name": "web", "rootfsImageName": name}))
    (folder / "deleted.files").write_text('["/etc/gone"]')
    reference = registry.reference("command/rooted:ck")
    facts = ckptfs("push", folder, reference, "--rootfs", "--json").json
    notes = registry.manifest("command/rooted:ck")["annotations"]
    layers = registry.manifest("command/rooted:ck-rootfs")["layers"]
    assert isinstance(notes, dict) and isinstance(layers, list)
    assert facts["rootfs"]["digest"] == notes["dev.ckptfs.rootfs.digest"]
    assert len(layers) == 2
    assert ckptfs("push", folder, reference, "--rootfs", "--base", name, "--json").json["sent"] == 0
    seen = ckptfs("ls", reference, "etc", "--view", "rootfs", "--cache-dir", tmp_path / "cache")
    assert (seen.code, seen.out) == (0, ""), seen.err


@each(
    "arguments, code, words",
    [
        (["nowhere", "{ref}"], 3, "there is no nowhere"),
        (["{tmp}/nowhere", "{ref}"], 3, "nowhere"),
        (["archive:{tmp}/nowhere", "{ref}"], 3, "nowhere"),
        (["oci:{tmp}/nowhere", "{ref}"], 3, "nowhere"),
        (["oci:{layout}:no-such", "{ref}"], 3, "no-such"),
        (["{registry}/command/nowhere:1", "{ref}"], 3, "nowhere"),
        (["{tmp}/empty", "{ref}"], 7, "is empty"),
        (["{tmp}/junk", "{ref}"], 7, "tar"),
        (["{tmp}/plain", "{ref}"], 7, "no inventory.img"),
        (["{tmp}/layout.tar", "{ref}"], 7, "unpack it and push oci:DIR"),
        (["{tmp}/docker.tar", "{ref}"], 7, "copy it with skopeo to oci:DIR:1"),
        (["{tmp}/pipe", "{ref}"], 7, "pipe is not a regular file; write it to one"),
        (["", "{ref}"], 2, "SRC is empty"),
        (["{images}", "no-registry"], 2, "names no registry"),
        (["{images}", "archive:{tmp}/x.tar"], 2, "cannot push to archive"),
        (["{images}", "{ref}@sha256:" + "0" * 64], 2, "name a tag"),
        (["{images}", "localhost:1/a:b"], 5, "localhost:1"),
        (["{images}", "oci:{tmp}/junk:1"], 8, "junk"),
        (["{images}", "{ref}", "--annotation", "team"], 2, "KEY=VALUE"),
        (["{images}", "{ref}", "--base", "{ref}"], 2, "--rootfs"),
        (["{images}", "{ref}", "--rootfs"], 2, "--base REF"),
        (["{images}", "{ref}", "--rootfs", "--base", "{registry}/command/nowhere:1"], 3, "nowhere"),
        (["{tmp}/local", "{ref}", "--rootfs"], 2, "no registry is known for the base image localhost/web:1"),
        (["{images}", "{ref}", "--work-dir", "/proc"], 8, "--work-dir"),
        (["{images}", "{ref}", "--work-dir", "{tmp}/nowhere"], 2, "--work-dir"),
        (["{images}"], 2, "REF"),
    ],
)
def test_bad_input_gets_one_line_and_its_code(
    arguments: list[str], code: int, words: str, images: Path, registry: DockerRegistry, tmp_path: Path
) -> None:
    for name in ("empty", "plain", "local/checkpoint"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(images / "inventory.img", tmp_path / "local" / "checkpoint")
    (tmp_path / "local" / "config.dump").write_text('{"name": "web", "rootfsImageName": "localhost/web:1"}')
    (tmp_path / "plain" / "file").write_text("no checkpoint")
    (tmp_path / "junk").write_text("no tar " * 1000)
    os.mkfifo(tmp_path / "pipe")
    push_to_layout(images, tmp_path / "layout", "1")
    for archive, name in (("layout.tar", "."), ("docker.tar", "manifest.json")):
        with tarfile.open(tmp_path / archive, "w") as made:
            made.add(tmp_path / "layout" / ("" if name == "." else "index.json"), name)
    places = {"ref": registry.reference("command/bad:1"), "registry": registry.host, "images": images, "tmp": tmp_path}
    filled = [argument.format(layout=tmp_path / "layout", **places) for argument in arguments]
    result = ckptfs("push", *filled)
    assert (result.code, words in result.line) == (code, True), result.err
    assert result.out == ""


def test_a_failed_push_leaves_the_tag_as_it_was(images: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    push_to_layout(images, layout, "good")
    before = manifest_of(layout, "good").digest
    (tmp_path / "cut.tar").write_bytes(b"")
    assert ckptfs("push", tmp_path / "cut.tar", f"oci:{layout}:good").code == 7
    assert manifest_of(layout, "good").digest == before


def test_a_layout_that_is_there_takes_names_for_tags(images: Path, tmp_path: Path) -> None:
    for name in ("1", "localhost/app:1"):
        assert ckptfs("push", images, f"oci:{tmp_path}/layout:{name}", "--quiet").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["layout"]
    entries = json.loads((tmp_path / "layout" / "index.json").read_text())["manifests"]
    assert [entry["annotations"]["org.opencontainers.image.ref.name"] for entry in entries] == ["1", "localhost/app:1"]


def test_progress_on_a_terminal_only(registry: DockerRegistry, tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    with ShapedLink(registry.host, rtt=0.02, rate=16e6) as link:
        command = (sys.executable, "-m", "ckptfs", "push", tmp_path / "first.tar", f"{link.address}/command/slow")
        terminal, other = pty.openpty()
        with subprocess.Popen([*map(str, command)], stderr=other, stdout=subprocess.PIPE) as process:
            os.close(other)
            said = bytearray()
            try:
                while piece := os.read(terminal, 4096):
                    said += piece
            except OSError:  # EIO: the other side is closed
                pass
            os.close(terminal)
            assert process.wait(30) == 0, said
        assert b"packed" in said and b"sent" in said and b"MiB" in said
        quick = ckptfs(*command[3:-1], f"{link.address}/command/slow")
        assert quick.code == 0 and quick.err.count("\n") == 1


def test_ctrl_c_ends_a_slow_push_at_once(registry: DockerRegistry, tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    with ShapedLink(registry.host, rtt=0.02, rate=1e6) as link:
        command = (sys.executable, "-m", "ckptfs", "push", tmp_path / "first.tar", f"{link.address}/command/stopped")
        with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
            wait_for("the upload to begin", lambda: link.stats().bytes_up > 100_000)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=10)
        assert (process.returncode, said) == (130, "ckptfs: interrupted\n")
    assert ckptfs("ls", registry.reference("command/stopped:latest")).code == 3
