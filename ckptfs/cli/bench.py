"""ckptfs bench."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from ckptfs.cli.options import configure_logging, make_settings, reference_argument, transfer_options
from ckptfs.model.oci import Reference
from ckptfs.terminal import printable


@click.command(short_help="Compare a mount with pulling and unpacking, over a slow link.")
@reference_argument
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Where results and report go; twice the size of the image is needed there for a while.",
)
@click.option(
    "--rtt",
    "rtts",
    multiple=True,
    default=["20ms"],
    show_default=True,
    help="Round-trip time of the link; seconds without a unit.",
)
@click.option(
    "--rate", "rates", multiple=True, default=["200Mbit"], show_default=True, help="Its bandwidth; 0: no cap."
)
@click.option("--runs", type=click.IntRange(1, 100), default=3, show_default=True, help="Of each way over each link.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Replay the reads of `mount --record` in place of criu's.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@transfer_options
def bench(
    reference: Reference,
    out: Path,
    rtts: tuple[str, ...],
    rates: tuple[str, ...],
    runs: int,
    trace: Path | None,
    plain_http: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> int:
    """Compare a mount of REF with pulling and unpacking it, over a slow link.

    The link is put in front of the image's registry by a relay on this machine, which serves the image on loopback,
    without a login, as long as the command runs. What criu would read is read without criu. Several --rtt and --rate
    are combined. Other mounts and the node's cache are left alone. skopeo and tar are measured too where they are
    installed; a way that fails is left out, and the exit code is that of its error. The report needs matplotlib: pip
    install 'ckptfs[bench]'.

    \b
    ckptfs bench registry.example/app/ckpt:1 --out results
    ckptfs bench oci:/srv/images/counter --out results --rtt 2ms --rtt 50ms --rate 1Gbit
    """
    configure_logging(verbose, quiet)
    from ckptfs.bench.compare import Comparison, compare
    from ckptfs.bench.link import bits_per_second, seconds

    links = tuple((seconds(rtt), bits_per_second(rate)) for rtt in rtts for rate in rates)
    wanted = Comparison(reference, out.absolute(), links, runs, trace, plain_http, make_settings().registries)
    shown = sys.stderr.isatty() and not quiet

    def say(text: str) -> None:
        if shown:
            click.echo(text, err=True)

    outcome = compare(wanted, say)
    for absent in outcome.absent:
        click.echo(f"not measured: {printable(absent.why)}", err=True)
    if as_json:
        figures, failed = list(map(asdict, outcome.figures)), list(map(asdict, outcome.absent))
        places = {"results": str(outcome.results), "report": str(outcome.report)}
        click.echo(json.dumps({**places, "figures": figures, "absent": failed}))
        return outcome.exit_code
    for one in outcome.figures:
        peer = f"  ({one.peer}: {one.peer_value:.2f} {one.unit})" if one.peer_value is not None else ""
        click.echo(f"{one.name}: {one.value:.2f} {one.unit}{peer}")
    click.echo(f"report: {outcome.report}")
    return outcome.exit_code
