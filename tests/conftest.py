"""Fixtures that several test folders share. Expensive ones are made once per session, on first use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.criu import Checkpoint, dump, require_criu
from tests.support.docker_registry import DockerRegistry
from tests.support.images import ImageBuilder, flat_layout
from tests.support.isolation import Isolation
from tests.support.podman import Podman, PodmanCheckpoint, require_podman
from tests.support.tools import require, use_setup_tools
from tests.support.workload import process_tree, scratch, ticker

pytest_plugins = ["tests.support.rows"]

use_setup_tools()


@pytest.fixture(scope="session")
def registry() -> Iterator[DockerRegistry]:
    """An empty docker-registry that the whole session shares: take repository names of your own."""
    require("docker-registry")
    with DockerRegistry() as registry:
        yield registry


@pytest.fixture(scope="session")
def scratch_folder() -> Iterator[Path]:
    """A folder for programs and checkpoints, the same path from dump to restore."""
    with scratch() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def single_checkpoint(scratch_folder: Path) -> Checkpoint:
    """One process of 64 MB, dumped by criu."""
    require_criu()
    with ticker(scratch_folder, 64, set=200) as workload:
        return dump(workload, scratch_folder / "single")


@pytest.fixture(scope="session")
def tree_checkpoint(scratch_folder: Path) -> Checkpoint:
    """Three processes with copy-on-write, shared and memfd memory, a pipe and sockets: 16 MB, dumped by criu."""
    require_criu()
    with process_tree(scratch_folder, 16) as workload:
        return dump(workload, scratch_folder / "tree-images")


@pytest.fixture(scope="session")
def isolation(scratch_folder: Path) -> Iterator[Isolation]:
    """Where podman, buildah and skopeo work with storage of their own."""
    require("buildah", "skopeo", root=True)
    with Isolation(scratch_folder / "storage") as isolation:
        yield isolation


@pytest.fixture(scope="session")
def image_builder(isolation: Isolation, registry: DockerRegistry) -> ImageBuilder:
    return ImageBuilder(isolation, registry)


@pytest.fixture(scope="session")
def image_refs(single_checkpoint: Checkpoint, image_builder: ImageBuilder, scratch_folder: Path) -> dict[str, str]:
    """The single checkpoint in the registry, by format: gzip, zstd, zstd:chunked, uncompressed."""
    layout = flat_layout(single_checkpoint.images, scratch_folder / "single-layout", name="ticker")
    return image_builder.images(layout, "single")


@pytest.fixture(scope="session")
def tree_image_refs(tree_checkpoint: Checkpoint, image_builder: ImageBuilder, scratch_folder: Path) -> dict[str, str]:
    """The process tree in the registry, by format."""
    layout = flat_layout(tree_checkpoint.images, scratch_folder / "tree-layout", name="tree")
    return image_builder.images(layout, "tree")


@pytest.fixture(scope="session")
def podman(isolation: Isolation, scratch_folder: Path) -> Iterator[Podman]:
    """podman with an image, BASE, to run tickers from."""
    require_criu()
    require_podman()
    with Podman(isolation, scratch_folder) as podman:
        podman.build_base()
        yield podman


@pytest.fixture(scope="session")
def podman_checkpoint(podman: Podman, scratch_folder: Path) -> PodmanCheckpoint:
    """A container of 8 MB with a changed file system, checkpointed by podman in every way it has."""
    podman.run_ticker("ticking", 8)
    return podman.checkpoint("ticking", scratch_folder)


@pytest.fixture(scope="session")
def podman_image_refs(
    podman: Podman, podman_checkpoint: PodmanCheckpoint, image_builder: ImageBuilder, registry: DockerRegistry
) -> dict[str, str]:
    """podman's uncompressed archive in the registry, by format, and as "created" the image that podman itself made."""
    references = image_builder.images(podman_checkpoint.archives["none"], "podman")
    references["created"] = podman.push(podman_checkpoint.image, registry.reference("podman:created"))
    return references
