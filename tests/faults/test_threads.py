"""A limit on tasks (pids.max, ulimit -u) that leaves a mount no more threads for a while."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import pytest
import zstandard

from tests.support.tars import tar_of
from tests.support.tools import ROOT, require

SIZE = 16 << 20

# As another user, for the limit does not hold for root
HEAD = """
import os, resource, sys, threading
from random import Random

import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.image import ImageOptions, open_image
from ckptfs.model.oci import Reference
from ckptfs.sources import open_source
from ckptfs.settings import Settings
from ckptfs.telemetry import NetworkCounters

counters, archive = NetworkCounters(), Reference.parse(f"archive:{sys.argv[1]}")

def reach(reference):
    return open_source(reference, settings=Settings(), counters=counters)

def limit():
    os.setuid(54321)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1000))
    try:
        threading.Thread(target=print).start()
        sys.exit("there are threads")
    except RuntimeError:
        pass

async def lift():
    await trio.sleep(0.5)
    resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))
"""

READS = """
size, wrong = int(sys.argv[2]), []
data = Random(1).randbytes(size)

async def read(image, inode, at):
    if await image.read(inode, at, 1000) != data[at : at + 1000]:
        wrong.append(at)

async def main():
    options = ImageOptions(view="raw", prefetch=False, background=False)
    with ChunkCache.ephemeral() as cache:
        async with open_image(reach(archive), cache, options, counters) as image:
            node = await image.find(b"file")
            limit()
            async with trio.open_nursery() as nursery:
                for at in range(0, size, size // 32):
                    nursery.start_soon(read, image, node.inode, at)
                nursery.start_soon(lift)

trio.run(main)
print(wrong)
"""

BASE = """
from ckptfs.image.rootfs import base_directories

async def main():
    options = ImageOptions(view="raw", prefetch=False, background=False)
    with ChunkCache.ephemeral() as cache:
        async with open_image(reach(archive), cache, options, counters) as image:
            await image.find(b"file")
            await trio.sleep(0.1)
            busy = threading.Event()
            async with trio.open_nursery() as nursery:
                for _ in range(16):  # those that wait for work are taken as well
                    nursery.start_soon(trio.to_thread.run_sync, busy.wait)
                await trio.sleep(0.1)
                limit()
                nursery.start_soon(lift)
                try:
                    base = await base_directories(image, reach, archive)
                finally:
                    busy.set()
            print(base.find(b"file").inode.size, image.errors)

trio.run(main)
"""


OPEN = """
async def names(cache):
    async with open_image(reach(archive), cache, options, counters) as image:
        return [node.name for node in await image.listing(image.tree.root)]

async def main():
    with ChunkCache.ephemeral() as cache:
        await names(cache)  # what is needed for it is imported
    await trio.sleep(0.1)
    busy = threading.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(trio.to_thread.run_sync, busy.wait)
        await trio.sleep(0.1)
        await trio.to_thread.run_sync(len, "")  # one that waits for work
        limit()
        try:
            with ChunkCache.ephemeral() as cache:
                print(await names(cache))
        finally:
            busy.set()

options = ImageOptions(view="raw", prefetch=False, background=False)
trio.run(main)
"""


@pytest.mark.row("L1")
def test_reads_wait_for_threads(tmp_path: Path) -> None:
    require(root=True)
    archive = tmp_path / "archive.tar"
    archive.write_bytes(tar_of({"file": Random(1).randbytes(SIZE)}))
    command = [sys.executable, "-c", HEAD + READS, str(archive), str(SIZE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and "waiting for one" in done.stderr


@pytest.mark.row("L1")
@pytest.mark.parametrize(
    ("script", "name", "told", "said"),
    [
        (BASE, "archive.tar", "1000 []", "waiting for one"),  # which is when somebody looks into the delta
        (OPEN, "archive.tar.zst", "[b'file']", "is not used: can't start new thread"),
    ],
    ids=["the base of a delta", "an index of a layer"],
)
def test_images_are_opened_with_few_threads(script: str, name: str, told: str, said: str) -> None:
    require(root=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        archive, data = Path(folder) / name, tar_of({"file": bytes(1000)})
        archive.write_bytes(zstandard.compress(data) if name.endswith(".zst") else data)
        command = [sys.executable, "-c", HEAD + script, str(archive)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, told + "\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and said in done.stderr
