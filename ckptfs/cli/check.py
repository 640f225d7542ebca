"""ckptfs check: whether `ckptfs restore` would work here, and if not, why."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ckptfs.cli.opening import image_options, with_image
from ckptfs.cli.options import make_settings, reference_argument
from ckptfs.cli.restore import STORE, base_options, require_one_base
from ckptfs.errors import CkptfsError, NotFoundError
from ckptfs.model.oci import Reference
from ckptfs.terminal import printable

if TYPE_CHECKING:
    from ckptfs.image import OpenImage
    from ckptfs.inspection.image_files import ImageFiles
    from ckptfs.restore.checking import Finding
    from ckptfs.restore.flow import RestoreRequest


@click.command(short_help="Say whether a checkpoint can be restored here.")
@reference_argument
@click.option("--runtime", type=click.Choice(["auto", "runc", "crun", "criu"]), default="auto", show_default=True)
@click.option("--engine", type=click.Choice(["podman", "containerd"]), help="Check for a restore by this engine.")
@click.option("--lazy-pages/--no-lazy-pages", default=True, help="Whether lazy pages are wanted. [default: on]")
@base_options
@click.option("--json", "as_json", is_flag=True, help="One object: ok, and a list of findings.")
@image_options
def check(
    reference: Reference,
    runtime: Literal["auto", "runc", "crun", "criu"],
    engine: str | None,
    lazy_pages: bool,
    base: Reference | str | None,
    rootfs: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Say whether the checkpoint REF can be restored on this machine, and what keeps it from that.

    Nothing is started and no memory is fetched. Exits with what `ckptfs restore` would exit with.

    \b
    ckptfs check localhost:5000/counter:1
    ckptfs check localhost:5000/counter:1 --engine podman --json
    """
    require_one_base(base, rootfs)
    from ckptfs.daemon.requests import MountRequest
    from ckptfs.restore import checking
    from ckptfs.restore.flow import RestoreRequest
    from ckptfs.restore.keeper import engine_of

    store, base_image = (base, None) if isinstance(base, str) else ("", base)
    wanted = MountRequest(reference, "", 0.0)
    request = RestoreRequest(
        wanted, runtime=runtime, engine=engine, base=base_image, image_store=store, rootfs=rootfs, lazy=lazy_pages
    )
    engine_of(request)
    settings = make_settings()
    found = list(checking.tools(runtime, engine))
    if next(one.ok for one in found if one.subject == "criu"):
        found += checking.kernel(settings, lazy=lazy_pages)

    async def look(image: "OpenImage") -> "list[Finding]":
        from ckptfs.inspection.image_files import in_thread

        return await in_thread(image, lambda files: list(_of_image(files, request)))

    found += with_image(reference, look, **options)
    if any(one.subject == "network lock" for one in found) and engine != "podman":
        found.append(_base(reference, base, rootfs, options))
    bad = [one for one in found if not one.ok]
    if as_json:
        findings = [
            {"subject": one.subject, "ok": one.ok, "detail": one.detail} | ({} if one.ok else {"hint": one.hint})
            for one in found
        ]
        click.echo(json.dumps({"reference": str(reference), "ok": not bad, "findings": findings}, indent=2))
    else:
        for one in found:
            mark = click.style("ok", fg="green") if one.ok else click.style("no", fg="red", bold=True)
            click.echo(f"{mark}  {one.subject:13} {printable(one.detail)}" + ("" if one.ok else f"; {one.hint}"))
    return bad[0].error.exit_code if bad else 0


def _of_image(files: "ImageFiles", request: "RestoreRequest") -> "Iterator[Finding]":
    from ckptfs.restore.container import check_options
    from ckptfs.restore.facts import check_checkpoint, check_engine, check_runtime

    settings = make_settings()
    yield from check_checkpoint(files, settings)
    if files.size("checkpoint/inventory.img") is not None:
        if request.engine is not None:
            yield from check_engine(files, request.engine, settings, lazy=request.lazy)
            return
        yield from check_runtime(files, request.runtime, settings, lazy=request.lazy)
        if files.size("spec.dump") is None:
            yield from check_options(request)


def _base(
    reference: Reference, base: Reference | str | None, rootfs: Path | None, options: dict[str, Any]
) -> "Finding":
    """Whether the base image can be had from where `restore` would take it."""
    from ckptfs.restore.checking import Finding
    from ckptfs.restore.facts import document
    from ckptfs.restore.image_store import has_image, local_image

    settings = make_settings()
    hint = f"name it: --base REF, --base {STORE}IMAGE, or --rootfs DIR"
    if rootfs is not None:
        ok = os.path.isdir(rootfs)
        return Finding("base image", ok, f"{rootfs} is {'a' if ok else 'no'} directory", hint, NotFoundError)
    if isinstance(base, str):
        name = base.removeprefix(STORE)
        return Finding("base image", has_image(name, settings), f"{name} in podman's storage", hint, NotFoundError)

    async def config(image: "OpenImage") -> dict[str, Any]:
        from ckptfs.inspection.image_files import in_thread

        return await in_thread(image, lambda files: document(files, "config.dump", settings.limits)) or {}

    async def nothing(image: "OpenImage") -> None:
        """It could be opened."""

    if base is None and (stored := local_image(with_image(reference, config, **options))):
        return Finding("base image", True, f"{stored[:12]} in podman's storage")
    try:
        with_image(reference, nothing, view="rootfs", base=base, **options)
    except CkptfsError as error:
        return Finding("base image", False, error.message, hint, type(error))
    return Finding("base image", True, f"{base or 'as the checkpoint says'}, from its registry")
