"""The demo: restore a checkpoint over a slow link before it has been pulled, next to pulling it first.

Owns the story and the timeline it prints. The registry, the images and criu are those of tests/support. Called by
scripts/demo, as root, after scripts/setup.
"""

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ckptfs.bench.link import ShapedLink, bits_per_second, seconds
from ckptfs.errors import UsageError
from tests.support.criu import Checkpoint, dump, restore, why_criu_does_not_work
from tests.support.docker_registry import DockerRegistry
from tests.support.images import ImageBuilder, extract, flat_layout
from tests.support.isolation import Isolation
from tests.support.workload import scratch, ticker

REPOSITORY = "demo/ticker"


@dataclass(frozen=True, slots=True)
class Timeline:
    """Seconds from the first command of a flow, and bytes that had come over the link."""

    ready: float  # criu can be started
    first_tick: float  # by the clock of the restored process
    bytes_at_first_tick: int
    resident: float  # every page is in memory
    bytes_at_end: int


@dataclass(frozen=True, slots=True)
class Scene:
    checkpoint: Checkpoint
    registry: DockerRegistry
    folder: Path
    rtt: float
    rate: float

    def link(self) -> ShapedLink:
        return ShapedLink(self.registry.host, rtt=self.rtt, rate=self.rate)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__.splitlines()[0], epilog="example: scripts/demo --rate 1Gbit"
    )
    parser.add_argument("--megabytes", type=int, default=256, help="memory of the process (default 256)")
    parser.add_argument("--rtt", type=seconds, default=0.020, help="round-trip time of the link (default 20ms)")
    parser.add_argument("--rate", type=bits_per_second, default=200e6, help="its bandwidth (default 200Mbit)")
    try:
        options = parser.parse_args()
    except UsageError as error:
        parser.error(str(error))
    if problem := _problem():
        print(f"demo: {problem}", file=sys.stderr)
        return 8
    signal.signal(signal.SIGTERM, _stop)
    flows: dict[str, Callable[[Scene, ShapedLink], Timeline]] = {
        "ckptfs, lazy pages": lambda scene, link: through_mount(scene, link, lazy=True),
        "ckptfs, plain": lambda scene, link: through_mount(scene, link, lazy=False),
        "pull, unpack, restore": eagerly,
    }
    with contextlib.ExitStack() as stack:
        scene, image_bytes = _prepare(stack, options)
        timelines = {}
        for name, flow in flows.items():
            say(f"{name} …")
            with scene.link() as link:
                timelines[name] = flow(scene, link)
        folder = scene.folder
    _print_table(timelines, image_bytes, options)
    if left := _left_behind(folder):
        print(f"demo: left behind: {left}", file=sys.stderr)
        return 1
    say("Nothing is left running or mounted.")
    return 0


def _prepare(stack: contextlib.ExitStack, options: argparse.Namespace) -> tuple[Scene, int]:
    """A checkpoint that is in the registry and nowhere else; returns it with its size there, in bytes."""
    folder = Path(stack.enter_context(scratch()))
    registry = stack.enter_context(DockerRegistry())
    say(f"A registry runs on {registry.host}; a process fills {options.megabytes} MB and ticks every 10 ms …")
    with ticker(folder, options.megabytes) as workload:
        checkpoint = dump(workload, folder / "images")
        say(f"criu dumped it: {megabytes(checkpoint.size)}, last tick {checkpoint.last_tick('ticker')}")
    layout = flat_layout(checkpoint.images, folder / "layout", name="ticker")
    with Isolation(folder / "storage") as isolation:
        builder = ImageBuilder(isolation, registry)
        builder.build(layout, "ticker")
        builder.push("ticker", REPOSITORY, "zstd:chunked")
    manifest: Any = registry.manifest(f"{REPOSITORY}:zstd-chunked")
    image_bytes = sum(layer["size"] for layer in manifest["layers"])
    for local in (checkpoint.images, layout, folder / "storage"):
        shutil.rmtree(local)
    say(f"buildah pushed it as zstd:chunked: {megabytes(image_bytes)}; the local copies are deleted")
    link = f"{options.rtt * 1000:g} ms, {options.rate / 1e6:g} Mbit/s"
    say(f"From here on the registry is behind a link of {link}. Restoring three times, each time cold:")
    return Scene(checkpoint, registry, folder, options.rtt, options.rate), image_bytes


