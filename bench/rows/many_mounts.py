"""P10: bytes from the origin for eight mounts of one node that share its cache, all read at the same time."""

import subprocess
import sys
from contextlib import ExitStack

from bench.lab import LOOPBACK, Image, Lab
from bench.rows import Row
from tests.support.command import mounted
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
    one = _bytes(lab, image, 1)
    found = [_bytes(lab, image, _MOUNTS) / one for _ in range(lab.few)]
    eager = _eager_bytes(lab, image) / one
    name = "bytes from the origin, 8 mounts at once ÷ 1"
    lab.figure("P10", name, found, "×", limit=1.05, peer="8 × skopeo copy", peer_value=eager)


def _bytes(lab: Lab, image: Image, mounts: int) -> int:
    with lab.room() as room, lab.link(LOOPBACK) as link, ExitStack() as stack:
        paths = []
        for number in range(mounts):
            mount = mounted(image.reference(link.address), room / str(number), cache=room / "cache")
            paths.append(stack.enter_context(mount).path)
        readers = [subprocess.Popen([sys.executable, "-c", _READ, str(path)]) for path in paths]
        for reader in readers:
            if reader.wait(300):
                raise RuntimeError(f"a reader of {mounts} ended with {reader.returncode}")
        fetched = link.stats().bytes_down
    lab.sample("P10", f"{mounts} mounts", 0, {"megabytes": image.megabytes}, bytes=fetched)
    return fetched


def _eager_bytes(lab: Lab, image: Image) -> int:
    with lab.room() as room, lab.link(LOOPBACK) as link:
        for number in range(_MOUNTS):
            source = f"docker://{image.reference(link.address)}"
            run("skopeo", "copy", "--quiet", "--src-tls-verify=false", source, f"dir:{room}/{number}")
        fetched = link.stats().bytes_down
    lab.sample("P10", f"{_MOUNTS} × skopeo copy", 0, {"megabytes": image.megabytes}, bytes=fetched)
    return fetched


ROW = Row("P10", "Many mounts", _measure, ("criu", "skopeo"))
