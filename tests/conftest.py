"""Fixtures that several test folders share. Expensive ones are made once per session, on first use."""

from collections.abc import Iterator

import pytest

from tests.support.docker_registry import DockerRegistry
from tests.support.tools import require, use_setup_tools

pytest_plugins = ["tests.support.rows"]

use_setup_tools()


@pytest.fixture(scope="session")
def registry() -> Iterator[DockerRegistry]:
    """An empty docker-registry that the whole session shares: take repository names of your own."""
    require("docker-registry")
    with DockerRegistry() as registry:
        yield registry
