"""ckptfs diff: two checkpoints compared where they lie."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ckptfs.cli.opening import console, image_options, say_traffic, with_images
from ckptfs.cli.options import RegistryReference
from ckptfs.model.oci import Reference

if TYPE_CHECKING:
    from ckptfs.image import OpenImage
    from ckptfs.inspection.diff import Difference


@click.command(short_help="What changed from one checkpoint to another.")
@click.argument("before", metavar="REF", type=RegistryReference())
@click.argument("after", metavar="REF", type=RegistryReference())
@click.option(
    "--pages/--no-pages",
    default=True,
    help="Compare the memory of processes page by page; fetches the parts of both that may differ. [default: on]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@image_options
def diff(before: Reference, after: Reference, pages: bool, as_json: bool, **options: Any) -> None:
    """What changed from one checkpoint to another: processes, memory pages, files, and what a pull of the second takes.

    What is known to be equal, chunk by chunk, is not fetched.

    \b
    ckptfs diff localhost:5000/counter:1 localhost:5000/counter:2
    ckptfs diff localhost:5000/counter:1 localhost:5000/counter:2 --no-pages --json
    """

    async def work(images: "Sequence[OpenImage]") -> "Difference":
        from ckptfs.inspection.image_diff import diff_images

        return await diff_images(*images, memory=pages)

    difference, traffic = with_images([before, after], work, only_checkpoints=True, **options)
    if as_json:
        document = {"before": str(before), "after": str(after), **difference.to_json(), **traffic.to_json()}
        click.echo(json.dumps(document, indent=2))
        return
    from ckptfs.inspection.render import print_difference

    print_difference(console(), difference)
    say_traffic(traffic, options["quiet"])
