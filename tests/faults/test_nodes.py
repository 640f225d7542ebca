"""Row P10 of the product's figures, its second half: nodes behind a pull-through mirror ask the registry once.

Network namespaces are the nodes, docker-registry is the registry and, as a proxy of it, the mirror; what leaves the
registry's node is counted by the kernel.
"""

import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from ckptfs.settings import MiB, Registries, Timeouts
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import FakeRegistry
from tests.support.faulty import TAR, Record
from tests.support.nodes import Node, Nodes
from tests.support.sources import client, copy_image
from tests.support.tars import member
from tests.support.tools import require

pytestmark = [pytest.mark.fuse, pytest.mark.registry]

NODES = 8
SIZE = 128 * MiB
RATE = "500mbit"


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    require("ip", "tc", "nsenter", "docker-registry", "fusermount3", root=True)
    with Nodes() as nodes:
        yield nodes


def fetched_by(nodes: Nodes, count: int, folder: Path) -> int:
    """Bytes that leave the registry when `count` nodes mount the image at the same time and read all of it."""
    with ExitStack() as stack:
        home, relay = nodes.add(), nodes.add()
        registry = stack.enter_context(DockerRegistry(node=home))
        mirror = stack.enter_context(DockerRegistry(node=relay, proxy_of=f"http://{registry.host}"))
        with FakeRegistry() as fake, client(fake) as source:
            pages = Random(8).randbytes(SIZE)
            parts = [member(b"config.dump", b"{}"), member(b"checkpoint/pages-1.img", pages), bytes(1024)]
            fake.add_image("repo", "latest", [(TAR, b"".join(parts))])
            plain = Registries(plain_http=frozenset({registry.host}))
            with client(registry.host, timeouts=Timeouts(), registries=plain) as target:
                copy_image(source, target)
        config = folder / "config.toml"
        mirrors = f'[mirrors]\n"{registry.host}" = ["http://{mirror.host}"]\n'
        config.write_text(f'plain_http = ["{registry.host}"]\n{mirrors}')
        home.limit(RATE)
        readers = [nodes.add() for _ in range(count)]
        before = home.sent_bytes()
        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(lambda node: read_all(node, registry.host, config, folder), readers))
        assert found == [hashlib.sha256(pages).hexdigest()] * count
        return home.sent_bytes() - before


def read_all(node: Node, host: str, config: Path, folder: Path) -> str:
    """The digest of the pages, as `node` sees them."""
    target = folder / node.name
    target.mkdir()
    command = [sys.executable, "-m", "ckptfs"]
    try:
        cache = ["--cache-dir", folder / f"{node.name}-cache"]
        node.run(*command, "mount", f"{host}/repo:latest", target, "--config", config, *cache)
        digest = hashlib.sha256()
        with (target / "checkpoint" / "pages-1.img").open("rb") as file:
            while piece := file.read(1 * MiB):
                digest.update(piece)
        return digest.hexdigest()
    finally:
        node.run(*command, "umount", target)


@pytest.mark.row("P10")
def test_nodes_behind_a_mirror_ask_the_registry_once(nodes: Nodes, tmp_path: Path, record_property: Record) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    one = fetched_by(nodes, 1, tmp_path / "one")
    many = fetched_by(nodes, NODES, tmp_path / "many")
    of_image = f"{one / SIZE:.2f} x the image, headers included"
    record_property("figure", f"{NODES} nodes at once, cold mirror: {many / one:.2f} x one node ({of_image})")
    assert many <= 1.1 * one
