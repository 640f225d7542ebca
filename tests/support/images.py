"""Checkpoint images in a registry, made as the documentation of Kubernetes says: buildah from scratch, add, annotate.

Owns the flat checkpoint layout around criu's images, building and pushing in each compression that Debian's buildah
has, and the eager extraction by real tools that a mount is compared with. Called by fixtures, tests and the demo.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from tests.support.docker_registry import DockerRegistry
from tests.support.isolation import Isolation
from tests.support.tools import run

CRIO_NAME = "io.kubernetes.cri-o.annotations.checkpoint.name"
FORMATS = ("gzip", "zstd", "zstd:chunked", "uncompressed")


def flat_layout(images: Path, folder: Path, *, name: str = "workload") -> Path:
    """`folder` as an engine exports a checkpoint: checkpoint/ with criu's files, config.dump, spec.dump, stats-dump."""
    folder.mkdir()
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(mode=0o700)
    for image in sorted(images.iterdir()):
        if image.name in ("stats-dump", "dump.log"):  # engines put these beside the directory
            shutil.copy2(image, folder / image.name)
        else:
            _link_or_copy(image, checkpoint / image.name)
    identity = hashlib.sha256(name.encode()).hexdigest()
    config = {"id": identity, "name": name, "rootfsImageName": "scratch", "runtime": "runc"}
    config["createdTime"] = config["checkpointedTime"] = "2026-01-01T00:00:00Z"
    spec = {"ociVersion": "1.0.2", "process": {"args": [f"/{name}"], "cwd": "/"}, "root": {"path": "rootfs"}}
    for file, value in (("config.dump", config), ("spec.dump", spec)):
        (folder / file).write_text(json.dumps(value, indent=1))
        (folder / file).chmod(0o600)
    return folder


class ImageBuilder:
    """Builds images from directories and archives in the storage of an `Isolation` and pushes them to a registry."""

    def __init__(self, isolation: Isolation, registry: DockerRegistry) -> None:
        self._isolation = isolation
        self._registry = registry

    def build(self, layout: Path, name: str) -> None:
        """Image `name` in the local storage; its root is what `layout`, a directory or a tar archive, holds."""
        container = self._buildah("from", "scratch")
        try:
            self._buildah("add", container, f"{layout}/" if layout.is_dir() else str(layout), "/")
            self._buildah("config", f"--annotation={CRIO_NAME}={name}", container)
            self._buildah("commit", "--quiet", container, name)
        finally:
            self._buildah("rm", container)

    def push(self, name: str, repository: str, compression: str) -> str:
        """Pushes a built image with one of FORMATS; returns its reference "host:port/repository:tag"."""
        reference = self._registry.reference(f"{repository}:{compression.replace(':', '-')}")
        self._isolation.forget_blobs()
        if compression == "uncompressed":
            self._push_uncompressed(name, reference)
        else:
            tls = "--tls-verify=false"
            self._buildah("push", "--quiet", tls, "--compression-format", compression, name, f"docker://{reference}")
        return reference

    def images(self, layout: Path, repository: str, formats: tuple[str, ...] = FORMATS) -> dict[str, str]:
        """The same contents in several formats: format -> reference."""
        self.build(layout, repository)
        return {compression: self.push(repository, repository, compression) for compression in formats}

    def _push_uncompressed(self, name: str, reference: str) -> None:
        # A push to a registry always compresses; a copy that must keep digests does not.
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            self._buildah("push", "--quiet", "--format=oci", "--disable-compression", name, f"dir:{folder}")
            copy = ["skopeo", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false"]
            self._isolation.run(*copy, f"dir:{folder}", f"docker://{reference}")

    def _buildah(self, *words: str) -> str:
        return self._isolation.run("buildah", "--storage-driver=vfs", *words).stdout.strip()


def extract(reference: str, folder: Path) -> Path:
    """The eager way, as root: skopeo fetches, GNU tar unpacks layer by layer to `folder`; whiteouts are not applied."""
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=folder.parent) as copy:
        run("skopeo", "copy", "--quiet", "--src-tls-verify=false", f"docker://{reference}", f"dir:{copy}")
        for layer in json.loads((Path(copy) / "manifest.json").read_text())["layers"]:
            blob = Path(copy) / layer["digest"].partition(":")[2]
            keep = ["--numeric-owner", "--same-owner", "--preserve-permissions", "--xattrs", "--xattrs-include=*"]
            run("tar", "--extract", "--file", blob, "--directory", folder, *keep)
    return folder


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
