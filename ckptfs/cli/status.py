"""ckptfs status."""

import functools
import json
import math
from typing import Any

import click

from ckptfs.cli.options import complete_mounts, configure_logging, verbosity_options
from ckptfs.errors import UsageError
from ckptfs.redaction import redact
from ckptfs.terminal import printable, size_text


def _require_number(_: click.Context, __: click.Parameter, value: float) -> float:
    """ "nan" is a float that is in every range."""
    if math.isnan(value):
        raise click.BadParameter("nan is no number of seconds")
    return value


@click.command()
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(), shell_complete=complete_mounts)
@click.option("--json", "as_json", is_flag=True, help="One JSON object for DIR, a list without; a line with --watch.")
@click.option("--prometheus", is_flag=True, help="Prometheus' text format, for a textfile collector.")
@click.option("--watch", is_flag=True, help="Show it alive until q, Ctrl-C, or DIR is unmounted.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    callback=_require_number,
    default=1.0,
    show_default=True,
    help="Seconds between two looks of --watch.",
)
@verbosity_options
def status(
    directory: str | None, as_json: bool, prometheus: bool, watch: bool, interval: float, verbose: int, quiet: bool
) -> None:
    """What each mount has fetched, served and is waiting for.

    \b
    ckptfs status
    ckptfs status /mnt/ckpt --watch
    ckptfs status /mnt/ckpt --json
    ckptfs status --prometheus > /var/lib/node_exporter/ckptfs.prom
    """
    configure_logging(verbose, quiet)
    if prometheus and (watch or as_json):
        raise UsageError("--prometheus goes with neither --watch nor --json", hint="give one of them")
    from ckptfs.daemon.asking import statuses

    if watch:
        from ckptfs.cli.watch import watch as show_alive

        look = functools.partial(statuses, directory, detail=True)
        show_alive(look, interval, as_json=as_json, only=directory is not None)
        return
    found = statuses(directory, detail=not (as_json or prometheus))
    if prometheus:
        from ckptfs.control.exposition import exposition

        click.echo(exposition(found), nl=False)
    elif as_json:
        click.echo(json.dumps(found[0] if directory is not None else found, indent=2))
    else:
        for facts in found:
            _show(facts)
        if not found:
            click.echo("no mounts")


def _show(facts: dict[str, Any]) -> None:
    if "state" in facts:
        click.echo("  ".join(printable(facts.get(name, "")) for name in ("mountpoint", "reference", "state")))
        return
    network, reads = facts["network"], facts["reads"]
    click.echo(f"{printable(facts['mountpoint'])}  {printable(facts['reference'])}")
    for image in facts.get("images", ()):  # of a layer store
        size, users = size_text(image["image_bytes"]), image["users"]
        click.echo(f"  image    {image['reference']} ({image['layers']} layers, {size}, {users} users)")
    if facts["digest"]:
        share = 100 * facts["cached_bytes"] // facts["image_bytes"] if facts["image_bytes"] else 100
        click.echo(f"  digest   {facts['digest']} ({facts['view']} view, verified by {facts['verify']})")
        click.echo(f"  cached   {size_text(facts['cached_bytes'])} of {size_text(facts['image_bytes'])} ({share} %)")
    click.echo(
        f"  network  {size_text(network['bytes'])} in {network['requests']} requests, "
        f"{network['retries']} retries, {network['in_flight']} under way"
    )
    click.echo(
        f"  reads    {reads['count']} ({size_text(reads['bytes'])}), {reads['misses']} waited, "
        f"median {reads['wait_ms_p50']:.1f} ms, {reads['waiting']} waiting now"
    )
    for read in facts["reading"]:
        if read["wait_ms"] is not None:
            who = f" ({safe(read['command'])} {read['pid']})" if read["pid"] else ""
            click.echo(f"  waiting  {place_of(read)}{who} for {read['wait_ms'] / 1000:.2f} s")
    if facts["metrics"]:
        click.echo(f"  metrics  http://{facts['metrics']}/metrics")
    for error in facts["errors"][-3:]:
        click.echo(f"  error    {safe(error)}")


def place_of(read: dict[str, Any]) -> str:
    """File, offset and length of one of a status' `reading`."""
    return f"{safe(read['path'])} at {read['offset']} ({size_text(read['length'])})"


def safe(text: str) -> str:
    """Names come out of images: nothing in them acts on a terminal, and all of them can be printed."""
    return printable(redact(text))
