"""ckptfs umount."""

import click

from ckptfs.cli.options import complete_mounts, configure_logging, verbosity_options


@click.command()
@click.argument(
    "directories", metavar="DIR...", nargs=-1, required=True, type=click.Path(), shell_complete=complete_mounts
)
@click.option("--force", is_flag=True, help="A layer store too that containers stand on; they get I/O errors.")
@verbosity_options
def umount(directories: tuple[str, ...], force: bool, verbose: int, quiet: bool) -> None:
    """Stop the daemon of a mount and unmount; mends a mount whose daemon is dead.

    \b
    ckptfs umount /mnt/ckpt
    """
    configure_logging(verbose, quiet)
    from ckptfs import mounting

    for directory in directories:
        mounting.umount(directory, force=force)
