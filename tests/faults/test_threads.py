"""A limit on tasks (pids.max, ulimit -u) that leaves a mount no more threads for a while."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.support.tars import tar_of
from tests.support.tools import ROOT, require

SIZE = 16 << 20

# As another user, for the limit does not hold for root
SCRIPT = """
import os, resource, sys, threading
from random import Random

import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.image import ImageOptions, open_image
from ckptfs.model.oci import Reference
from ckptfs.sources import open_source
from ckptfs.settings import Settings
from ckptfs.telemetry import NetworkCounters

size, counters, wrong = int(sys.argv[2]), NetworkCounters(), []
data = Random(1).randbytes(size)

async def read(image, inode, at):
    if await image.read(inode, at, 1000) != data[at : at + 1000]:
        wrong.append(at)

async def main():
    source = open_source(Reference.parse(f"archive:{sys.argv[1]}"), settings=Settings(), counters=counters)
    options = ImageOptions(view="raw", prefetch=False, background=False)
    with ChunkCache.ephemeral() as cache:
        async with open_image(source, cache, options, counters) as image:
            node = await image.find(b"file")
            os.setuid(54321)
            resource.setrlimit(resource.RLIMIT_NPROC, (1, 1000))
            try:
                threading.Thread(target=print).start()
                sys.exit("there are threads")
            except RuntimeError:
                pass
            async with trio.open_nursery() as nursery:
                for at in range(0, size, size // 32):
                    nursery.start_soon(read, image, node.inode, at)
                await trio.sleep(0.5)
                resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))

trio.run(main)
print(wrong)
"""


@pytest.mark.row("L1")
def test_reads_wait_for_threads(tmp_path: Path) -> None:
    require(root=True)
    archive = tmp_path / "archive.tar"
    archive.write_bytes(tar_of({"file": Random(1).randbytes(SIZE)}))
    command = [sys.executable, "-c", SCRIPT, str(archive), str(SIZE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and "waiting for one" in done.stderr
