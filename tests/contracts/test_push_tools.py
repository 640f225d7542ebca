"""What `push` writes is an image to other people's tools: each gives the tree of the source."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptfs.push import PushResult
from tests.support.docker_registry import DockerRegistry
from tests.support.golden import Listing, directory_listing, whole_seconds
from tests.support.isolation import Isolation
from tests.support.push import push_to_layout, tree_images
from tests.support.tools import end, require, run, start, wait_for

pytestmark = pytest.mark.registry


@dataclass(frozen=True, slots=True)
class Pushed:
    """A checkpoint, its image in a layout and in a registry."""

    folder: Path
    layout: Path
    reference: str
    result: PushResult

    @property
    def listing(self) -> Listing:
        return whole_seconds(directory_listing(self.folder))


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory, registry: DockerRegistry) -> Pushed:
    require("skopeo", "tar", root=True)
    top = tmp_path_factory.mktemp("push")
    folder = top / "flat"
    folder.mkdir()
    tree_images(folder / "checkpoint")
    (folder / "checkpoint").chmod(0o700)
    (folder / "config.dump").write_text(json.dumps({"id": "1", "name": "tree", "runtime": "runc"}))
    (folder / "spec.dump").write_text("{}")
    (folder / "artifacts").mkdir(mode=0o711)
    run("tar", "-cf", folder / "rootfs-diff.tar", "-C", folder, "spec.dump")
    result = push_to_layout(folder, top / "layout", "tree")
    reference = registry.reference("push/tree:latest")
    copy(f"oci:{top}/layout:tree", f"docker://{reference}")
    return Pushed(folder, top / "layout", reference, result)


def copy(source: str, target: str) -> None:
    run("skopeo", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false", source, target)


def test_skopeo_inspects_it_and_copies_it_with_its_digest(pushed: Pushed, registry: DockerRegistry) -> None:
    said = json.loads(run("skopeo", "inspect", "--tls-verify=false", f"docker://{pushed.reference}").stdout)
    assert said["Digest"] == str(pushed.result.manifest.digest)
    assert said["Layers"] == [str(layer.descriptor.digest) for layer in pushed.result.layers]
    other = registry.reference("push/copied:latest")
    run(
        "skopeo",
        "copy",
        "--quiet",
        "--preserve-digests",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
        f"docker://{pushed.reference}",
        f"docker://{other}",
    )
    assert registry.manifest("push/copied:latest") == registry.manifest("push/tree:latest")


def test_umoci_unpacks_the_same_tree(pushed: Pushed, tmp_path: Path) -> None:
    """umoci 0.4 knows no zstd: skopeo makes gzip of it first, which checks every diff_id on the way."""
    require("umoci")
    plain = tmp_path / "gzip"
    compress = ("--dest-compress", "--dest-compress-format=gzip")
    run("skopeo", "copy", "--quiet", *compress, f"oci:{pushed.layout}:tree", f"oci:{plain}:tree")
    run("umoci", "unpack", "--image", f"{plain}:tree", tmp_path / "bundle")
    assert whole_seconds(directory_listing(tmp_path / "bundle" / "rootfs")) == pushed.listing


@pytest.mark.parametrize("tool", ["buildah", "podman"])
def test_buildah_and_podman_pull_the_same_tree(pushed: Pushed, isolation: Isolation, tool: str, tmp_path: Path) -> None:
    require(tool)
    storage = (f"--root={tmp_path}/root", f"--runroot=/run/push-{tool}", "--storage-driver=vfs")
    image = isolation.run(tool, *storage, "pull", "--quiet", "--tls-verify=false", pushed.reference).stdout.strip()
    try:
        if tool == "podman":
            mounted = isolation.run(tool, *storage, "image", "mount", image).stdout.strip()
        else:
            container = isolation.run(tool, *storage, "from", "--pull-never", pushed.reference).stdout.strip()
            mounted = isolation.run(tool, *storage, "mount", container).stdout.strip()
        found = whole_seconds(directory_listing(isolation.path(mounted)))
        expected = pushed.listing
        extra = set(found["entries"]) - set(expected["entries"])
        assert extra <= {"proc", "sys", "dev", "run", "etc"}  # buildah makes mount points in a working container
        assert {k: v for k, v in found["entries"].items() if k not in extra} == expected["entries"]
    finally:
        if tool == "podman":
            isolation.run(tool, *storage, "image", "umount", "--all")
        isolation.run(tool, *storage, "rmi", "--all", "--force")


@pytest.fixture
def containerd(tmp_path: Path) -> Iterator[Path]:
    """The socket of a containerd with nothing in it."""
    require("containerd", "ctr", root=True)
    folder = tmp_path / "containerd"
    folder.mkdir()
    socket = folder / "socket"
    config = folder / "config.toml"
    config.write_text(
        f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{socket}"\n[ttrpc]\naddress = "{socket}.ttrpc"\n'
    )
    daemon = start("containerd", "--config", config, stderr=subprocess.DEVNULL)
    try:
        wait_for("containerd", lambda: socket.exists() and _serves(socket))
        yield socket
    finally:
        end(daemon)
        shutil.rmtree(folder, ignore_errors=True)


def _serves(socket: Path) -> bool:
    return subprocess.run(["ctr", "-a", socket, "version"], capture_output=True, check=False).returncode == 0


def test_containerd_pulls_and_unpacks_the_same_tree(pushed: Pushed, containerd: Path, tmp_path: Path) -> None:
    ctr = ("ctr", "-a", str(containerd))
    run(*ctr, "image", "pull", "--plain-http", "--snapshotter=native", pushed.reference)
    into = tmp_path / "mounted"
    into.mkdir()
    run(*ctr, "image", "mount", "--snapshotter=native", pushed.reference, into)
    try:
        assert whole_seconds(directory_listing(into)) == pushed.listing
    finally:
        run("umount", into)
