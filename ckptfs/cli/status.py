"""ckptfs status."""

import json
import time
from typing import Any

import click

from ckptfs.cli.options import configure_logging, verbosity_options


@click.command()
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="One JSON object for DIR, a list without.")
@click.option("--prometheus", is_flag=True, help="Prometheus' text format, for a textfile collector.")
@click.option("--watch", is_flag=True, help="Show it again every second until Ctrl-C.")
@verbosity_options
def status(directory: str | None, as_json: bool, prometheus: bool, watch: bool, verbose: int, quiet: bool) -> None:
    """What each mount has fetched, served and is waiting for.

    \b
    ckptfs status
    ckptfs status /mnt/ckpt --json
    ckptfs status --prometheus > /var/lib/node_exporter/ckptfs.prom
    """
    configure_logging(verbose, quiet)
    from ckptfs import mounting

    while True:
        found = mounting.statuses(directory)
        if prometheus:
            from ckptfs.control.exposition import exposition

            click.echo(exposition(found), nl=False)
        elif as_json:
            click.echo(json.dumps(found[0] if directory is not None else found, indent=2))
        else:
            if watch:
                click.clear()
            for facts in found:
                _show(facts)
            if not found:
                click.echo("no mounts")
        if not watch:
            return
        time.sleep(1)


def _show(facts: dict[str, Any]) -> None:
    if "state" in facts:
        click.echo(f"{facts['mountpoint']}  {facts.get('reference', '')}  {facts['state']}")
        return
    network, reads = facts["network"], facts["reads"]
    share = 100 * facts["cached_bytes"] / facts["image_bytes"] if facts["image_bytes"] else 100
    click.echo(f"{facts['mountpoint']}  {facts['reference']}")
    click.echo(f"  digest   {facts['digest']} ({facts['view']} view, verified by {facts['verify']})")
    click.echo(f"  cached   {human(facts['cached_bytes'])} of {human(facts['image_bytes'])} ({share:.0f} %)")
    click.echo(
        f"  network  {human(network['bytes'])} in {network['requests']} requests, "
        f"{network['retries']} retries, {network['in_flight']} under way"
    )
    click.echo(
        f"  reads    {reads['count']} ({human(reads['bytes'])}), {reads['misses']} waited, "
        f"median {reads['wait_ms_p50']:.1f} ms, {reads['waiting']} waiting now"
    )
    if facts.get("metrics"):
        click.echo(f"  metrics  http://{facts['metrics']}/metrics")
    for error in facts["errors"][-3:]:
        click.echo(f"  error    {error}")


def human(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
