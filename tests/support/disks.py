"""Disks of a test's own: small ones, to be full."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.support.tools import require, run


@contextlib.contextmanager
def disk_of(path: Path, options: str) -> Iterator[Path]:
    """A file system in memory on the new directory `path`; options as of mount(8): "size=600k,mode=700"."""
    require("mount", root=True)
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", options, "tmpfs", path)
    try:
        yield path
    finally:
        run("umount", "-l", path)
