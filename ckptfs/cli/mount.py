"""ckptfs mount."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ckptfs.cli.options import (
    RegistryOptions,
    configure_logging,
    metrics_option,
    read_deadline_option,
    reference_argument,
    registry_options,
    verify_option,
    view_options,
)
from ckptfs.errors import UsageError
from ckptfs.model.oci import Reference

if TYPE_CHECKING:
    from ckptfs.daemon.requests import Request


@click.command(short_help="Show an image as a directory; fetch only what is read.")
@reference_argument
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("-f", "--foreground", is_flag=True, help="Stay; end with Ctrl-C or `ckptfs umount`.")
@view_options
@click.option("--offline", is_flag=True, help="Send nothing; what the node's cache lacks is an I/O error.")
@click.option("--ephemeral", is_flag=True, help="Keep nothing: a private cache that is removed at the end.")
@verify_option
@click.option("--prefetch", type=click.Choice(["auto", "none"]), default="auto", show_default=True)
@click.option(
    "--background-fetch/--no-background-fetch",
    default=True,
    help="Fetch the rest of the image when nobody waits for anything else. [default: on]",
)
@click.option(
    "--publish-index",
    is_flag=True,
    help="Attach to the image what its streamed layers have taught, as `ckptfs index` does. Needs the right to push.",
)
@click.option("--record", type=click.Path(path_type=Path, dir_okay=False), help="Write every read to FILE.")
@click.option(
    "--stats", type=click.Path(path_type=Path, dir_okay=False), help="Write the last status to FILE at the end."
)
@metrics_option
@click.option("--ready-fd", type=click.IntRange(0), help="Write a line to this descriptor once a read works.")
@read_deadline_option
@click.option("--allow-other", is_flag=True, help="Let other users in; modes and owners are those of the image.")
@click.option("--json", "as_json", is_flag=True, help="Print the mount's status as JSON.")
@registry_options
def mount(
    reference: Reference,
    directory: str,
    foreground: bool,
    view: Literal["checkpoint", "raw", "rootfs"],
    base: Reference | None,
    offline: bool,
    ephemeral: bool,
    verify: str,
    prefetch: str,
    background_fetch: bool,
    publish_index: bool,
    record: Path | None,
    stats: Path | None,
    metrics: tuple[str, int] | None,
    ready_fd: int | None,
    read_deadline: float,
    allow_other: bool,
    as_json: bool,
    registry: RegistryOptions,
    verbose: int,
    quiet: bool,
) -> None:
    """Show the image REF as the directory DIR, and fetch only what is read.

    Returns once a read works and leaves a daemon behind, which `ckptfs umount DIR` ends.

    \b
    ckptfs mount localhost:5000/counter:1 /mnt/ckpt
    criu lazy-pages --daemon -D /mnt/ckpt/checkpoint -W /var/tmp/w
    criu restore -d --lazy-pages -D /mnt/ckpt/checkpoint -W /var/tmp/w
    ckptfs mount oci:/srv/images/counter:latest /mnt/ckpt --view raw --foreground
    """
    configure_logging(verbose, quiet)
    from ckptfs.daemon.requests import MountRequest, command_start

    if publish_index and reference.kind != "registry":
        raise UsageError(f"{reference} has no registry to keep an index", hint="leave --publish-index out")
    if stats is not None:
        from ckptfs.cli.output import require_writable

        require_writable(stats)
    request = MountRequest(
        reference=reference,
        mountpoint=directory,
        started=command_start(),
        view=view,
        cache_dir=registry.cache_path(),
        cache_key=registry.cache_key(),
        base=base,
        offline=offline,
        ephemeral=ephemeral,
        strict=verify == "strict",
        prefetch=prefetch == "auto",
        background=background_fetch and not offline,
        publish_index=publish_index,
        allow_other=allow_other,
        plain_http=registry.plain_http,
        record=record.absolute() if record else None,
        stats=stats.absolute() if stats else None,
        metrics=metrics,
        ready_fd=ready_fd,
        figures=as_json,
        settings=registry.settings(read_deadline),
    )
    start(request, f"{reference} is mounted on", foreground=foreground, as_json=as_json, quiet=quiet)


def start(request: "Request", done: str, *, foreground: bool, as_json: bool, quiet: bool) -> None:
    """Stay, or leave a daemon behind and say so: `done`, where, and how long it took."""
    from ckptfs.control.ready import require_inherited
    from ckptfs.daemon import mounting

    if request.ready_fd is not None:
        require_inherited(request.ready_fd)

    def show(status: dict[str, Any]) -> None:
        if as_json:
            click.echo(json.dumps(status))
        elif not quiet and sys.stdout.isatty():
            click.echo(f"{done} {status['mountpoint']} ({status['ready_ms']:.0f} ms)")

    if foreground:
        mounting.mount_foreground(request, show)
        return
    status = mounting.mount(request)
    try:
        show(status)
    except OSError:  # what has failed leaves nothing mounted
        from ckptfs.daemon.asking import umount

        umount(status["mountpoint"])
        raise
