"""ckptfs umount."""

import click

from ckptfs.cli import fail
from ckptfs.cli.options import complete_mounts, configure_logging, verbosity_options
from ckptfs.errors import CkptfsError


@click.command(short_help="Stop a mount's daemon and unmount; mends a dead mount.")
@click.argument(
    "directories", metavar="DIR...", nargs=-1, required=True, type=click.Path(), shell_complete=complete_mounts
)
@click.option("--force", is_flag=True, help="A layer store too that containers stand on; they get I/O errors.")
@verbosity_options
def umount(directories: tuple[str, ...], force: bool, verbose: int, quiet: bool) -> int:
    """Stop the daemon of a mount and unmount; mends a mount whose daemon is dead.

    Goes on with the others when one cannot be unmounted.

    \b
    ckptfs umount /mnt/ckpt
    """
    configure_logging(verbose, quiet)
    from ckptfs.daemon import asking

    codes = []
    for directory in directories:
        try:
            asking.umount(directory, force=force)
        except CkptfsError as error:
            codes.append(fail(str(error), error.exit_code))
    return max(codes, default=0)
