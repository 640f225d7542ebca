"""ckptfs restore."""

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import click

from ckptfs.cli import silence
from ckptfs.cli.options import (
    F,
    RegistryOptions,
    RegistryReference,
    configure_logging,
    read_deadline_option,
    reference_argument,
    registry_options,
    verify_option,
)
from ckptfs.errors import NotFoundError, UsageError
from ckptfs.model.oci import Reference

STORE = "containers-storage:"


class BaseImage(RegistryReference):
    """A reference, or an image in the storage of podman and CRI-O by name or id."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value)
        return text if text.startswith(STORE) else super().convert(value, param, ctx)


def base_options(function: F) -> F:
    """Where the container's base image comes from, if not from where the checkpoint says."""
    directory = click.Path(path_type=Path, file_okay=False)
    function = click.option("--rootfs", type=directory, help="The base image's files as a directory.")(function)
    return click.option(
        "--base", type=BaseImage(), help=f"The base image: a REF, or {STORE}IMAGE for one that podman has."
    )(function)


def require_one_base(base: Reference | str | None, rootfs: Path | None) -> None:
    """UsageError where both options were given."""
    if base is not None and rootfs is not None:
        raise UsageError("--base and --rootfs name the same thing", hint="give one of them")


@click.command(short_help="Run a checkpointed container before it has been pulled.")
@reference_argument
@click.argument("extra", metavar="[-- OPTION...]", nargs=-1)
@click.option("--name", default="", help="The container's name here. [default: made from REF]")
@click.option(
    "--runtime",
    type=click.Choice(["auto", "runc", "crun", "criu"]),
    default="auto",
    show_default=True,
    help="auto: what wrote the checkpoint, if it can restore here; criu for processes without a container.",
)
@click.option(
    "--engine", type=click.Choice(["podman", "containerd"]), help="Have an engine restore it and keep it as its own."
)
@click.option("-d", "--detach", is_flag=True, help="Return when it runs; what serves it ends when it ends.")
@click.option("--lazy-pages/--no-lazy-pages", default=True, help="Run before the memory is here. [default: on]")
@click.option("--eager", is_flag=True, help="Pull and unpack everything first, to compare; without lazy pages.")
@base_options
@click.option("--bind", "binds", metavar="DEST=SOURCE", multiple=True, help="What is mounted on DEST; repeatable.")
@click.option("--network", default="", metavar="PATH", help="A network namespace to join instead of an empty one.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    help="Where it works. [default: /var/lib/ckptfs/restores/NAME]",
)
@click.option("--keep", is_flag=True, help="Leave mounts, bundle and logs when it has ended.")
@click.option("--offline", is_flag=True, help="Send nothing; use only what the node's cache has.")
@read_deadline_option
@verify_option
@click.option("--json", "as_json", is_flag=True, help="One object per event: running, resident, ended.")
@registry_options
def restore(
    reference: Reference,
    extra: tuple[str, ...],
    name: str,
    runtime: Literal["auto", "runc", "crun", "criu"],
    engine: str | None,
    detach: bool,
    lazy_pages: bool,
    eager: bool,
    base: Reference | str | None,
    rootfs: Path | None,
    binds: tuple[str, ...],
    network: str,
    directory: Path | None,
    keep: bool,
    offline: bool,
    read_deadline: float,
    verify: str,
    as_json: bool,
    registry: RegistryOptions,
    verbose: int,
    quiet: bool,
) -> None:
    """Run the checkpointed container REF again, before it has been pulled.

    Stays until it ends; Ctrl-C stops it. Nothing stays behind. Options after -- go to the runtime's restore
    (or to podman's): --tcp-established, --file-locks, ...

    \b
    ckptfs restore localhost:5000/counter:1
    ckptfs restore localhost:5000/counter:1 --base containers-storage:docker.io/library/alpine -- --file-locks
    ckptfs restore localhost:5000/counter:1 --engine podman --name counter
    """
    configure_logging(verbose, quiet)
    require_one_base(base, rootfs)
    if rootfs is not None and not os.path.isdir(rootfs):
        raise NotFoundError(f"the base root file system {rootfs} is no directory", hint="name one with --rootfs DIR")
    from ckptfs.daemon.requests import MountRequest, command_start
    from ckptfs.restore import keeper
    from ckptfs.restore.flow import RestoreRequest

    if extra and not extra[0].startswith("-"):
        hint = "options of the runtime follow --, and a name is given with --name"
        raise UsageError(f"{extra[0]!r} is no option", hint=hint)
    request = RestoreRequest(
        mount=MountRequest(
            reference=reference,
            mountpoint="",
            started=command_start(),
            cache_dir=registry.cache_path(),
            cache_key=registry.cache_key(),
            offline=offline,
            strict=verify == "strict",
            background=not offline,
            plain_http=registry.plain_http,
            settings=registry.settings(read_deadline),
        ),
        name=name,
        runtime=runtime,
        engine=engine,
        lazy=lazy_pages,
        eager=eager,
        keep=keep,
        base=base if isinstance(base, Reference) else None,
        image_store=base.removeprefix(STORE) if isinstance(base, str) else "",
        rootfs=rootfs.absolute() if rootfs is not None else None,  # who stays with --detach works in /
        binds=_pairs(binds),
        network=os.path.abspath(network) if network else "",
        extra=extra,
        directory=directory.absolute() if directory is not None else None,
        output=None if detach else (2, 2) if as_json else (1, 2),
    )
    report = _Printer(as_json, quiet)
    if detach:
        keeper.restore_detached(request, report)
    else:
        keeper.restore(request, report)


def _pairs(binds: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in binds:
        destination, _, source = text.partition("=")
        if not source or not destination.startswith("/"):
            raise UsageError(f"--bind {text!r} is not DEST=SOURCE", hint="for example --bind /data=/srv/data")
        found[destination] = os.path.abspath(source)
    return found


class _Printer:
    """Events as JSON lines, or as sentences: what matters on standard output, the steps on a terminal only."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._json = as_json
        self._quiet = quiet

    def __call__(self, event: str, **facts: Any) -> None:
        try:
            self._print(event, facts)
        except OSError:
            if event in ("step", "running"):
                raise
            silence(sys.stdout)  # whoever listened has left; the container goes on, as when nobody hears what it says

    def _print(self, event: str, facts: dict[str, Any]) -> None:
        if self._json:
            if event != "step":
                click.echo(json.dumps({"event": event, **facts}))
            return
        if self._quiet:
            return
        if event == "running":
            click.echo(
                f"{facts['name']} runs as process {facts['pid']} after {facts['running_ms'] / 1000:.2f} s", err=True
            )
        elif sys.stderr.isatty():
            click.echo(_sentence(event, facts), err=True)


def _sentence(event: str, facts: dict[str, Any]) -> str:
    if event == "resident":
        return f"all its memory is here after {facts['resident_ms'] / 1000:.2f} s"
    if event == "ended":
        code = facts["exit_code"]
        return "it has ended" if code is None else f"it has ended with exit code {code}"
    return str(facts["text"])