def through_mount(scene: Scene, link: ShapedLink, *, lazy: bool) -> Timeline:
    """`ckptfs mount`, then criu from the mounted directory."""
    name = "lazy" if lazy else "plain"
    directory = scene.folder / f"mount-{name}"
    directory.mkdir()
    began = time.time()
    with mounted(f"{link.address}/{REPOSITORY}:zstd-chunked", directory, scene.folder / f"cache-{name}"):
        ready = time.time() - began
        images = directory / "checkpoint"
        with restore(scene.checkpoint, scene.folder / f"work-{name}", images=images, lazy=lazy) as restored:
            first = restored.first_tick().at - began
            fetched = link.stats().bytes_down
            resident = restored.wait_resident() - began if lazy else first
            total = link.stats().bytes_down
            restored.assert_continues()
    return Timeline(ready, first, fetched, resident, total)


def eagerly(scene: Scene, link: ShapedLink) -> Timeline:
    """skopeo copies the image, tar unpacks it, criu restores from disk."""
    began = time.time()
    images = extract(f"{link.address}/{REPOSITORY}:zstd-chunked", scene.folder / "eager") / "checkpoint"
    ready = time.time() - began
    with restore(scene.checkpoint, scene.folder / "work-eager", images=images) as restored:
        first = restored.first_tick().at - began
        fetched = link.stats().bytes_down
        restored.assert_continues()
    return Timeline(ready, first, fetched, first, fetched)


@contextlib.contextmanager
def mounted(reference: str, directory: Path, cache: Path) -> Iterator[None]:
    subprocess.run(["ckptfs", "mount", "--cache-dir", cache, reference, directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["ckptfs", "umount", directory], check=False)


def _print_table(timelines: dict[str, Timeline], image_bytes: int, options: argparse.Namespace) -> None:
    rows: dict[str, Callable[[Timeline], str]] = {
        "ready to restore": lambda line: f"{line.ready:.2f} s",
        "first tick": lambda line: f"{line.first_tick:.2f} s",
        "fetched by then": lambda line: f"{100 * line.bytes_at_first_tick / image_bytes:.1f} %",
        "everything resident": lambda line: f"{line.resident:.2f} s",
        "fetched in all": lambda line: megabytes(line.bytes_at_end),
    }
    print()
    print(f"{'':20}" + "".join(f"{name:>24}" for name in timelines))
    for title, cell in rows.items():
        print(f"{title:20}" + "".join(f"{cell(line):>24}" for line in timelines.values()))
    lazy, *_, eager = timelines.values()
    bound = image_bytes * 8 / options.rate if options.rate else 0.0
    print(f"\nThe link needs {bound:.2f} s for the {megabytes(image_bytes)} of the image.")
    print(f"With lazy pages the process ran {eager.first_tick / lazy.first_tick:.0f} times sooner than after a pull.\n")


def _left_behind(folder: Path) -> list[str]:
    """Mounts below the folder and processes that were started with it."""
    left = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            words = command.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            left += [words] if str(folder) in words else []
    return left


def _problem() -> str:
    if not Path("/dev/fuse").exists():
        return "no /dev/fuse, so nothing can be mounted (in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
    if why_not := why_criu_does_not_work():
        return f"{why_not}; scripts/setup says how to get one"
    return ""


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def say(text: str) -> None:
    print(text, flush=True)


def _stop(*_: object) -> NoReturn:
    sys.exit(143)  # unwinds: everything is ended and unmounted


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, TimeoutError, subprocess.SubprocessError) as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
