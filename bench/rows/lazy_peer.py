"""A lazy peer that can be installed: ratarmount, which mounts the layer's tar from the registry's own HTTP address.

It can read a remote archive in pieces only where that is not compressed, so its image is the same checkpoint, pushed
uncompressed. It knows no registries: the address of the blob is looked up for it before the clock starts. Its figures
are compared with those of P2 and P3.
"""

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.lab import SLOW, Image, Lab
from bench.rows import Row
from tests.support.criu import restore
from tests.support.images import extract
from tests.support.tools import end, run, start, wait_for

_REPOSITORY = "bench/uncompressed:uncompressed"
_LAZY, _PLAIN = "ratarmount, lazy pages", "ratarmount, plain restore"


def _measure(lab: Lab) -> None:
    image = lab.image()
    blob = _uncompressed(lab, image)
    conditions = {**SLOW.conditions, "megabytes": image.megabytes}
    for flow, lazy in ((_LAZY, True), (_PLAIN, False)):
        ticks = []
        for number in range(lab.few):
            values = _restore(lab, image, blob, lazy=lazy)
            ticks.append(values["first_tick"])
            lab.sample("P2" if lazy else "P3", flow, number, conditions, **values)
        lab.figure("peer", f"{flow}: mount to first tick", ticks, "s")


def _uncompressed(lab: Lab, image: Image) -> str:
    """The path of the only layer's blob, with the same files as the image."""
    repository = _REPOSITORY.partition(":")[0]
    with lab.room() as room:
        lab.builder.build(extract(image.reference(lab.registry.host), room / "copy"), "uncompressed")
        lab.builder.push("uncompressed", repository, "uncompressed")
    manifest: Any = lab.registry.manifest(_REPOSITORY)
    (layer,) = manifest["layers"]
    return f"/v2/{repository}/blobs/{layer['digest']}"


def _restore(lab: Lab, image: Image, blob: str, *, lazy: bool) -> dict[str, float]:
    with ExitStack() as stack:
        room = stack.enter_context(lab.room())
        link = stack.enter_context(lab.link(SLOW))
        lab.cold(_REPOSITORY)
        run("ratarmount", "--version")
        began = time.time()
        directory = stack.enter_context(_mounted(f"http://{link.address}{blob}", room / "mnt"))
        ready = time.time() - began
        images = directory / "checkpoint"
        restored = stack.enter_context(restore(image.checkpoint, room / "work", images=images, lazy=lazy))
        first = restored.first_tick(patience=300).at - began
        fetched = link.stats().bytes_down
        resident = restored.wait_resident(patience=300) - began if lazy else first
        everything = link.stats().bytes_down
    return {
        "ready": ready,
        "first_tick": first,
        "resident": resident,
        "bytes_at_first_tick": fetched,
        "bytes": everything,
    }


@contextmanager
def _mounted(address: str, target: Path) -> Iterator[Path]:
    target.mkdir()
    # In the foreground: the connection that it has opened does not survive its way into the background.
    daemon = start("ratarmount", "--foreground", "--index-file", ":memory:", address, target, stderr=subprocess.DEVNULL)
    try:
        wait_for("ratarmount", target.is_mount, patience=300, step=0.002)
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)
        end(daemon)


ROW = Row("peer", "A lazy peer: ratarmount over HTTP", _measure, ("criu", "buildah", "skopeo", "ratarmount"))
