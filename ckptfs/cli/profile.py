"""ckptfs profile: what a restore reads first, recorded once and attached to the image for all later mounts."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptfs.cli.options import (
    RegistryOptions,
    RegistryReference,
    configure_logging,
    make_settings,
    registry_options,
    transfer_options,
    verbosity_options,
    verify_option,
)
from ckptfs.errors import NotFoundError, RestoreError, UsageError
from ckptfs.interrupts import interruptible
from ckptfs.model.oci import Reference
from ckptfs.settings import Limits, MiB
from ckptfs.telemetry import NetworkCounters
from ckptfs.terminal import printable, size_text

if TYPE_CHECKING:
    from rich.text import Text

    from ckptfs.daemon.requests import MountRequest
    from ckptfs.model.oci import Manifest
    from ckptfs.model.profile import Profile
    from ckptfs.sources import Source

MOUNT_VARIABLE = "CKPTFS_MOUNT"
_TRANSFER_RATE = 4.0 * MiB  # while recording: what has been transferred unasked is never seen to be needed


@click.group(short_help="Record what a restore reads first, for later mounts.")
def profile() -> None:
    """What a restore reads first: record it once, attach it to the image, and later mounts fetch it first.

    \b
    ckptfs profile record localhost:5000/counter:1 --out counter.json -- ./restore-and-warm-up.sh {}
    ckptfs profile show counter.json
    ckptfs profile push counter.json localhost:5000/counter:1
    """


@profile.command(short_help="Mount an image, run a command, write down what it needs.")
@click.argument("reference", metavar="[REF]", type=RegistryReference(), required=False)
@click.argument("command", metavar="[-- COMMAND...]", nargs=-1)
@click.option(
    "--from",
    "recordings",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="Mount nothing: take FILE, which `mount --record` has written. Repeatable: recordings are merged.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="[default: NAME-TAG.profile.json]")
@verify_option
@registry_options
def record(
    reference: Reference | None,
    command: tuple[str, ...],
    recordings: tuple[Path, ...],
    out: Path | None,
    verify: str,
    registry: RegistryOptions,
    verbose: int,
    quiet: bool,
) -> None:
    """Mount REF, run COMMAND, write down which parts of the image were needed until it ended.

    {} in COMMAND, and $CKPTFS_MOUNT, are the directory where REF is mounted. COMMAND restores from there, with
    `criu lazy-pages`, lets the process do what is to be fast, and ends. What the lazy-pages daemon brings unasked is
    brought slowly meanwhile and does not count.

    \b
    ckptfs profile record localhost:5000/counter:1 -- ./restore-and-warm-up.sh {}
    ckptfs profile record --from reads.jsonl localhost:5000/counter:1 --out counter.json
    """
    configure_logging(verbose, quiet)
    limits = registry.settings().limits
    if recordings and command:
        raise UsageError("both --from and a COMMAND", hint="give one of them")
    if not recordings and not (reference and command):
        raise UsageError("nothing to record", hint="give REF -- COMMAND..., or --from FILE")
    from ckptfs.cli.output import require_writable, write
    from ckptfs.model.profile import encode_profile, merged

    path = out or Path(_default_name(reference))
    require_writable(path)  # before a restore that may take minutes
    if recordings:
        found = [_read_recording(file, limits) for file in recordings]
    else:
        assert reference is not None
        found = [_recorded(reference, command, registry, strict=verify == "strict")]
    result = merged(found, limits)
    if not result.runs:
        raise NotFoundError(
            "nothing was read out of sequence",
            hint="COMMAND has to restore from {}, where REF is mounted; pages read from front to back need no profile",
        )
    write(path, encode_profile(result) + b"\n")
    click.echo(path)
    if not quiet:
        click.echo(_sentence(result), err=True)


@profile.command(short_help="What a profile says.")
@click.argument("source", metavar="FILE|REF")
@click.option("--runs", "all_runs", is_flag=True, help="List every run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@transfer_options
def show(source: str, all_runs: bool, as_json: bool, plain_http: bool, verbose: int, quiet: bool) -> None:
    """What a profile says: the one in FILE, or the one that is attached to REF.

    \b
    ckptfs profile show counter.json
    ckptfs profile show localhost:5000/counter:1 --runs
    """
    configure_logging(verbose, quiet)
    found = _load(source, plain_http)
    if as_json:
        click.echo(json.dumps(_facts(found), indent=2))
        return
    from rich.table import Table

    from ckptfs.cli.opening import console

    table = Table(box=None)
    if all_runs:
        for title in ("ms", "file", "offset", "length"):
            table.add_column(title, justify="left" if title == "file" else "right")
        for run in found.runs:
            table.add_row(str(run.at), _text(run.path), str(run.offset), str(run.length))
    else:
        for title in ("file", "runs", "bytes", "first ms"):
            table.add_column(title, justify="left" if title == "file" else "right")
        for file in _facts(found)["files"]:
            table.add_row(
                _text(os.fsencode(file["path"])), str(file["runs"]), size_text(file["bytes"]), str(file["at"])
            )
    console().print(table)
    if not quiet:
        click.echo(_sentence(found), err=True)


@profile.command(short_help="Attach a profile to an image.")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("reference", metavar="REF", type=RegistryReference())
@click.option("--replace", is_flag=True, help="Forget what earlier profiles say, instead of merging.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@transfer_options
def push(
    file: Path, reference: Reference, replace: bool, as_json: bool, plain_http: bool, verbose: int, quiet: bool
) -> None:
    """Attach the profile in FILE to the image REF, which is not changed; mounts of REF find it by themselves.

    \b
    ckptfs profile push counter.json localhost:5000/counter:1
    """
    configure_logging(verbose, quiet)
    if reference.kind != "registry":
        raise UsageError(f"{reference} has no registry to keep a profile", hint="name an image in a registry")
    from ckptfs.image.profiles import publish
    from ckptfs.sources.upload import RegistryTarget

    settings, counters = make_settings(), NetworkCounters()
    profile = _read_profile(file, settings.limits)
    source, manifest = _image(reference, plain_http)
    target = RegistryTarget(reference, settings, counters, plain_http=plain_http)
    published = publish(source, target, manifest, profile, settings.limits, merge=not replace)
    name = f"{reference.host}/{reference.repository}@{published.artifact.manifest.digest}"
    if as_json:
        facts = {"reference": str(reference), "image": str(manifest.digest), "artifact": name}
        click.echo(json.dumps({**facts, **_facts(published.profile)}, indent=2))
    else:
        click.echo(name)
        if not quiet:
            click.echo(_sentence(published.profile), err=True)


@profile.command(short_help="Draw the reads that `mount --record` has written.")
@click.argument("reads", metavar="READS", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path, dir_okay=False))
@verbosity_options
def plot(reads: Path, out: Path, verbose: int, quiet: bool) -> None:
    """Draw the reads that `mount --record READS` has written: where in which file, when, and who waited.

    OUT is a page (.html) or the picture alone (.svg); both load nothing. Needs matplotlib: pip install 'ckptfs[bench]'.

    \b
    ckptfs mount localhost:5000/counter:1 /mnt/ckpt --record reads.jsonl
    ckptfs profile plot reads.jsonl reads.html
    """
    configure_logging(verbose, quiet)
    from ckptfs.bench.charts import require_plots
    from ckptfs.bench.trace import read_trace, trace_page, trace_svg
    from ckptfs.cli.output import write

    if out.suffix not in (".html", ".svg"):
        raise UsageError(f"{out} is neither .html nor .svg", hint="the end of its name says what is written")
    require_plots()
    try:
        with reads.open(encoding="utf-8", errors="replace") as lines:
            trace = read_trace(lines)
    except OSError as error:
        raise UsageError(f"{reads} cannot be read: {error.strerror}", hint="`mount --record` writes it") from None
    if not trace:
        raise NotFoundError(f"{reads} has no reads", hint="it is complete when the mount has ended")
    title = f"Reads of {printable(reads.name)}"
    write(out, (trace_page(trace, title) if out.suffix == ".html" else trace_svg(trace)).encode())
    click.echo(out)


def _recorded(reference: Reference, command: tuple[str, ...], registry: RegistryOptions, *, strict: bool) -> "Profile":
    """What `command` reads of a mount of the image."""
    from ckptfs.cli.output import temporary
    from ckptfs.daemon.requests import MountRequest, command_start

    settings = registry.settings()
    # What ends this command must end the mount as well.
    ended = interruptible(signal.SIGTERM, signal.SIGHUP)
    with ended, tempfile.TemporaryDirectory(prefix="ckptfs-profile-", dir=temporary()) as folder:
        reads = Path(folder) / "reads.jsonl"
        request = MountRequest(
            reference,
            f"{folder}/mount",
            command_start(),
            cache_dir=registry.cache_path(),
            cache_key=registry.cache_key(),
            strict=strict,
            plain_http=registry.plain_http,
            record=reads,
            transfer_rate=_TRANSFER_RATE,
            settings=settings,
        )
        with _mounted(request) as mount:
            _run(command, mount)
        return _read_recording(reads, settings.limits)


@contextlib.contextmanager
def _mounted(request: "MountRequest") -> Iterator[Path]:
    from ckptfs.daemon.asking import umount
    from ckptfs.daemon.mounting import mount

    Path(request.mountpoint).mkdir()
    mount(request)
    try:
        yield Path(request.mountpoint)
    finally:
        umount(request.mountpoint)


def _run(command: tuple[str, ...], mount: Path) -> None:
    """RestoreError when the command fails; an interrupt only ends it."""
    words = [word.replace("{}", str(mount)) for word in command]
    try:
        process = subprocess.Popen(words, env={**os.environ, MOUNT_VARIABLE: str(mount)})
    except OSError as error:
        raise UsageError(f"{words[0]} cannot be run: {error.strerror}", hint="give a program after --") from None
    before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))  # a terminal tells both
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        return
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise RestoreError(f"{shlex.join(words)} failed with exit code {code}", hint="nothing has been written")


def _read_recording(file: Path, limits: Limits) -> "Profile":
    from ckptfs.prefetch.working_set import profile_of

    with file.open(encoding="utf-8", errors="replace") as lines:
        return profile_of(lines, limits)


def _read_profile(file: Path, limits: Limits) -> "Profile":
    from ckptfs.model.profile import decode_profile

    with file.open("rb") as stream:
        return decode_profile(stream.read(limits.profile_bytes + 1), limits)


def _load(source: str, plain_http: bool) -> "Profile":
    limits = make_settings().limits
    path = Path(source)
    try:
        if path.is_file():
            return _read_profile(path, limits)
    except OSError as error:
        from ckptfs.sources.files import translated

        raise translated(error, path) from None
    from ckptfs.image.profiles import attached

    try:
        reference = RegistryReference().convert(source, None, None)
    except UsageError as error:
        raise UsageError(f"there is no file {source}, and {error.message}", hint=error.hint) from None
    opened, manifest = _image(reference, plain_http)
    found = attached(opened, manifest.digest, limits)
    if found is None:
        raise NotFoundError(f"{reference} has no profile", hint="record one: ckptfs profile record --help")
    return found


def _image(reference: Reference, plain_http: bool) -> "tuple[Source, Manifest]":
    """The manifest that a mount on this machine would show, asked of the registry."""
    from ckptfs.push.image_files import select_manifest
    from ckptfs.sources import open_source

    settings = make_settings()
    source = open_source(reference, settings=settings, counters=NetworkCounters(), plain_http=plain_http)
    return source, select_manifest(source, settings)


def _default_name(reference: Reference | None) -> str:
    if reference is None:
        return "checkpoint.profile.json"
    name = (reference.repository or os.path.basename(reference.path)).rpartition("/")[2]
    return "-".join(part for part in (name, reference.tag) if part) + ".profile.json"


def _facts(found: "Profile") -> dict[str, Any]:
    files: dict[bytes, dict[str, Any]] = {}
    for run in found.runs:
        file = files.setdefault(run.path, {"path": os.fsdecode(run.path), "runs": 0, "bytes": 0, "at": run.at})
        file["runs"] += 1
        file["bytes"] += run.length
    return {
        "recordings": found.recordings,
        "runs": len(found.runs),
        "bytes": found.total,
        "files": list(files.values()),
    }


def _sentence(found: "Profile") -> str:
    times = "1 restore" if found.recordings == 1 else f"{found.recordings} restores"
    last = found.runs[-1].at if found.runs else 0
    return f"{len(found.runs)} runs, {size_text(found.total)} within {last} ms, of {times}"


def _text(path: bytes) -> "Text":
    """A name that does nothing to a terminal: profiles come from whoever may push."""
    from rich.text import Text

    return Text(printable(os.fsdecode(path)))
