"""Images for commands that need no mount: opened through the node's cache, nothing fetched ahead, progress, figures.

Owns the event loop of such a command and what it tells of the traffic. Imports trio and the image only when a command
runs.
"""

import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptfs.cli.options import F, RegistryOptions, configure_logging, registry_options, verify_option
from ckptfs.cli.progress import Line
from ckptfs.errors import only_error
from ckptfs.model.oci import Reference
from ckptfs.telemetry import NetworkCounters
from ckptfs.terminal import size_text

if TYPE_CHECKING:
    from rich.console import Console

    from ckptfs.image import OpenImage

T = TypeVar("T")

_PIPE_WIDTH = 10_000


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a command had to fetch.

    image_bytes  compressed bytes of the layers, of all its images together.
    round_trips  requests that had to follow one another, of the first 256 (telemetry.py).
    """

    fetched_bytes: int
    image_bytes: int
    requests: int
    round_trips: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    def sentence(self) -> str:
        of = f"{size_text(self.fetched_bytes)} of {size_text(self.image_bytes)}"
        return f"fetched {of} in {self.requests} request{'' if self.requests == 1 else 's'}"


def image_options(function: F) -> F:
    """What commands that open an image take."""
    offline = click.option("--offline", is_flag=True, help="Send nothing; use only what the node's cache has.")
    return offline(verify_option(registry_options(function)))


def with_image(reference: Reference, work: Callable[["OpenImage"], Awaitable[T]], **options: Any) -> T:
    """Open the image and run `work(image)`; `options` are those of `image_options`, `view` and `base`."""

    async def only(images: "Sequence[OpenImage]") -> T:
        return await work(images[0])

    return with_images([reference], only, increments=True, **options)[0]


def with_images(
    references: Sequence[Reference],
    work: "Callable[[Sequence[OpenImage]], Awaitable[T]]",
    *,
    registry: RegistryOptions,
    progress: Line | None = None,
    increments: bool = False,
    only_checkpoints: bool = False,
    **options: Any,
) -> tuple[T, Traffic]:
    """Open the images, nothing fetched ahead, run `work(images)`.

    progress    for `work` that prints: it calls `printing` before.
    increments  use what the node has of earlier images; saves nothing where few pages are read.
    only_checkpoints  FormatError where one of them is none.
    """
    configure_logging(options["verbose"], options["quiet"])
    import trio

    from ckptfs.hardening import keep_memory_private
    from ckptfs.image import ImageOptions, open_image
    from ckptfs.sources import Source
    from ckptfs.sources.early import EarlySource

    keep_memory_private()
    counters, shown = NetworkCounters(), progress or Line(quiet=options["quiet"])
    images: list[OpenImage] = []
    reach = registry.reach(counters)

    def sources() -> list[Source]:
        """Several images are resolved at the same time, unless the node's cache may know them."""
        early = len(references) > 1 and not options["offline"]
        return [EarlySource(reach(r)) if early and r.digest is None else reach(r) for r in references]

    wanted = ImageOptions(
        view=options.get("view", "checkpoint"),
        base=options.get("base"),
        offline=options["offline"],
        strict=options["verify"] == "strict",
        prefetch=False,
        background=False,
        increments=increments,
        only_checkpoints=only_checkpoints,
        settings=registry.settings(),
    )
    cache = registry.open_cache()

    def fetched() -> str:
        total = sum(image.image_bytes for image in images)
        return f"fetched {size_text(counters.bytes)} of {size_text(total) if total else 'the image'}"

    async def run() -> tuple[T, Traffic]:
        async with AsyncExitStack() as stack:
            for source in sources():
                image = await stack.enter_async_context(open_image(source, cache, wanted, counters, reach))
                images.append(image)
                await image.ready()
            return await work(images), _traffic(images, counters)

    shown.text = fetched
    try:
        with shown:
            return trio.run(run)
    except BaseExceptionGroup as group:
        raise only_error(group) from None
    finally:
        cache.close()


def _traffic(images: "Sequence[OpenImage]", counters: NetworkCounters) -> Traffic:
    resolved = [image.resolved for image in images]
    size = sum(blob.size for image in resolved for blob in (*image.manifest.layers, *image.loose_blobs))
    return Traffic(counters.bytes, size, counters.requests, counters.round_trips(math.inf))


def console() -> "Console":
    """Where results for people go. A pipe has no width: lines are not broken there."""
    from rich.console import Console

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise  # what rich is handling: it would exit with the code of a bug

    return Ours(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def say_traffic(traffic: Traffic, quiet: bool) -> None:
    """The last line of a command for people; on stderr, it is not a part of what was asked."""
    if not quiet:
        click.echo(traffic.sentence(), err=True)
