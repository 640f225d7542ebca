"""ckptfs store."""

from pathlib import Path

import click

from ckptfs.cli.mount import start
from ckptfs.cli.options import (
    configure_logging,
    deadline,
    make_settings,
    metrics_option,
    read_cache_key,
    registry_options,
)
from ckptfs.settings import default_cache_dir


@click.command()
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
@click.option("--read-deadline", default="60", show_default=True, help="Seconds until a read gets EIO, or `hard`.")
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
    read_deadline: str,
    allow_other: bool,
    as_json: bool,
    plain_http: bool,
    cache_dir: Path | None,
    cache_size: int | None,
    cache_key_file: Path | None,
    memory: int | None,
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
    from ckptfs import mounting

    request = mounting.StoreRequest(
        mountpoint=directory,
        started=mounting.command_start(),
        cache_dir=(cache_dir or default_cache_dir()).absolute(),  # the daemon works in /
        cache_key=read_cache_key(cache_key_file),
        offline=offline,
        strict=verify == "strict",
        background=background_fetch,
        allow_other=allow_other,
        plain_http=plain_http,
        metrics=metrics,
        ready_fd=ready_fd,
        settings=make_settings(cache_size, memory, deadline(read_deadline)),
    )
    start(request, "layers are served on", foreground=foreground, as_json=as_json, quiet=quiet)
