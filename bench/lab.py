"""What is measured, made once and on first use: criu dumps of real processes, as images in a real registry.

Owns the registry, the images, the folders of each run, and what "cold" means. Called by the rows; flows.py measures.
"""

import contextlib
import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.quiet import forget_files
from ckptfs.bench.link import ShapedLink
from ckptfs.bench.results import Absent, Conditions, Fact, Figure, ResultFile, Sample, figure
from tests.support.command import ckptfs
from tests.support.criu import Checkpoint, dump
from tests.support.docker_registry import DockerRegistry
from tests.support.images import ImageBuilder, flat_layout
from tests.support.isolation import Isolation
from tests.support.workload import Workload, process_tree, ticker

HEAP = Path(__file__).parent / "workloads" / "heap.py"
_TOUCHED = 200  # pages of a ticker's working set


@dataclass(frozen=True, slots=True)
class LinkShape:
    """Of a link: `rtt` in seconds, `rate` in bits per second (0: no cap)."""

    rtt: float = 0.020
    rate: float = 200e6

    @property
    def conditions(self) -> dict[str, float]:
        return {"rtt_ms": self.rtt * 1000, "mbit": self.rate / 1e6}


SLOW = LinkShape()  # what a figure means by "link"
LOOPBACK = LinkShape(0, 0)


@dataclass(frozen=True, slots=True)
class Image:
    """A checkpoint in the registry. `compressed` and `plain` are the bytes of its layers and of its files."""

    name: str
    megabytes: int
    checkpoint: Checkpoint
    repository: str  # with the tag
    digest: str
    compressed: int
    plain: int

    def reference(self, host: str) -> str:
        return f"{host}/{self.repository}"

    def pinned(self, host: str) -> str:
        return f"{host}/{self.repository.rpartition(':')[0]}@{self.digest}"


