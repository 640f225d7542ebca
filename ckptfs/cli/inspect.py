"""ckptfs inspect and show: what checkpointctl tells of an archive, of images in a registry, without pulling them."""

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ckptfs.cli.opening import console, image_options, say_traffic, with_images
from ckptfs.cli.options import RegistryReference, reference_argument
from ckptfs.model.annotations import PARENT
from ckptfs.model.oci import Reference

if TYPE_CHECKING:
    from ckptfs.image import OpenImage
    from ckptfs.image.resolve import Resolved
    from ckptfs.inspection.container import Container
    from ckptfs.inspection.image_files import ImageFiles
    from ckptfs.inspection.overview import Overview, Sizes
    from ckptfs.inspection.parts import Part

# What each option adds, by the name of the Part.
_PARTS = {
    "ps_tree": ("PROCESSES",),
    "ps_tree_cmd": ("PROCESSES", "COMMANDS"),
    "ps_tree_env": ("PROCESSES", "ENVIRONMENT"),
    "files": ("PROCESSES", "FILES"),
    "sockets": ("PROCESSES", "SOCKETS"),
    "mounts": ("MOUNTS",),
    "stats": ("STATISTICS",),
    "metadata": ("METADATA",),
    "everything": ("EVERYTHING",),
}


@click.command()
@reference_argument
@click.option("--all", "everything", is_flag=True, help="Everything there is to tell.")
@click.option("--ps-tree", is_flag=True, help="The process tree.")
@click.option("--ps-tree-cmd", is_flag=True, help="The process tree with whole command lines.")
@click.option("--ps-tree-env", is_flag=True, help="The process tree with environment variables.")
@click.option("--files", is_flag=True, help="Open files of the processes.")
@click.option("--sockets", is_flag=True, help="Open sockets of the processes.")
@click.option("--mounts", is_flag=True, help="Mounts of the container.")
@click.option("--stats", is_flag=True, help="Statistics of the dump.")
@click.option("--metadata", is_flag=True, help="Annotations, pod and namespace.")
@click.option("-p", "--pid", metavar="PID", type=click.IntRange(1), help="Only this process and its descendants.")
@click.option("--format", "form", type=click.Choice(["tree", "json"]), default="tree", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@image_options
def inspect(reference: Reference, pid: int | None, form: str, as_json: bool, **options: Any) -> None:
    """What is in a checkpoint, without pulling it.

    Container, base image, times, sizes, processes with command lines, memory, open files, sockets, mounts and
    statistics. The options choose parts, and only what they need is fetched; JSON has everything unless they do.

    \b
    ckptfs inspect localhost:5000/counter:1
    ckptfs inspect localhost:5000/counter:1 --ps-tree-cmd --files
    ckptfs inspect localhost:5000/counter:1 --json | jq '.containers[0].process_tree'
    """
    from ckptfs.inspection.parts import Part

    as_json = as_json or form == "json"
    chosen = [name for name in _PARTS if options.pop(name)]
    parts = Part(0)
    for name in (part for option in chosen for part in _PARTS[option]):
        parts |= Part[name]
    if not chosen:
        parts = Part.EVERYTHING if as_json else Part.EVERYTHING & ~(Part.ENVIRONMENT | Part.METADATA)
    if pid is not None:
        parts |= Part.PROCESSES

    async def work(images: "Sequence[OpenImage]") -> "tuple[Resolved, list[Overview]]":
        from ckptfs.inspection.image_files import in_thread

        return images[0].resolved, await in_thread(images[0], partial(_overviews, parts=parts, pid=pid))

    (resolved, overviews), traffic = with_images([reference], work, only_checkpoints=True, **options)
    parent = resolved.manifest.annotations.get(PARENT)
    if as_json:
        document = {"reference": str(reference), "resolved": str(resolved.reference), "parent": parent}
        containers = [overview.to_json() for overview in overviews]
        click.echo(json.dumps({**document, "containers": containers, **traffic.to_json()}, indent=2))
        return
    from ckptfs.inspection.render import print_overview

    out = console()
    for overview in overviews:
        print_overview(out, overview, parent or "")
    say_traffic(traffic, options["quiet"])


def _overviews(files: "ImageFiles", parts: "Part", pid: int | None) -> "list[Overview]":
    """Of all containers; of those that have the process, if one is named."""
    from ckptfs.inspection.overview import containers, inspect
    from ckptfs.inspection.processes import NoProcess

    limits, found, error = files.image.options.settings.limits, [], None
    for prefix in containers(files):
        try:
            found.append(inspect(files, prefix, limits, parts=parts, pid=pid))
        except NoProcess as missing:
            error = missing
    if error is not None and not found:
        raise error
    return found


@click.command()
@click.argument("references", metavar="REF...", nargs=-1, required=True, type=RegistryReference())
@click.option("--json", "as_json", is_flag=True, help="A list of objects, one for each container.")
@image_options
def show(references: tuple[Reference, ...], as_json: bool, **options: Any) -> None:
    """A table of checkpoints, a line each.

    \b
    ckptfs show localhost:5000/counter:1 localhost:5000/counter:2
    """

    async def work(images: "Sequence[OpenImage]") -> "list[tuple[str, Container, Sizes]]":
        from ckptfs.inspection.image_files import in_thread

        found = []
        for reference, image in zip(references, images, strict=True):
            found += [(str(reference), *row) for row in await in_thread(image, _summaries)]
        return found

    rows, traffic = with_images(references, work, only_checkpoints=True, **options)
    if as_json:
        click.echo(json.dumps([_summary_facts(*row) for row in rows], indent=2))
        return
    from ckptfs.inspection.render import print_summaries

    print_summaries(console(), rows)
    say_traffic(traffic, options["quiet"])


def _summaries(files: "ImageFiles") -> "list[tuple[Container, Sizes]]":
    from ckptfs.inspection.overview import containers, summarise

    return [summarise(files, prefix, files.image.options.settings.limits) for prefix in containers(files)]


def _summary_facts(name: str, container: "Container", sizes: "Sizes") -> dict[str, Any]:
    return {
        "reference": name,
        "container_name": container.name,
        "image": container.image,
        "id": container.id,
        "runtime": container.runtime,
        "created": container.created or "",
        "engine": container.engine,
        "total_size": sizes.total,
        "memory_pages_size": sizes.pages,
        "root_fs_diff_size": sizes.rootfs_diff,
    }
