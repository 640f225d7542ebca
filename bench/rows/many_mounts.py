"""P10: bytes from the origin for eight mounts of one node, and for eight nodes behind a pull-through mirror.

The mounts of one node share its cache; a node is a cache of its own, told of the mirror (docker-registry as a proxy) by
its configuration. All are read at the same time, by processes of their own.
"""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from bench.lab import LOOPBACK, Image, Lab
from bench.rows import Row
from tests.support.command import mounted
from tests.support.docker_registry import DockerRegistry
from tests.support.tools import run

_MOUNTS = 8
_READ = """
import sys
from pathlib import Path
from ckptfs.bench.reading import replay, whole_files
replay(Path(sys.argv[1]), [(whole_files(Path(sys.argv[1])),)])
"""


def _measure(lab: Lab) -> None:
    image = lab.image(lab.sizes[0])
    one = _bytes_to_one_node(lab, image, 1)
    eager = {"peer": "8 × skopeo copy", "peer_value": _eager_bytes(lab, image) / one}
    found = [_bytes_to_one_node(lab, image, _MOUNTS) / one for _ in range(lab.few)]
    lab.figure("P10", "bytes from the origin, 8 mounts at once ÷ 1", found, "×", limit=1.05, **eager)
    found = [_bytes_to_the_mirror(lab, image, _MOUNTS) / one for _ in range(lab.few)]
    lab.figure("P10", "bytes from the origin, 8 nodes behind a mirror ÷ 1", found, "×", limit=1.1, **eager)


def _bytes_to_one_node(lab: Lab, image: Image, mounts: int) -> int:
    with lab.room() as room, lab.link(LOOPBACK) as link, ExitStack() as stack:
        cache = room / "cache"
        shown = [mounted(image.reference(link.address), room / str(number), cache=cache) for number in range(mounts)]
        _read_all([stack.enter_context(mount).path for mount in shown])
        fetched = link.stats().bytes_down
    lab.sample("P10", f"{mounts} mounts of a node", 0, {"megabytes": image.megabytes}, bytes=fetched)
    return fetched


def _bytes_to_the_mirror(lab: Lab, image: Image, nodes: int) -> int:
    with (
        lab.room() as room,
        lab.link(LOOPBACK) as link,
        DockerRegistry(proxy_of=f"http://{link.address}") as mirror,
        ExitStack() as stack,
    ):
        configuration = room / "ckptfs.toml"
        configuration.write_text(f'[mirrors]\n"{link.address}" = ["http://{mirror.host}"]\n')
        reference = image.reference(link.address)
        shown = [mounted(reference, room / str(number), "--config", configuration) for number in range(nodes)]
        _read_all([stack.enter_context(mount).path for mount in shown])
        fetched = link.stats().bytes_down
    lab.sample("P10", f"{nodes} nodes, mirror", 0, {"megabytes": image.megabytes}, bytes=fetched)
    return fetched


def _read_all(directories: list[Path]) -> None:
    readers = [subprocess.Popen([sys.executable, "-c", _READ, str(directory)]) for directory in directories]
    for reader in readers:
        if reader.wait(300):
            raise RuntimeError(f"reading a mount ended with {reader.returncode}")


def _eager_bytes(lab: Lab, image: Image) -> int:
    with lab.room() as room, lab.link(LOOPBACK) as link:
        for number in range(_MOUNTS):
            source = f"docker://{image.reference(link.address)}"
            run("skopeo", "copy", "--quiet", "--src-tls-verify=false", source, f"dir:{room}/{number}")
        fetched = link.stats().bytes_down
    lab.sample("P10", f"{_MOUNTS} × skopeo copy", 0, {"megabytes": image.megabytes}, bytes=fetched)
    return fetched


ROW = Row("P10", "Many mounts", _measure, ("criu", "skopeo"))
