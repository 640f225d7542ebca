"""Images that restores of podman's container begin from."""

import pytest

from tests.support.docker_registry import DockerRegistry
from tests.support.podman import BASE, Podman


@pytest.fixture(scope="session")
def base(podman: Podman, registry: DockerRegistry) -> str:
    """Its base image in the registry."""
    return podman.push(BASE, registry.reference("restore/base:1"))


@pytest.fixture(scope="session")
def reference(podman_image_refs: dict[str, str]) -> str:
    """Its checkpoint, as buildah pushes one that can be read in parts."""
    return podman_image_refs["zstd:chunked"]
