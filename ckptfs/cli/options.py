"""Options that several commands take, and what they mean as values: one spelling, one meaning everywhere."""

import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from ckptfs.errors import UsageError
from ckptfs.model.oci import Reference
from ckptfs.settings import Settings, default_cache_dir

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class ByteSize(click.ParamType["int | str"]):
    """`512M`, `10GiB`, `1048576`: bytes, powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", str(value).strip().lower())
        if not match:
            self.fail(f"{value!r} is not a size; write for example 512M or 10G", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class RegistryReference(click.ParamType["Reference | str"]):
    """host/repo[:tag][@digest], oci:DIR[:TAG] or archive:FILE."""

    name = "ref"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Reference:
        if isinstance(value, Reference):
            return value
        reference = Reference.parse(str(value))
        # The daemon of a mount works in /.
        return replace(reference, path=os.path.abspath(reference.path)) if reference.path else reference


def reference_argument(function: F) -> F:
    return click.argument("reference", metavar="REF", type=RegistryReference())(function)


def verbosity_options(function: F) -> F:
    function = click.option("-v", "--verbose", count=True, help="Say more; twice for debugging.")(function)
    return click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")(function)


def registry_options(function: F) -> F:
    """What every command that touches a registry or the cache takes."""
    for option in (
        click.option(
            "--plain-http", is_flag=True, help="Talk HTTP instead of HTTPS (loopback registries need no flag)."
        ),
        click.option(
            "--cache-dir",
            type=click.Path(path_type=Path, file_okay=False),
            default=None,
            help=f"The node's cache [default: {default_cache_dir()}]",
        ),
        click.option(
            "--cache-size", type=ByteSize(), default=None, help="Most that the cache takes on disk, e.g. 10G."
        ),
        click.option(
            "--memory", type=ByteSize(), default=None, help="Most that decoded chunks take in memory, e.g. 64M."
        ),
    ):
        function = option(function)
    return verbosity_options(function)


def make_settings(
    cache_size: int | None = None, memory: int | None = None, read_deadline: float | None = None
) -> Settings:
    """The defaults with what the command line says."""
    settings = Settings()
    sizes = settings.sizes
    if cache_size is not None:
        if cache_size < 1 << 20:
            raise UsageError(f"--cache-size {cache_size} is too small", hint="give at least 1M")
        sizes = replace(sizes, disk_cache=cache_size)
    if memory is not None:
        if memory < 1 << 20:
            raise UsageError(f"--memory {memory} is too small", hint="give at least 1M")
        sizes = replace(sizes, memory_cache=memory)
    timeouts = settings.timeouts
    if read_deadline is not None:
        timeouts = replace(timeouts, read_deadline=read_deadline)
    return replace(settings, sizes=sizes, timeouts=timeouts)


def configure_logging(verbose: int, quiet: bool) -> None:
    """Log lines to stderr: warnings, with -v what happens, with -vv every request."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    # urllib3 logs whole URLs at DEBUG, with the signatures of signed ones.
    logging.getLogger("urllib3").setLevel(logging.WARNING)


def deadline(text: str) -> float:
    """Seconds, or `hard` for a reader that must never get EIO because the registry is away."""
    if text == "hard":
        return float("inf")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise UsageError(f"--read-deadline {text!r} is not a number of seconds", hint="write for example 60, or hard")
    return seconds
