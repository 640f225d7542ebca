"""ckptfs store."""

import click

from ckptfs.cli.mount import start
from ckptfs.cli.options import (
    RegistryOptions,
    configure_logging,
    metrics_option,
    read_deadline_option,
    registry_options,
)


@click.command(short_help="Serve images lazily to podman, buildah and CRI-O.")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("-f", "--foreground", is_flag=True, help="Stay; end with Ctrl-C or `ckptfs umount`.")
@click.option("--offline", is_flag=True, help="Send nothing; what the node's cache lacks is an I/O error.")
@click.option(
    "--verify",
    type=click.Choice(["auto", "strict"]),
    default="auto",
    show_default=True,
    help="strict refuses layers that cannot be verified chunk by chunk; engines pull these themselves.",
)
@click.option(
    "--background-fetch/--no-background-fetch",
    default=True,
    help="Fetch the rest of an image once a file of it has been read. [default: on]",
)
@metrics_option
@click.option("--ready-fd", type=click.IntRange(0), help="Write a line to this descriptor once the store works.")
@read_deadline_option
@click.option(
    "--allow-other",
    is_flag=True,
    help="Let other users look up images, with your credentials for registries. No engine that you run needs it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the store's status as JSON.")
@registry_options
def store(
    directory: str,
    foreground: bool,
    offline: bool,
    verify: str,
    background_fetch: bool,
    metrics: tuple[str, int] | None,
    ready_fd: int | None,
    read_deadline: float,
    allow_other: bool,
    as_json: bool,
    registry: RegistryOptions,
    verbose: int,
    quiet: bool,
) -> None:
    """Serve images lazily to podman, buildah and CRI-O: an additional layer store on DIR.

    With additionallayerstores=["DIR:ref"] in storage.conf a pull fetches only metadata, and what containers read of
    their images comes out of DIR. Leaves a daemon behind, which `ckptfs umount DIR` ends.

    \b
    ckptfs store /var/lib/ckptfs/store
    podman run --rm registry.example/app/web:1
    ckptfs status /var/lib/ckptfs/store
    """
    configure_logging(verbose, quiet)
    from ckptfs.daemon.requests import StoreRequest, command_start

    request = StoreRequest(
        mountpoint=directory,
        started=command_start(),
        cache_dir=registry.cache_path(),
        cache_key=registry.cache_key(),
        offline=offline,
        strict=verify == "strict",
        background=background_fetch,
        allow_other=allow_other,
        plain_http=registry.plain_http,
        metrics=metrics,
        ready_fd=ready_fd,
        figures=as_json,
        settings=registry.settings(read_deadline),
    )
    start(request, "layers are served on", foreground=foreground, as_json=as_json, quiet=quiet)
