"""ckptfs memparse: the memory of checkpointed processes, read and searched where it lies."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ckptfs.cli.opening import console, image_options, say_traffic, with_images
from ckptfs.cli.options import reference_argument
from ckptfs.cli.output import appearing, create, tidy
from ckptfs.cli.progress import Line
from ckptfs.errors import NotFoundError, UsageError
from ckptfs.model.oci import Reference
from ckptfs.terminal import size_text

if TYPE_CHECKING:
    import re

    from ckptfs.image import OpenImage
    from ckptfs.inspection.image_files import ImageFiles
    from ckptfs.inspection.memory import Match
    from ckptfs.inspection.processes import Process
    from ckptfs.inspection.source import Images


@click.command(short_help="Show or search the memory of the processes in a checkpoint.")
@reference_argument
@click.option(
    "-p",
    "--pid",
    metavar="PID",
    type=click.IntRange(1),
    help="Only this process; without --search its memory is shown.",
)
@click.option("--container", metavar="NAME", help="In the checkpoint of a pod: only this container.")
@click.option("-s", "--search", metavar="TEXT", help="Search for a string.")
@click.option("-r", "--search-regex", metavar="REGEX", help="Search for a regular expression over bytes.")
@click.option("-x", "--search-hex", metavar="HEX", help="Search for bytes: 'de ad be ef'.")
@click.option(
    "-c", "--context", metavar="BYTES", type=click.IntRange(0, 4096), default=0, help="To show around each match."
)
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(1),
    default=10_000,
    show_default=True,
    help="Stop after so many matches.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the raw memory to FILE.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@image_options
@tidy
def memparse(
    reference: Reference,
    pid: int | None,
    container: str | None,
    search: str | None,
    search_regex: str | None,
    search_hex: str | None,
    context: int,
    limit: int,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """The memory of the processes in a checkpoint: how much each has, a search, or the bytes themselves.

    A search reads all memory of the processes that it goes through; sizes are told without reading any.

    \b
    ckptfs memparse localhost:5000/counter:1
    ckptfs memparse localhost:5000/counter:1 --search password --context 32
    ckptfs memparse localhost:5000/counter:1 --pid 1 --output memory.raw
    """
    given = [text is not None for text in (search, search_regex, search_hex)]
    if sum(given) > 1:
        raise UsageError("more than one of --search, --search-regex and --search-hex", hint="search for one at a time")
    if any(given) and output is not None:
        raise UsageError("--output writes memory, not matches", hint="leave out the search, or write `> FILE`")
    if pid is None and output is not None:
        raise UsageError(
            "--output needs a process", hint="name it with --pid; without options the processes are listed"
        )
    from ckptfs.inspection.memory import hex_pattern, regex_pattern, text_pattern

    which = _Wanted(pid, container)
    progress = Line(quiet=options["quiet"])  # matches and dumps are printed while they are found
    work: Callable[[ImageFiles], dict[str, Any]]
    if any(given):
        if search is not None:
            pattern = text_pattern(search)
        else:
            pattern = hex_pattern(search_hex) if search_hex is not None else regex_pattern(search_regex or "")
        work = partial(
            _search, which=which, pattern=pattern, context=context, limit=limit, as_json=as_json, progress=progress
        )
    elif output is not None and pid is not None:
        work = partial(_write, which=which, output=output, as_json=as_json)
    elif pid is not None and not as_json:
        work = partial(_dump, which=which, progress=progress)
    else:
        work = partial(_table, which=which, as_json=as_json, progress=progress)

    async def run(images: "Sequence[OpenImage]") -> dict[str, Any]:
        from ckptfs.inspection.image_files import in_thread

        return await in_thread(images[0], work)

    found, traffic = with_images([reference], run, progress=progress, only_checkpoints=True, **options)
    if as_json:
        click.echo(json.dumps({"reference": str(reference), **found, **traffic.to_json()}, indent=2))
    else:
        say_traffic(traffic, options["quiet"])


class _Wanted(NamedTuple):
    """Processes: all, or those with this number, of all containers of a pod or of one."""

    pid: int | None
    container: str | None


def _processes(files: "ImageFiles", which: _Wanted) -> "Iterator[tuple[str, Images, Process]]":
    """(name of the container in a pod, its images, process) of those that have memory."""
    from ckptfs.inspection.overview import containers, inspect, open_images
    from ckptfs.inspection.parts import Part

    limits, found = files.image.options.settings.limits, False
    names = {prefix: prefix.rstrip("/") for prefix in containers(files)}
    if which.container is not None and which.container not in names.values():
        there = ", ".join(filter(None, names.values())) or "it is not of a pod"
        raise NotFoundError(f"the checkpoint has no container {which.container}", hint=f"there are: {there}")
    for prefix, name in names.items():
        if which.container not in (None, name):
            continue
        for process in inspect(files, prefix, limits, parts=Part.PROCESSES).processes:
            if which.pid in (None, process.pid):
                found = True
                yield name, open_images(files, prefix, limits), process
    if not found:
        who = "process" if which.pid is None else f"process {which.pid}"
        raise NotFoundError(f"the checkpoint has no {who}", hint="`ckptfs inspect REF --ps-tree` lists them")


def _table(files: "ImageFiles", which: _Wanted, as_json: bool, progress: Line) -> dict[str, Any]:
    from ckptfs.inspection.render import print_memory_sizes

    found = list(_processes(files, which))
    if not as_json:
        progress.printing()
        print_memory_sizes(console(), [process for _, _, process in found])
        return {}
    return {
        "processes": [
            {
                "container": name,
                "pid": process.pid,
                "command": process.name,
                "memory_size": process.memory,
                "shared_memory_size": process.shared,
            }
            for name, _, process in found
        ]
    }


def _search(
    files: "ImageFiles",
    which: _Wanted,
    pattern: "re.Pattern[bytes]",
    context: int,
    limit: int,
    as_json: bool,
    progress: Line,
) -> dict[str, Any]:
    from ckptfs.inspection.memory import ProcessMemory, search
    from ckptfs.inspection.render import print_matches

    def matches() -> "Iterator[Match]":
        for _, images, process in _processes(files, which):
            if process.memory or which.pid is not None:
                for match in search(ProcessMemory(images, process.pid), pattern, context):
                    if not as_json:
                        progress.printing()
                    yield match
        progress.printing()

    first = islice(matches(), min(limit, sys.maxsize))
    found = [match.to_json() for match in first] if as_json else []
    count = len(found) if as_json else print_matches(console(), first)
    if not as_json and count in (0, limit):
        click.echo(f"stopped after {count} matches; raise --limit" if count else "no match", err=True)
    return {"matches": found, "complete": count < limit}


def _dump(files: "ImageFiles", which: _Wanted, progress: Line) -> dict[str, Any]:
    from ckptfs.inspection.memory import ProcessMemory
    from ckptfs.inspection.render import hex_lines

    for _, images, process in _processes(files, which):
        for vaddr, data, _ in ProcessMemory(images, process.pid).windows():
            progress.printing()
            for line in hex_lines(vaddr, data):
                click.echo(line)
    return {}


def _write(files: "ImageFiles", which: _Wanted, output: Path, as_json: bool) -> dict[str, Any]:
    """The memory, area after area; returns where each one is in the file."""
    from ckptfs.inspection.memory import ProcessMemory

    (name, images, process), *others = _processes(files, which)
    if others:
        names = ", ".join([name, *(other for other, *_ in others)])
        raise UsageError(f"there is a process {process.pid} in {names}", hint="name one with --container")
    memory = ProcessMemory(images, process.pid)
    with appearing(output) as new, open(create(new), "wb") as out:  # only its owner may read what was in a memory
        for _, data, _ in memory.windows():
            out.write(data)
    areas, offset = [], 0
    for vaddr, length in memory.areas():
        areas.append({"address": f"{vaddr:#018x}", "length": length, "offset": offset})
        offset += length
    if not as_json:
        click.echo(f"wrote {size_text(offset)} of process {process.pid} to {output}", err=True)
    return {"output": str(output), "areas": areas}
