"""Fixtures that several test folders share. Expensive ones are made once per session, on first use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.criu import Checkpoint, dump, require_criu
from tests.support.docker_registry import DockerRegistry
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
