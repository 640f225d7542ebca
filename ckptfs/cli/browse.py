"""ckptfs ls, cat and cp: the image without a mount and without root."""

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ckptfs.cli.opening import image_options, with_image
from ckptfs.cli.options import reference_argument, view_options
from ckptfs.cli.output import tidy
from ckptfs.cli.progress import Line
from ckptfs.model.oci import Reference
from ckptfs.model.times import as_datetime
from ckptfs.terminal import printable


@click.command()
@reference_argument
@click.argument("path", default="/")
@click.option("-l", "--long", "long", is_flag=True, help="Modes, owners, sizes and times.")
@click.option("-R", "--recursive", is_flag=True, help="Everything below as well.")
@click.option("--json", "as_json", is_flag=True, help="A list of objects.")
@view_options
@image_options
def ls(reference: Reference, path: str, long: bool, recursive: bool, as_json: bool, **options: Any) -> None:
    """List a directory of the image.

    \b
    ckptfs ls localhost:5000/counter:1 checkpoint -l
    """

    async def work(image: Any) -> list[dict[str, Any]]:
        node = await _find(image, path)
        if not node.inode.is_dir:
            return [_facts(node, node.name)]
        found, pending = [], [(node, b"")]
        while pending:
            directory, prefix = pending.pop()
            for child in await image.listing(directory):
                name = prefix + child.name
                if child.inode.is_dir and (long or as_json):
                    await image.describe(child)
                found.append(_facts(child, name))
                if recursive and child.inode.is_dir:
                    pending.append((child, name + b"/"))
        return sorted(found, key=lambda facts: str(facts["name"]))

    entries = with_image(reference, work, **options)
    if as_json:
        click.echo(json.dumps(entries, indent=2))
        return
    for entry in entries:
        tail = f" -> {entry['link']}" if "link" in entry else ""
        if long:
            when = as_datetime(entry["mtime"]).isoformat(" ")[: len("2000-01-01 00:00")]
            head = f"{entry['mode']} {entry['uid']:>5} {entry['gid']:>5} {entry['size']:>12} {when}"
            _show(f"{head} {entry['name']}{tail}")
        else:
            _show(entry["name"] + ("/" if entry["type"] == "dir" else ""))


def _show(line: str) -> None:
    """A name of somebody else's choice must not act on the user's terminal; a pipe gets it as it is."""
    if sys.stdout.isatty():
        line = printable(line)
    click.echo(line, color=True)  # otherwise click takes escapes out of names in a pipe


@click.command()
@reference_argument
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@view_options
@image_options
def cat(reference: Reference, paths: tuple[str, ...], **options: Any) -> None:
    """Write files of the image to standard output.

    \b
    ckptfs cat localhost:5000/counter:1 config.dump | jq .name
    """

    progress = Line(quiet=options["quiet"])

    async def work(image: Any) -> None:
        for path in paths:
            node = await _find(image, path)
            await _copy(image, node, path, sys.stdout.buffer, progress.printing)
        sys.stdout.buffer.flush()

    with_image(reference, work, progress=progress, **options)


@click.command(short_help="Copy a file or a directory out of the image.")
@reference_argument
@click.argument("path")
@click.argument("target", type=click.Path(path_type=Path))
@view_options
@image_options
@tidy
def cp(reference: Reference, path: str, target: Path, **options: Any) -> None:
    """Copy a file, or a directory with all below it, out of the image.

    Times and permission bits are kept, owners only for root; devices, pipes and set-user-id bits are left out. An
    ordinary user can enter all directories.

    \b
    ckptfs cp localhost:5000/counter:1 checkpoint ./checkpoint
    """

    async def work(image: Any) -> None:
        from ckptfs.cli.output import appearing
        from ckptfs.errors import UsageError

        node = await _find(image, path)
        if not (node.inode.is_dir or node.inode.is_file or stat.S_ISLNK(node.inode.mode)):
            raise UsageError(f"{path} is a device or a pipe", hint="name a file, a link or a directory")
        with appearing(target / os.fsdecode(node.name) if os.path.isdir(target) else target) as new:
            directories: list[tuple[Path, Any]] = []
            await _export(image, node, new, path, directories)
            for directory, inode in reversed(directories):
                _dress(directory, inode)

    with_image(reference, work, **options)


async def _find(image: Any, path: str) -> Any:
    from ckptfs.errors import NotFoundError

    relative = b"/".join(part for part in os.fsencode(path).split(b"/") if part not in (b"", b"."))
    node = await image.find(relative)
    if node is None:
        raise NotFoundError(f"the image has no {path}", hint="`ckptfs ls REF` shows what it has")
    return node


async def _copy(image: Any, node: Any, path: str, out: Any, before: Callable[[], None] = lambda: None) -> None:
    from ckptfs.errors import UsageError
    from ckptfs.settings import MiB

    if not node.inode.is_file:
        hint = f"`ckptfs ls REF {path}` lists it" if node.inode.is_dir else "`ckptfs ls -l` shows what it is"
        raise UsageError(f"{path} is {'a directory' if node.inode.is_dir else 'not a regular file'}", hint=hint)
    handle = await image.open(node.inode)
    offset = 0
    while offset < node.inode.size:
        data = await image.reader.serve(handle, offset, MiB)
        before()
        out.write(data)
        offset += len(data)


async def _export(image: Any, node: Any, target: Path, path: str, directories: list[tuple[Path, Any]]) -> None:
    """`directories` collects those that were made: their modes, which may forbid to write, come last."""
    inode = node.inode
    if inode.is_dir:
        target.mkdir(mode=0o700)
        directories.append((target, inode))
        for child in await image.listing(node):
            name = os.fsdecode(child.name)
            await _export(image, child, target / name, f"{path}/{name}", directories)
    elif stat.S_ISLNK(inode.mode):
        os.symlink(inode.target, target)
    elif inode.is_file:
        from ckptfs.cli.output import create

        with open(create(target), "wb") as out:
            await _copy(image, node, path, out)
        _dress(target, inode)
    else:
        click.echo(f"left out: {printable(path)} (a device or a pipe)", err=True)


def _dress(target: Path, inode: Any) -> None:
    mode = stat.S_IMODE(inode.mode) & 0o1777
    if os.geteuid() == 0:
        os.chown(target, inode.uid, inode.gid)
    elif inode.is_dir:
        mode |= 0o700  # runc makes checkpoint/ of mode 0600, which only root can enter, and remove
    os.chmod(target, mode)
    os.utime(target, ns=(inode.mtime_ns, inode.mtime_ns))


def _facts(node: Any, name: bytes) -> dict[str, Any]:
    inode = node.inode
    facts = {
        "name": os.fsdecode(name),
        "type": inode.type_name,
        "mode": stat.filemode(inode.mode),
        "uid": inode.uid,
        "gid": inode.gid,
        "size": inode.size,
        "mtime": inode.mtime_ns // 1_000_000_000,
    }
    if stat.S_ISLNK(inode.mode):
        facts["link"] = os.fsdecode(inode.target)
    return facts
