"""Cgroups of restored containers, in hierarchies that are not mounted anywhere: criu makes them there as well."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptfs.restore.runtimes import cgroup, remove_cgroups
from tests.support.tools import wait_for

_NAME = "left-1234"


def _in_hierarchy(hierarchy: str, script: str) -> None:
    script = f"mount -t cgroup -o none,name={hierarchy} cgroup /sys/fs/cgroup && cd /sys/fs/cgroup && {script}"
    subprocess.run(["unshare", "--mount", "--propagation", "private", "sh", "-c", script], check=True)


def _exists(hierarchy: str) -> bool:
    return f":name={hierarchy}:" in Path("/proc/self/cgroup").read_text()


@pytest.fixture
def hierarchy() -> Iterator[str]:
    """One that has cgroups of a container and no mount; it lives as long as it has any."""
    name = f"ckptfs-test-{os.getpid()}"
    _in_hierarchy(name, f"mkdir -p .{cgroup(_NAME)}/ckptfs/before/inner .{cgroup('another')}")
    try:
        yield name
    finally:
        wait_for("the hierarchy to go", lambda: _gone(name), patience=30.0, step=0.5)


def _gone(hierarchy: str) -> bool:
    """The kernel lets go of it when it is unmounted while it is empty: some moments after the last rmdir(2)."""
    if _exists(hierarchy):
        _in_hierarchy(hierarchy, "find . -mindepth 1 -depth -type d -exec rmdir {} +")
    return not _exists(hierarchy)


def test_what_criu_made_in_hierarchies_that_nobody_mounted_goes_with_the_container(hierarchy: str) -> None:
    assert _exists(hierarchy)
    remove_cgroups(_NAME)
    _in_hierarchy(hierarchy, f"test ! -e .{cgroup(_NAME)} && test -d .{cgroup('another')}")
    remove_cgroups("another")
    _in_hierarchy(hierarchy, "test ! -e ckptfs*")


def test_one_that_ends_takes_nothing_from_another_that_begins(hierarchy: str) -> None:
    """A runtime makes what is above a container's cgroup step by step: none of that may be another's to remove."""
    remove_cgroups(_NAME)
    remove_cgroups("another")
    above = Path(cgroup("beginning")).parent
    _in_hierarchy(hierarchy, f"test -d .{above} && mkdir .{cgroup('beginning')}")