class Lab:
    """One run of the benchmark. `sizes`: megabytes of the processes, ascending; `runs`: how often quick flows run."""

    def __init__(self, folder: Path, results: ResultFile, stack: ExitStack, *, quick: bool) -> None:
        self.folder = folder
        self.results = results
        self.quick = quick
        self.sizes = (64, 256) if quick else (64, 256, 1024, 4096)
        self.standard = 256
        self.large = 256 if quick else 1024  # where start-up should not count
        self.runs = 3 if quick else 7
        self.few = 1 if quick else 3
        self.registry: DockerRegistry = stack.enter_context(DockerRegistry())
        self._stack = stack
        self._made: dict[tuple[str, int], Image] = {}
        self._conventional: set[str] = set()
        self._numbers = itertools.count(1)

    @functools.cached_property
    def isolation(self) -> Isolation:
        return self._stack.enter_context(Isolation(self.folder / "storage"))

    @functools.cached_property
    def builder(self) -> ImageBuilder:
        """buildah and skopeo, for images that others make."""
        return ImageBuilder(self.isolation, self.registry)

    # -- images --------------------------------------------------------------------------------------------------------

    def image(self, megabytes: int | None = None, workload: str = "ticker") -> Image:
        """A dumped process of that size, pushed by ckptfs; `workload` is one of WORKLOADS."""
        size = self.standard if megabytes is None else megabytes
        if (workload, size) not in self._made:
            self.say(f"  dumping and pushing {workload} of {size} MB …")
            room = self.folder / f"{workload}-{size}"
            room.mkdir()
            with WORKLOADS[workload](room, size) as running:
                checkpoint = dump(running, room / "images")
            layout = flat_layout(checkpoint.images, room / "layout", name=workload)
            self._made[workload, size] = self.push(layout, f"bench/{workload}:{size}", checkpoint, size)
            shutil.rmtree(checkpoint.images)
            shutil.rmtree(layout)
        return self._made[workload, size]

    def push(self, layout: Path, repository: str, checkpoint: Checkpoint, megabytes: int) -> Image:
        """The image that `ckptfs push` makes of a checkpoint's directory, in the registry."""
        plain = sum(path.stat().st_size for path in layout.rglob("*") if path.is_file())
        digest, _ = self.publish(layout, repository)
        manifest: Any = self.registry.manifest(repository)
        compressed = sum(layer["size"] for layer in manifest["layers"])
        return Image(repository, megabytes, checkpoint, repository, digest, compressed, plain)

    def conventional(self, repository: str, compression: str = "zstd") -> str:
        """The same image as podman, buildah and skopeo push it ("zstd" or "gzip"), which is what an eager flow pulls.

        They write a stream for each layer. In place of ours, whose pages files have a frame for each 16 KiB, tar takes
        5.9 instead of 9.3 s for 1 GB: zstd's command hands every frame over to another thread.
        """
        name, _, tag = repository.rpartition(":")
        other = f"{name}-{compression}:{tag}"
        if other not in self._conventional:
            ours, theirs = (f"docker://{self.registry.reference(each)}" for each in (repository, other))
            with self.room() as room:
                for options in (
                    ("--src-tls-verify=false", "--dest-decompress", ours, f"dir:{room}/plain"),
                    ("--dest-tls-verify=false", "--dest-compress-format", compression, f"dir:{room}/plain", theirs),
                ):
                    self.isolation.forget_blobs()
                    self.isolation.run("skopeo", "copy", "--quiet", *options, timeout=900)
            self._conventional.add(other)
        return other

    def publish(self, layout: Path, repository: str, *options: str) -> tuple[str, int]:
        """`ckptfs push`: the manifest's digest, and how many bytes went to the registry."""
        reference = self.registry.reference(repository)
        done = ckptfs("push", layout, reference, "--json", "--work-dir", self.folder, *options, timeout=900)
        if done.code:
            raise RuntimeError(done.err)
        return done.json["digest"], done.json["sent"]

    # -- places --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def room(self) -> Iterator[Path]:
        """A new folder, removed afterwards."""
        folder = self.folder / f"run-{next(self._numbers)}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def link(self, shape: LinkShape) -> ShapedLink:
        """In front of the registry."""
        return ShapedLink(self.registry.host, rtt=shape.rtt, rate=shape.rate)

    def cold(self, repository: str) -> None:
        """The kernel forgets all files; then what a node and a registry in use have in memory is read again.

        That is the programs of both ways, and the image's blobs in the registry: its disk is not what is measured.
        """
        forget_files()
        for command in ((sys.executable, "-c", _WARM_CKPTFS), ("criu", "--version"), ("skopeo", "--version")):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for command in (("tar", "--version"), ("zstd", "--version")):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        manifest: Any = self.registry.manifest(repository)
        for layer in manifest["layers"]:
            digest = layer["digest"].partition(":")[2]
            blob = self.registry.storage / "docker/registry/v2/blobs/sha256" / digest[:2] / digest / "data"
            with blob.open("rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass

    # -- results -------------------------------------------------------------------------------------------------------

    def add(self, fact: Fact) -> None:
        self.results.add(fact)
        if isinstance(fact, Figure):
            self.say(f"  {describe(fact)}")
        elif isinstance(fact, Absent):
            self.say(f"  not measured: {fact.why}")

    def sample(self, row: str, flow: str, number: int, conditions: Conditions, **values: float) -> None:
        self.add(Sample(row, flow, number, conditions, values))

    def figure(self, row: str, name: str, values: list[float], unit: str, **options: Any) -> Figure:
        """Records and returns the median."""
        found = figure(row, name, values, unit, **options)
        self.add(found)
        return found

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def heap(folder: Path, megabytes: int) -> Workload:
    """A Python process, by the interpreter that runs the benchmark."""
    program = folder / "heap"
    program.write_text(f"#!{sys.executable}\n{HEAP.read_text()}")
    program.chmod(0o755)
    return Workload(program, folder, ("heap",), str(megabytes))


def _ticker(folder: Path, megabytes: int) -> Workload:
    return ticker(folder, megabytes, set=_TOUCHED)


def _toucher(folder: Path, megabytes: int) -> Workload:
    """Reads a page at random every 10 ms: more at once would only add up their waits."""
    return ticker(folder, megabytes, touch=1)


WORKLOADS: dict[str, Callable[[Path, int], AbstractContextManager[Workload]]] = {
    "ticker": _ticker,
    "scattered": _ticker,
    "toucher": _toucher,
    "tree": process_tree,
    "heap": heap,
}

_WARM_CKPTFS = (
    "import ckptfs.cli.mount, ckptfs.daemon.mounting, ckptfs.daemon.serve_image, ckptfs.sources.registry, ckptfs.layers"
)


def describe(fact: Figure) -> str:
    """One line for a terminal."""
    hold = "" if fact.limit is None else f" (hold {'≥' if fact.least else '≤'} {fact.limit:g})"
    verdict = {True: "ok", False: "MISSED", None: ""}[fact.held]
    peer = "" if fact.peer_value is None else f"; {fact.peer}: {fact.peer_value:.3g}"
    return f"{fact.row} {fact.name}: {fact.value:.3g} {fact.unit}{hold} {verdict}{peer}".rstrip()


def environment() -> None:
    """Processes of the benchmark find the package wherever they are started."""
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), *os.environ.get("PYTHONPATH", "").split(":")]
    os.environ["PYTHONPATH"] = ":".join(dict.fromkeys(path for path in paths if path))
