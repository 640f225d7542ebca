"""P11: bytes fetched, and sent, for the next checkpoint of a process whose earlier one this node has read.

The measure is the compressed size of the pages that changed: those of the second dump that the first does not have at
the same address, one after another, as one zstd stream of level 3. Peers fetch and send the second image whole. It is
pushed in two ways: as any image, and with --parent; then the peer has all of its layers to fetch.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import zstandard

from bench.flows import read_all, status_of
from bench.lab import LOOPBACK, Lab, heap
from bench.rows import Row
from ckptfs.criu.pagemap import parse_pagemap
from tests.support.command import mounted
from tests.support.criu import dump
from tests.support.images import flat_layout
from tests.support.workload import Workload, ticker

_PAGE = 4096
_APART = 1.0  # seconds between the dumps
_WORDS = {"whole": "whole", "--parent": "with --parent"}
_SETTLING = 3.0  # and of a mount after it has been read: what is left comes, what has come is written


def _ticking(folder: Path, megabytes: int) -> Workload:
    """Changes 4 neighbouring pages in each tick: about 400 in a second."""
    return ticker(folder, megabytes, dirty=4)


_PROCESSES: dict[str, Callable[[Path, int], AbstractContextManager[Workload]]] = {
    "static process": _ticking,
    "Python with a heap": heap,
}


def _measure(lab: Lab) -> None:
    for name, start in _PROCESSES.items():
        _two_checkpoints(lab, name, start)


def _two_checkpoints(lab: Lab, name: str, start: Callable[[Path, int], AbstractContextManager[Workload]]) -> None:
    with lab.room() as room:
        with start(room, lab.sizes[0]) as running:
            dump(running, room / "one", keep_running=True)
            time.sleep(_APART)
            dump(running, room / "two", keep_running=True)
        changed = b"".join(changed_pages(room / "one", room / "two"))
        least = len(zstandard.compress(changed, 3))
        note = f"{len(changed) // _PAGE} pages changed, {least / 1e6:.2f} MB compressed"
        layouts = [flat_layout(room / which, room / f"{which}-layout", name="increment") for which in ("one", "two")]
        for way in ("whole", "--parent"):
            repository = f"bench/increment-{name.split()[0].lower()}-{way.strip('-')}"
            sent = _publish(lab, layouts, repository, on_top=way == "--parent")
            fetched, image_bytes = _fetched(lab, room / way, repository)
            facts = {"changed": len(changed), "changed_compressed": least, "fetched": fetched, "sent": sent}
            conditions = {**LOOPBACK.conditions, "megabytes": lab.sizes[0]}
            lab.sample("P11", f"{name}, {way}", 0, conditions, image=image_bytes, **facts)
            options = {"limit": 1.5, "peer": "the whole image", "peer_value": image_bytes / least, "note": note}
            for what, amount in (("fetched", fetched), ("sent", sent)):
                words = f"{what} for the next checkpoint ÷ changed pages, {name}, pushed {_WORDS[way]}"
                lab.figure("P11", words, [amount / least], "×", **options)


def _publish(lab: Lab, layouts: list[Path], repository: str, *, on_top: bool) -> int:
    """Bytes that the second of two checkpoints sends."""
    lab.publish(layouts[0], f"{repository}:one")
    parent = ("--parent", lab.registry.reference(f"{repository}:one")) if on_top else ()
    _, sent = lab.publish(layouts[1], f"{repository}:two", *parent)
    return sent


def _fetched(lab: Lab, room: Path, repository: str) -> tuple[int, int]:
    """Body bytes that reading all of the second image takes, and the size of its layers."""
    for which in ("one", "two"):
        reference = lab.registry.reference(f"{repository}:{which}")
        with mounted(reference, room / f"mount-{which}", cache=room / "cache") as mount:
            read_all(mount.path)
            time.sleep(_SETTLING)
            status = status_of(mount)
    return status["network"]["bytes"], status["image_bytes"]


def changed_pages(before: Path, after: Path) -> Iterator[bytes]:
    """Pages of the dump `after` that the dump `before` does not have with the same contents at the same address."""
    for pagemap in sorted(after.glob("pagemap-*.img")):
        earlier = dict(_pages(before / pagemap.name)) if (before / pagemap.name).exists() else {}
        for address, page in _pages(pagemap):
            if earlier.get(address) != page:
                yield page


def _pages(path: Path) -> Iterator[tuple[int, bytes]]:
    pagemap = parse_pagemap(path.read_bytes(), path.name)
    pages = path.parent / pagemap.file
    if not pages.exists():
        return
    with pages.open("rb") as file:
        for run_of_pages in pagemap.placed(_PAGE):
            for at in range(0, run_of_pages.length, _PAGE):
                yield run_of_pages.vaddr + at, file.read(_PAGE)


ROW = Row("P11", "The next checkpoint of a process", _measure, ("criu", "skopeo"))
