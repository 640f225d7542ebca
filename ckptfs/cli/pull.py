"""ckptfs pull: the whole image as a directory, the eager way."""

import json
import logging
import time
from functools import partial
from pathlib import Path

import click

from ckptfs.cli.options import (
    configure_logging,
    make_settings,
    reference_argument,
    transfer_options,
    view_options,
)
from ckptfs.cli.output import tidy
from ckptfs.model.oci import Reference
from ckptfs.telemetry import NetworkCounters
from ckptfs.terminal import printable, size_text


@click.command(short_help="Fetch a whole image as files, the eager way.")
@reference_argument
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@view_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@transfer_options
@tidy
def pull(
    reference: Reference,
    directory: Path,
    view: str,
    base: Reference | None,
    as_json: bool,
    plain_http: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Fetch all of the image REF and write it to the new directory DIR, as it is mounted and as tar would unpack it.

    DIR appears when everything is there and has been verified. Owners and devices are those of the image for root
    only. The node's cache is neither used nor filled.

    \b
    ckptfs pull registry.example/app/ckpt:1 /var/tmp/ckpt
    ckptfs pull localhost:5000/counter:1 ./rootfs --view rootfs
    """
    configure_logging(verbose, quiet)
    if not verbose:  # what these report of a broken image ends the command, which says it again
        for name in ("engine.scan", "engine.disk", "image.opened"):
            logging.getLogger(f"ckptfs.{name}").setLevel(logging.CRITICAL)
    from ckptfs.cli.progress import Bars
    from ckptfs.pull import PullProgress
    from ckptfs.pull import pull as write
    from ckptfs.sources import open_source

    settings, counters, progress = make_settings(), NetworkCounters(), PullProgress()
    reach = partial(open_source, settings=settings, counters=counters, plain_http=plain_http)

    def amounts() -> dict[str, tuple[int, int]]:
        fetched = {"fetched": (min(counters.bytes, progress.image), progress.image)} if counters.bytes else {}
        return {**fetched, "written": (progress.written, progress.to_write)} if progress.to_write else fetched

    began = time.monotonic()
    with Bars(amounts, quiet=quiet):
        result = write(
            reach(reference),
            directory,
            reach,
            counters,
            view=view,  # type: ignore[arg-type]  # click has checked it
            base=base,
            settings=settings,
            progress=progress,
        )
    seconds = time.monotonic() - began
    if as_json:
        facts = {
            "reference": str(reference),
            "digest": str(result.digest),
            "view": view,
            "layout": result.layout,
            "directory": str(directory.absolute()),
            "files": result.files,
            "written": result.written,
            "image_bytes": result.image_bytes,
            "network": {"requests": counters.requests, "bytes": counters.bytes},
            "seconds": round(seconds, 3),
            "omitted": result.omitted,
            "left_out": result.left_out,
        }
        click.echo(json.dumps(facts, indent=2))
        return
    if quiet:
        return
    for sentence in result.left_out:
        click.echo(f"left out: {printable(sentence)}", err=True)
    if result.omitted > len(result.left_out):
        click.echo(f"left out: {result.omitted - len(result.left_out)} more", err=True)
    fetched = f"fetched {size_text(counters.bytes)} in {counters.requests} requests, " if counters.requests else ""
    click.echo(f"{fetched}wrote {result.files} files, {size_text(result.written)}, in {seconds:.1f} s", err=True)
