"""ckptfs stub."""

import errno
import json
import os
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptfs.cli.opening import image_options, with_image
from ckptfs.cli.options import RegistryOptions, RegistryReference, make_settings, reference_argument
from ckptfs.cli.output import appearing, temporary, tidy
from ckptfs.errors import RestoreError, UsageError
from ckptfs.model.oci import Reference
from ckptfs.telemetry import NetworkCounters

if TYPE_CHECKING:
    from ckptfs.image import OpenImage


@click.command(short_help="Make a small archive by which engines restore from a mount.")
@reference_argument
@click.option(
    "--mount", "mountpoint", type=click.Path(path_type=Path), required=True, help="Where REF will be mounted."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write an archive.")
@click.option("--image", type=RegistryReference(), metavar="REF2", help="Publish a checkpoint image: a REF or oci:DIR.")
@click.option(
    "--criu-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/var/lib/ckptfs/stub"),
    show_default=True,
    help="Where criu's configuration, logs and sockets go. One restore at a time can use it.",
)
@click.option("--lazy-pages/--no-lazy-pages", default=True, help="Restore with lazy pages. [default: on]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@image_options
@tidy
def stub(
    reference: Reference,
    mountpoint: Path,
    out: Path | None,
    image: Reference | None,
    criu_dir: Path,
    lazy_pages: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a small archive (or image) that lets an unmodified engine restore REF from a mount.

    It has everything but the memory, and makes criu read that from the mount, as long as criu.conf is there: with it
    the next checkpoint would go to the mount, too. `ckptfs restore --engine podman` does all of the following by
    itself.

    \b
    ckptfs stub localhost:5000/counter:1 --out counter.tar --mount /mnt/ckpt
    ckptfs mount localhost:5000/counter:1 /mnt/ckpt
    criu lazy-pages --daemon -D /mnt/ckpt/checkpoint -W /var/lib/ckptfs/stub/work
    podman container restore --import counter.tar
    rm /var/lib/ckptfs/stub/criu.conf
    """
    if out is None and image is None:
        raise UsageError("nothing to write", hint="give --out FILE, --image REF2, or both")
    from ckptfs.restore.stub import Redirection, write_stub

    settings = make_settings()
    _require_directory(criu_dir)
    there = Redirection(criu_dir.absolute())
    with ExitStack() as stack:
        if out is not None:
            archive = stack.enter_context(appearing(out))
        else:
            archive = (
                Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckptfs-stub-", dir=temporary())))
                / "stub.tar"
            )

        async def write(opened: "OpenImage") -> int:
            from ckptfs.inspection.image_files import in_thread

            work = partial(write_stub, out=archive, config=there.config, limits=settings.limits)
            return await in_thread(opened, work)

        size = with_image(reference, write, only_checkpoints=True, **options)
        digest = _publish(archive, image, options["registry"]) if image is not None else ""
        # From here on earlier stubs lead to this mount: not before all is there that this one needs.
        there.write(mountpoint.absolute() / "checkpoint", lazy=lazy_pages)
    facts: dict[str, object] = {"bytes": size, "criu_config": str(there.config), "work_dir": str(there.work)}
    facts |= {"archive": os.path.abspath(out)} if out is not None else {}
    facts |= {"image": f"{image}@{digest}"} if image is not None else {}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    elif not options["quiet"]:
        for key in ("archive", "image"):
            if key in facts:
                click.echo(f"{facts[key]} ({size} bytes)")


def _require_directory(path: Path) -> None:
    """Make it if it is not there. RestoreError where this user cannot write to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        hint = "name a directory of your own: --criu-dir"
        raise RestoreError(f"{path} cannot be written: {error.strerror}", hint=hint) from None


def _publish(archive: Path, image: Reference, registry: RegistryOptions) -> str:
    """The stub as a checkpoint image; returns its digest."""
    from ckptfs.push import PushOptions, open_checkpoint, open_target, push

    settings, counters = registry.settings(), NetworkCounters()
    options = PushOptions(image.repository.rpartition("/")[2] or "stub", settings=settings)
    target = open_target(image, settings=settings, counters=counters, plain_http=registry.plain_http)
    with open_checkpoint(str(archive), registry.reach(counters), options) as checkpoint:
        return str(push(checkpoint, target, image.tag, options).manifest.digest)
