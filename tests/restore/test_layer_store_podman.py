"""`ckptfs store` under unmodified podman: a pull fetches metadata, and an image from the store is what a pull gives."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptfs.model.annotations import ROOTFS_DIGEST
from tests.support.command import ckptfs
from tests.support.docker_registry import DockerRegistry
from tests.support.golden import directory_listing
from tests.support.images import ImageBuilder
from tests.support.isolation import Isolation
from tests.support.layer_store import Store, commit, layer_store, storage
from tests.support.podman import BASE, Podman, PodmanCheckpoint
from tests.support.tools import unavailable, wait_for
from tests.support.workload import compile_program

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]

FORMATS = ("gzip", "zstd", "zstd:chunked", "uncompressed")
LARGE = 16 << 20
LIMITS = ("--ulimit=nofile=1024", "--ulimit=nproc=1024")


@pytest.fixture(scope="module")
def layered(isolation: Isolation, image_builder: ImageBuilder, scratch_folder: Path) -> dict[str, str]:
    """An image of three layers that add, change, delete and make anew; by format."""
    show = compile_program("show", scratch_folder)

    def first(root: Path) -> None:
        for name in (
            "etc/kept",
            "etc/changed",
            "etc/deleted",
            "gone/a/b",
            "anew/old",
            "file-then-dir",
            "dir-then-file/x",
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{name} of the first layer\n")
        shutil.copy(show, root / "show")
        (root / "large").write_bytes(os.urandom(LARGE))
        (root / "tmp").mkdir(mode=0o1777)
        (root / "tmp").chmod(0o1777)
        (root / "link").symlink_to("etc/kept")
        os.link(root / "etc/kept", root / "hard")
        os.mknod(root / "device", 0o020640, os.makedev(1, 3))
        os.mkfifo(root / "fifo")
        os.setxattr(root / "etc/kept", "user.note", b"one")
        os.chown(root / "etc/changed", 1000, 2000)
        shutil.copy(show, root / "setuid")
        (root / "setuid").chmod(0o4755)

    def second(root: Path) -> None:
        (root / "etc/deleted").unlink()
        (root / "etc/changed").write_text("changed\n")
        shutil.rmtree(root / "gone")
        shutil.rmtree(root / "anew")
        (root / "anew").mkdir(mode=0o750)
        (root / "anew/new").write_text("new\n")
        (root / "file-then-dir").unlink()
        (root / "file-then-dir").mkdir()
        (root / "file-then-dir/inside").write_text("inside\n")
        shutil.rmtree(root / "dir-then-file")
        (root / "dir-then-file").write_text("a file\n")

    def third(root: Path) -> None:
        (root / "gone").mkdir()
        (root / "gone/back").write_text("back\n")
        (root / "etc/third").write_text("third\n")
        (root / "etc").chmod(0o711)

    commit(isolation, "scratch", "layers-1", first)
    commit(isolation, "layers-1", "layers-2", second)
    commit(isolation, "layers-2", "layers-3", third)
    return {kind: image_builder.push("layers-3", "layers", kind) for kind in FORMATS}


@pytest.fixture(scope="module")
def eager(isolation: Isolation, scratch_folder: Path) -> Iterator[Podman]:
    with storage(isolation, scratch_folder, "eager") as podman:
        yield podman


@pytest.fixture
def store(isolation: Isolation, tmp_path: Path) -> Iterator[Store]:
    with layer_store(isolation, tmp_path, "--no-background-fetch") as store:
        yield store


@pytest.fixture
def lazy(isolation: Isolation, store: Store, tmp_path: Path) -> Iterator[Podman]:
    with storage(isolation, tmp_path, f"lazy-{tmp_path.name}", store.path) as podman:
        try:
            yield podman
        finally:
            podman("rmi", "--all", "--force")


def pull(podman: Podman, reference: str) -> None:
    podman("pull", "--quiet", "--tls-verify=false", reference)


def mounted(podman: Podman, reference: str) -> Path:
    return podman.isolation.path(podman("image", "mount", reference))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_lazy_image_is_what_an_eager_pull_gives(
    kind: str, layered: dict[str, str], eager: Podman, lazy: Podman, store: Store
) -> None:
    reference = layered[kind]
    pull(lazy, reference)
    status = store.status()
    assert status["network"]["bytes"] < (200_000 if kind == "zstd:chunked" else LARGE // 4)
    (image,) = status["images"]
    assert (image["reference"], image["layers"], image["users"]) == (reference, 3, 3)
    pull(eager, reference)
    try:
        wanted, found = mounted(eager, reference), mounted(lazy, reference)
        assert directory_listing(found) == directory_listing(wanted)
        assert found.stat().st_mode == wanted.stat().st_mode
        assert lazy("image", "inspect", "--format={{.Id}} {{.RootFS.Layers}}", reference) == eager(
            "image", "inspect", "--format={{.Id}} {{.RootFS.Layers}}", reference
        )
        lazy("image", "umount", reference)
        # a container: a writable layer above ours
        run = ("run", "--rm", "--network=none", *LIMITS, "--user=1000", reference)
        shown = ("/show", "/etc/changed", "/etc/deleted", "/gone/a/b", "/gone/back")
        assert lazy(*run, *shown) == eager(*run, *shown)
        assert lazy(*run, "/setuid") == "uid 0"
    finally:
        eager("image", "umount", "--all")
        eager("rmi", "--force", reference)


def test_layers_are_let_go_when_the_image_is_removed(layered: dict[str, str], lazy: Podman, store: Store) -> None:
    reference = layered["zstd:chunked"]
    pull(lazy, reference)
    mounted(lazy, reference)
    lazy("image", "umount", reference)
    lazy("rmi", reference)
    assert [image["users"] for image in store.status()["images"]] in ([], [0])
    pull(lazy, reference)
    assert (mounted(lazy, reference) / "etc/third").read_text() == "third\n"


def test_a_stopped_store_goes_on_where_it_was(
    isolation: Isolation, registry: DockerRegistry, layered: dict[str, str], image_builder: ImageBuilder, tmp_path: Path
) -> None:
    """Its users are known again, and a tag that has moved since breaks nothing."""
    moving = registry.reference("layers:moving")
    copy = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"]
    isolation.run(*copy, f"docker://{layered['zstd:chunked']}", f"docker://{moving}")
    with storage(isolation, tmp_path, f"lazy-{tmp_path.name}", tmp_path / "store") as podman:
        with layer_store(isolation, tmp_path):
            pull(podman, moving)
        isolation.run(*copy, f"docker://{layered['gzip']}", f"docker://{moving}")
        with layer_store(isolation, tmp_path) as store:
            assert (mounted(podman, moving) / "etc/third").read_text() == "third\n"
            assert [image["users"] for image in store.status()["images"]] == [3]
            podman("image", "umount", "--all")
            podman("rmi", "--force", moving)
            assert [image["users"] for image in store.status()["images"]] in ([], [0])


def test_what_the_node_has_needs_no_registry(isolation: Isolation, layered: dict[str, str], tmp_path: Path) -> None:
    with (
        DockerRegistry() as registry,
        storage(isolation, tmp_path, f"lazy-{tmp_path.name}", tmp_path / "store") as lazy,
    ):
        reference = registry.reference("app:1")
        copy = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"]
        isolation.run(*copy, f"docker://{layered['zstd:chunked']}", f"docker://{reference}")
        with layer_store(isolation, tmp_path):
            pull(lazy, reference)
            wanted = directory_listing(mounted(lazy, reference))  # reads all
            lazy("image", "umount", reference)
        registry.stop()
        with layer_store(isolation, tmp_path) as store:
            assert directory_listing(mounted(lazy, reference)) == wanted
            assert store.fetched == 0
            lazy("image", "umount", reference)
            lazy("rmi", "--force", reference)


def test_an_indexed_gzip_image_is_read_at_random(
    layered: dict[str, str], image_builder: ImageBuilder, lazy: Podman, store: Store
) -> None:
    assert layered
    reference = image_builder.push("layers-3", "layers-indexed", "gzip")
    assert ckptfs("index", reference).code == 0
    pull(lazy, reference)
    root = mounted(lazy, reference)
    assert (root / "etc/third").read_text() == "third\n" and not (root / "etc/deleted").exists()
    assert (root / "file-then-dir/inside").read_text() == "inside\n"
    assert store.fetched < LARGE // 4
    lazy("image", "umount", reference)


def test_podman_4_asks_only_the_first_store(
    isolation: Isolation, layered: dict[str, str], store: Store, tmp_path: Path
) -> None:
    """containers/storage 1.43, drivers/overlay/overlay.go: getAdditionalLayerPath. Docs say so; later ones ask all."""
    (tmp_path / "empty").mkdir()
    with storage(isolation, tmp_path, f"lazy-{tmp_path.name}", tmp_path / "empty", store.path) as podman:
        if not podman("version", "--format={{.Client.Version}}").startswith("4."):
            unavailable("needs podman 4")
        pull(podman, layered["zstd:chunked"])
        assert store.status()["images"] == []
        podman("rmi", "--all", "--force")


def test_podman_restores_out_of_a_lazily_mounted_checkpoint(
    podman: Podman, podman_checkpoint: PodmanCheckpoint, registry: DockerRegistry, store: Store, tmp_path: Path
) -> None:
    """The checkpoint image M and its root file system R, as `ckptfs push --rootfs` makes them."""
    base = podman.push(BASE, registry.reference("layer-store/base:1"))
    reference = registry.reference("layer-store/ck:1")
    pushed = ckptfs("push", podman_checkpoint.archives["zstd"], reference, "--rootfs", "--base", base, "--json")
    assert pushed.code == 0, pushed.err
    annotations: Any = registry.manifest("layer-store/ck:1")["annotations"]
    root = registry.reference(f"layer-store/ck@{annotations[ROOTFS_DIGEST]}")
    with storage(store.isolation, tmp_path, f"lazy-{tmp_path.name}", store.path, run="/run/containers/storage") as lazy:
        try:
            pull(lazy, reference)
            assert store.fetched < sum(image["image_bytes"] for image in store.status()["images"]) // 4
            pull(lazy, base)  # podman wants the image that the container was made from, under the name it had
            lazy("tag", base, BASE)
            lazy.restore("stored", reference)
            before = podman_checkpoint.last_tick["zstd"]
            ticks = wait_for("another tick", lambda: [t for t in lazy.ticks("stored") if t.number > before])
            assert ticks[0].number == before + 1
            lazy("rm", "--force", "--time=0", "stored")
            pull(lazy, root)
            found = mounted(lazy, root)
            assert (found / "data/added.txt").read_text() == "added\n"
            assert (found / "data/kept.txt").read_text() == "data/kept.txt of the base image\n"
            assert not (found / "data/deleted.txt").exists() and not (found / "data/deleted-folder").exists()
            lazy("image", "umount", root)
        finally:
            lazy("rm", "--all", "--force", "--time=0")
            lazy("rmi", "--all", "--force")


def test_the_next_checkpoint_is_whole(
    podman_checkpoint: PodmanCheckpoint, registry: DockerRegistry, eager: Podman, lazy: Podman, store: Store
) -> None:
    """Its layers share chunks with those of the one before, or stand on them (--parent): each file is as it was."""
    first, second, third = (registry.reference(f"layer-store/next:{number}") for number in (1, 2, 3))
    for name, reference, options in (("none", first, ()), ("gzip", second, ()), ("zstd", third, ("--parent", first))):
        pushed = ckptfs("push", podman_checkpoint.archives[name], reference, *options)
        assert pushed.code == 0, pushed.err
    try:
        for reference in (first, second, third):
            pull(lazy, reference)
            pull(eager, reference)
            assert directory_listing(mounted(lazy, reference)) == directory_listing(mounted(eager, reference))
            lazy("image", "umount", reference)
    finally:
        eager("image", "umount", "--all")
        eager("rmi", "--all", "--force")
    assert [image["errors"] for image in store.status()["images"]] == [[], [], []]


def test_buildah_works_on_lazy_layers(
    layered: dict[str, str], lazy: Podman, store: Store, registry: DockerRegistry
) -> None:
    """FROM a lazy image, a change, and a push of the result, whose lower layers come out of `blob`."""
    tls, target = "--tls-verify=false", registry.reference("layers-built:1")
    container = lazy.isolation.run("buildah", "from", tls, "--quiet", layered["gzip"]).stdout.strip()
    root = lazy.isolation.path(lazy.isolation.run("buildah", "mount", container).stdout.strip())
    (root / "etc/fourth").write_text("fourth\n")
    lazy.isolation.run("buildah", "commit", "--quiet", container, "built")
    lazy.isolation.run("buildah", "rm", container)
    lazy.isolation.forget_blobs()
    lazy.isolation.run("buildah", "push", "--quiet", tls, "built", f"docker://{target}")
    assert store.fetched > LARGE
    lazy("rmi", "--all", "--force")
    pull(lazy, target)
    found = mounted(lazy, target)
    assert (found / "etc/fourth").read_text() == "fourth\n" and (found / "etc/third").read_text() == "third\n"
    assert not (found / "etc/deleted").exists()
