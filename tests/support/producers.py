"""Checkpoints in the layout of every producer, as folders; the contents are what the real tools wrote (tests/data).

What cannot be made here (a kubelet, containerd's CRI, docker, a pod) is put together from those, file by file, as the
producers' sources say. Each builder fills an empty folder as root. Called by tests of views.
"""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from tests.support.blobs import layout_layer
from tests.support.push import tree_images
from tests.support.tools import run

DATA = Path(__file__).resolve().parents[1] / "data"
PRODUCERS = DATA / "producers"
_KEEP = ("--numeric-owner", "--same-owner", "--preserve-permissions", "--xattrs", "--xattrs-include=*")


def unpack(archive: Path, folder: Path) -> Path:
    """GNU tar, as root: plain, gzip or zstd by the file's first bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    head = archive.read_bytes()[:4]
    how = {b"\x1f\x8b": ["--gzip"], b"\x28\xb5": ["--zstd"]}.get(head[:2], [])
    run("tar", "--extract", *how, "--file", archive, "--directory", folder, *_KEEP)
    return folder


def podman(folder: Path) -> None:
    """`podman container checkpoint --export`."""
    unpack(PRODUCERS / "counter-zstd.tar.zst", folder)


def podman_created(folder: Path) -> None:
    """`podman container checkpoint --create-image`."""
    _layer(PRODUCERS / "created-gzip.oci", folder)


def cri_o(folder: Path) -> None:
    """The kubelet's archive by CRI-O (internal/lib/checkpoint.go)."""
    podman(folder)
    for name in ("artifacts", "devshm-checkpoint.tar", "network.status", "ctr.log"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("config.dump", "spec.dump"):
        shutil.copy(DATA / "criu" / "cri-o" / name, folder / name)
    (folder / "bind.mounts").write_text(json.dumps([{"source": "/a", "destination": "/b", "file_type": "file"}]))
    (folder / "dump.log").write_text("(00.0) dumped\n")
    (folder / "io.kubernetes.cri-o.LogPath").write_text("a log line\n")


def containerd_cri(folder: Path) -> None:
    """containerd's CRI (container_checkpoint_linux.go): the delta is the writable layer, gzip with whiteouts."""
    nested = folder.parent / f"{folder.name}-nested"
    nested.mkdir()
    containerd_nested(nested)
    criu, layer, _ = nested_blobs(nested)
    unpack(criu, folder / "checkpoint")
    shutil.copy(layer, folder / "rootfs-diff.tar")
    for name in ("config.dump", "spec.dump"):
        shutil.copy(DATA / "criu" / "containerd" / name, folder / name)
    for name in ("status", "status.dump", "container.log", "dump.log", "stats-dump"):
        (folder / name).write_bytes(b"{}\n")


def containerd_nested(folder: Path) -> None:
    """`ctr container checkpoint`, its layout unpacked into an image."""
    _layer(PRODUCERS / "nested-gzip.oci", folder)


def criu_directory(folder: Path) -> None:
    """criu, runc, crun: images and nothing else."""
    tree_images(folder)


def docker(folder: Path) -> None:
    """/var/lib/docker/containers/ID, as `docker checkpoint create` leaves it."""
    (folder / "checkpoints").mkdir()
    tree_images(folder / "checkpoints" / "first")
    (folder / "config.v2.json").write_text("{}")


def pod(folder: Path) -> None:
    """Two containers of a pod (https://github.com/cri-o/cri-o/pull/9758, checkpointctl's pod.options)."""
    containers = {"web": "aaaa-web", "db": "bbbb-db"}
    (folder / "pod.options").write_text(json.dumps({"version": 1, "containers": containers, "annotations": {}}))
    for name, fill in (("aaaa-web", cri_o), ("bbbb-db", podman)):
        (folder / name).mkdir()
        fill(folder / name)


def incremental(folder: Path) -> None:
    """podman `--with-previous`: checkpoint/parent leads to ../pre-checkpoint."""
    podman(folder)
    shutil.copytree(folder / "checkpoint", folder / "pre-checkpoint")
    (folder / "checkpoint" / "parent").symlink_to("../pre-checkpoint")
    (folder / "pre-checkpoint" / "pages-1.img").write_bytes(b"earlier pages".ljust(8192, b"."))


def criu_increments(folder: Path) -> None:
    """`criu pre-dump` twice, then `criu dump --prev-images-dir`: each directory leads to the one before."""
    (folder / "dumps").mkdir()
    for number in (1, 2, 3):
        images = tree_images(folder / "dumps" / str(number))
        (images / "inventory.img").write_bytes(b"dump %d" % number)
        if number > 1:
            (images / "parent").symlink_to(f"../{number - 1}")


def volumes(folder: Path) -> None:
    """podman with a volume and its own /dev/shm."""
    podman(folder)
    inside = folder.parent / "volume"
    (inside / "deep").mkdir(parents=True)
    (inside / "deep" / "file").write_text("of the volume\n")
    inside.chmod(0o2770)
    (folder / "volumes").mkdir()
    run("tar", "--create", "--file", folder / "volumes" / "data.tar", "--directory", inside, ".")


def no_checkpoint(folder: Path) -> None:
    """Any image."""
    (folder / "etc").mkdir()
    (folder / "etc" / "passwd").write_text("root:x:0:0\n")
    (folder / "bin").symlink_to("usr/bin")
    (folder / "rootfs-diff.tar").write_bytes(b"not even a tar")


PRODUCER: dict[str, Callable[[Path], None]] = {
    "podman": podman,
    "podman created": podman_created,
    "CRI-O": cri_o,
    "containerd CRI": containerd_cri,
    "containerd nested": containerd_nested,
    "criu": criu_directory,
    "docker": docker,
    "pod": pod,
    "incremental": incremental,
    "criu increments": criu_increments,
    "volumes": volumes,
    "none": no_checkpoint,
}


def deltas(folder: Path, into: Path) -> tuple[Path, set[str]]:
    """rootfs-diff.tar of a flat folder, unpacked by GNU tar into `into`, and the names that it has."""
    tar = folder / "rootfs-diff.tar"
    unpack(tar, into)
    with tarfile.open(tar) as archive:
        return into, {name.removeprefix("./").rstrip("/") or "." for name in archive.getnames()}


def nested_blobs(folder: Path) -> tuple[Path, Path, Path]:
    """Of containerd's layout: the CRIU tar, the writable layer, the config."""
    found = {}
    for blob in (folder / "blobs" / "sha256").iterdir():
        data = blob.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            with tarfile.open(blob) as archive:
                if any("/.wh." in name for name in archive.getnames()):
                    found["layer"] = blob
        elif data.startswith(b"\n") and b'"ociVersion"' in data:
            found["config"] = blob
        elif tarfile.is_tarfile(blob):
            found["criu"] = blob
    return found["criu"], found["layer"], found["config"]


def _layer(layout: Path, folder: Path) -> None:
    blob = folder.parent / "layer"
    blob.write_bytes(layout_layer(layout).data)
    unpack(blob, folder)
    blob.unlink()
