"""ckptfs push: a checkpoint becomes an image in a registry."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptfs.cli.options import RegistryReference, configure_logging, make_settings, transfer_options
from ckptfs.cli.output import temporary, tidy
from ckptfs.errors import UsageError
from ckptfs.model.oci import Descriptor, Reference
from ckptfs.telemetry import NetworkCounters
from ckptfs.terminal import size_text

if TYPE_CHECKING:
    from ckptfs.push import PushResult


@click.command(short_help="Publish a checkpoint as an image.")
@click.argument("source", metavar="SRC")
@click.argument("reference", metavar="REF", type=RegistryReference())
@click.option(
    "--parent",
    metavar="REF",
    type=RegistryReference(),
    help="The image of the same process's checkpoint before: send only the memory that has changed since.",
)
@click.option("--rootfs", is_flag=True, help="Push the container's root file system as well, tagged TAG-rootfs.")
@click.option("--base", metavar="REF", default="", help="The base image of --rootfs, if the checkpoint does not say.")
@click.option("--name", default="", help="What the container is called, if the checkpoint does not say.")
@click.option("--annotation", "annotations", metavar="KEY=VALUE", multiple=True, help="Annotate the image. Repeatable.")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where compressed layers wait until they are sent; a compressed source and plain layers of an image are kept "
    "here, too. [default: the directory for temporary files]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@transfer_options
@tidy
def push(
    source: str,
    reference: Reference,
    parent: Reference | None,
    rootfs: bool,
    base: str,
    name: str,
    annotations: tuple[str, ...],
    work_dir: Path | None,
    as_json: bool,
    plain_http: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Publish the checkpoint SRC as the image REF, in the layout that a lazy restore likes best.

    SRC is a directory of CRIU's images or an unpacked export, an archive of podman, CRI-O or the kubelet (plain, gzip
    or zstd), an OCI layout (oci:DIR[:TAG]), or another image. What the registry has already is not sent; the tag
    appears when all else is there. Prints REF with its digest.

    \b
    ckptfs push /var/lib/kubelet/checkpoints/checkpoint-web.tar registry.example/app/ckpt:1
    ckptfs push ./images localhost:5000/counter:1 --name counter
    ckptfs push web.tar.zst localhost:5000/web:1 --rootfs --base docker.io/library/nginx:1.27
    ckptfs push ./images-2 localhost:5000/counter:2 --parent localhost:5000/counter:1
    """
    configure_logging(verbose, quiet)
    notes = dict(map(_annotation, annotations))
    if base and not rootfs:
        raise UsageError("--base is the base image of --rootfs", hint="give --rootfs, or leave --base out")
    if not source:
        raise UsageError("SRC is empty", hint="name a directory, an archive or an image")
    from ckptfs.cli.progress import Bars
    from ckptfs.push import Progress, PushOptions, open_base, open_checkpoint, open_parent, open_target
    from ckptfs.push import push as publish
    from ckptfs.sources import open_source

    settings, counters = make_settings(), NetworkCounters()
    options = PushOptions(name or "checkpoint", notes, work=work_dir or temporary(), settings=settings)
    target = open_target(reference, settings=settings, counters=counters, plain_http=plain_http)
    reach = partial(open_source, settings=settings, counters=counters, plain_http=plain_http)
    latest = [Progress()]

    def amounts() -> Mapping[str, tuple[int, int]]:
        now = latest[0]
        compared = {"compared": (now.compared, now.to_compare)} if now.to_compare else {}
        return {**compared, "packed": (now.read, now.total), "sent": (now.sent, now.to_send)}

    def report(now: Progress) -> None:
        latest[0] = now

    with Bars(amounts, quiet=quiet), open_checkpoint(source, reach, options) as checkpoint:
        image = open_base(checkpoint, base, reach, options) if rootfs else None
        before = open_parent(parent, reach, options) if parent is not None else None
        result = publish(checkpoint, target, reference.tag, options, report, base=image, parent=before)
    if as_json:
        click.echo(json.dumps(_facts(reference, result), indent=2))
        return
    click.echo(f"{reference}@{result.manifest.digest}")
    if not quiet:
        click.echo(f"sent {size_text(result.sent)}, {size_text(result.present)} were there already", err=True)
        increment = result.increment
        if increment is not None and increment.layers:
            shared, changed = size_text(increment.shared), size_text(increment.changed)
            click.echo(f"{shared} of memory are in {parent}, {changed} have changed", err=True)
        elif increment is not None:
            click.echo(f"pushed whole, {parent} has no part in it: {increment.reason}", err=True)


def _annotation(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--annotation {text!r} is not KEY=VALUE", hint="for example --annotation team=web")
    return key, value


def _facts(reference: Reference, result: "PushResult") -> Mapping[str, Any]:
    root = result.rootfs
    reused = result.increment.layers if result.increment is not None else ()
    return {
        "reference": str(reference),
        "digest": str(result.manifest.digest),
        "size": result.manifest.size,
        "layers": [
            *(_layer(layer.descriptor, len(layer.indexed.entries), reused=True) for layer in reused),
            *(_layer(layer.descriptor, len(layer.files), reused=False) for layer in result.layers),
        ],
        "parent": _parent_facts(result),
        "sent": result.sent,
        "present": result.present,
        "rootfs": {"digest": str(root.digest), "size": root.size} if root is not None else None,
    }


def _layer(descriptor: Descriptor, files: int, *, reused: bool) -> Mapping[str, Any]:
    from ckptfs.model.annotations import ROLE

    facts = {"digest": str(descriptor.digest), "size": descriptor.size, "role": descriptor.annotations.get(ROLE, "")}
    return {**facts, "files": files, "reused": reused}


def _parent_facts(result: "PushResult") -> Mapping[str, Any] | None:
    increment = result.increment
    if increment is None:
        return None
    facts = {"digest": str(increment.digest), "shared": increment.shared, "changed": increment.changed}
    return facts | ({"pushed_whole": increment.reason} if increment.reason else {})
