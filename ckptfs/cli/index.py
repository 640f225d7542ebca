"""ckptfs index: what a lazy mount needs to know of an image that others pushed."""

import json
import threading
from typing import TYPE_CHECKING, Any

import click

from ckptfs.cli.options import RegistryOptions, configure_logging, reference_argument, registry_options
from ckptfs.errors import UsageError
from ckptfs.model.oci import Reference
from ckptfs.telemetry import NetworkCounters

if TYPE_CHECKING:
    from ckptfs.image.publishing import PublishedIndex


@click.command(short_help="Make somebody else's image as good to mount as ours.")
@reference_argument
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@registry_options
def index(
    reference: Reference,
    as_json: bool,
    registry: RegistryOptions,
    verbose: int,
    quiet: bool,
) -> None:
    """Make the image REF of somebody else as good to mount as one of ours: nothing of it is changed or pushed again.

    Streams each layer once (gzip, zstd, plain tar) and attaches to the image where its files and their bytes are:
    later mounts fetch only what is read and check every chunk. Needs the right to push to REF's repository.

    \b
    ckptfs index registry.example/app/ckpt:1
    ckptfs mount registry.example/app/ckpt:1 /mnt/ckpt
    """
    configure_logging(verbose, quiet)
    if reference.kind != "registry":
        raise UsageError(f"{reference} has no registry to keep an index", hint="name an image in a registry")
    from ckptfs.cli.progress import Bars
    from ckptfs.image.publishing import index_layers, publish_index
    from ckptfs.image.resolve import resolve
    from ckptfs.sources.upload import RegistryTarget

    settings, counters = registry.settings(), NetworkCounters()
    source = registry.reach(counters)(reference)
    cache = registry.open_cache()
    try:
        manifest = resolve(source, cache, settings.limits).manifest
        total, done, lock = sum(layer.size for layer in manifest.layers), 0, threading.Lock()

        def report(count: int) -> None:
            nonlocal done
            with lock:
                done += count

        with Bars(lambda: {"streamed": (done, total)}, quiet=quiet):
            documents = index_layers(source, manifest, settings, report)
        if not documents:
            published = None
        else:
            target = RegistryTarget(reference, settings, counters, plain_http=registry.plain_http)
            published = publish_index(target, manifest, documents)
    finally:
        cache.close()
    if as_json:
        click.echo(json.dumps(_facts(reference, str(manifest.digest), published), indent=2))
    elif published is None:
        click.echo(f"{reference} needs no index: every layer has a table of contents of its own", err=True)
    else:
        click.echo(f"{reference.host}/{reference.repository}@{published.manifest.digest}")


def _facts(reference: Reference, image: str, published: "PublishedIndex | None") -> dict[str, Any]:
    layers = published.layers if published is not None else {}
    return {
        "reference": str(reference),
        "image": image,
        "digest": str(published.manifest.digest) if published is not None else None,
        "layers": [{"layer": str(digest), "size": document.size} for digest, document in layers.items()],
        "sent": published.sent if published is not None else 0,
    }
