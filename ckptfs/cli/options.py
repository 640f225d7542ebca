"""Options that several commands take, and what they mean as values: one spelling, one meaning everywhere."""

import logging
import os
import shlex
import stat
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import click

from ckptfs import configuration
from ckptfs.configuration import LEAST_CACHE, parse_address, parse_deadline, parse_size
from ckptfs.errors import UsageError
from ckptfs.model.oci import Reference
from ckptfs.redaction import log_to_stderr
from ckptfs.settings import Settings, default_cache_dir
from ckptfs.telemetry import NetworkCounters

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ckptfs.engine.cache import ChunkCache
    from ckptfs.sources import OpenSource

F = TypeVar("F", bound=Callable[..., Any])

_CONFIGURATION = "ckptfs.configuration"  # where a command's context keeps what has been read
_KEY_BYTES = 64 * 1024


class ByteSize(click.ParamType["int | str"]):
    """`512M`, `10GiB`, `1048576`: bytes, powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Address(click.ParamType["tuple[str, int] | str"]):
    """`127.0.0.1:9180`, `[::1]:9180`, `9180`: an IP address, loopback if there is none, and a port."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        try:
            return value if isinstance(value, tuple) else parse_address(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class RegistryReference(click.ParamType["Reference | str"]):
    """host/repo[:tag][@digest], oci:DIR[:TAG] or archive:FILE."""

    name = "ref"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Reference:
        if isinstance(value, Reference):
            return value
        reference = Reference.parse(str(value))
        if reference.kind == "oci":
            from ckptfs.sources.layout import on_disk

            reference = on_disk(reference)
        # The daemon of a mount works in /.
        return reference._replace(path=os.path.abspath(reference.path)) if reference.path else reference


def complete_mounts(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """For a shell: the directories where something is mounted, or any other where nothing of the kind is typed."""
    from click.shell_completion import CompletionItem

    from ckptfs.control.client import known_mounts

    found = [state["mountpoint"] for _, state in known_mounts() if state["mountpoint"].startswith(incomplete)]
    return [CompletionItem(path) for path in found] or [CompletionItem(incomplete, type="dir")]


def reference_argument(function: F) -> F:
    return click.argument("reference", metavar="REF", type=RegistryReference())(function)


def verbosity_options(function: F) -> F:
    function = click.option("-v", "--verbose", count=True, help="Say more; twice for debugging.")(function)
    return click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")(function)


def config_option(function: F) -> F:
    """--config: what it names, the other files and the environment are the defaults of the command's options."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_configure,
        help="Read FILE too; it wins over the system's and the user's (see `ckptfs config show`).",
    )(function)


def _configure(ctx: click.Context, _: click.Parameter, file: Path | None) -> None:
    found = configuration.load(file)
    ctx.meta[_CONFIGURATION] = found
    ctx.default_map = found.option_defaults()


def current_configuration() -> configuration.Configuration:
    """What `config_option` has read for the running command; only defaults where there is none."""
    context = click.get_current_context(silent=True)
    found = context.meta.get(_CONFIGURATION) if context is not None else None
    return found or configuration.DEFAULTS


def cache_dir_option(function: F) -> F:
    return click.option(
        "--cache-dir",
        type=click.Path(path_type=Path, file_okay=False),
        default=None,
        help=f"The node's cache [default: {default_cache_dir()}]",
    )(function)


def plain_http_option(function: F) -> F:
    return click.option(
        "--plain-http", is_flag=True, help="Talk HTTP instead of HTTPS (loopback registries need no flag)."
    )(function)


def transfer_options(function: F) -> F:
    """What commands take that move whole images and leave the node's cache alone.

    --cache-dir changes nothing: scripts may give it to every command.
    """
    ignored = click.option("--cache-dir", type=click.Path(path_type=Path), hidden=True, expose_value=False)
    return verbosity_options(config_option(plain_http_option(ignored(function))))


def view_options(function: F) -> F:
    """--view and --base: what of an image is shown."""
    function = click.option(
        "--base",
        type=RegistryReference(),
        help="The base image, if the image names none: of the rootfs view, and of rootfs-diff/'s directories.",
    )(function)
    return click.option(
        "--view",
        type=click.Choice(["checkpoint", "raw", "rootfs"]),
        default="checkpoint",
        show_default=True,
        help="checkpoint: the same tree whatever the producer; raw: exactly the image; rootfs: the container's root.",
    )(function)


def verify_option(function: F) -> F:
    """--verify: what is done with images whose bytes can be handed out before anything has vouched for them."""
    return click.option(
        "--verify",
        type=click.Choice(["auto", "strict"]),
        default="auto",
        show_default=True,
        help="strict refuses layers that cannot be verified chunk by chunk.",
    )(function)


def metrics_option(function: F) -> F:
    return click.option(
        "--metrics",
        type=Address(),
        metavar="[IP:]PORT",
        help="Serve /metrics for Prometheus there, on loopback without IP; 0: any port, see `ckptfs status`.",
    )(function)


def read_deadline_option(function: F) -> F:
    """--read-deadline: the command gets seconds, infinity for `hard`."""

    def parsed(_: click.Context, __: click.Parameter, text: str) -> float:
        try:
            return parse_deadline(text)
        except ValueError as error:
            raise UsageError(f"--read-deadline: {error}") from None

    return click.option(
        "--read-deadline",
        default="60",
        show_default=True,
        callback=parsed,
        help="Seconds until a read gets EIO, or `hard`.",
    )(function)


class RegistryOptions(NamedTuple):
    """How a command reaches registries and the node's cache: the values of `registry_options`, as they were typed.

    cache_size, memory  bytes; None where nothing was said.
    """

    plain_http: bool
    cache_dir: Path | None
    cache_size: int | None
    cache_key_file: Path | None
    memory: int | None

    def settings(self, read_deadline: float | None = None) -> Settings:
        """The defaults with what the command line says; `read_deadline` in seconds. UsageError."""
        return make_settings(self.cache_size, self.memory, read_deadline)

    def cache_path(self) -> Path:
        """Absolute: a daemon works in /."""
        return (self.cache_dir or default_cache_dir()).absolute()

    def cache_key(self) -> bytes | None:
        """The secret that encrypts the cache, None for none. UsageError."""
        return read_cache_key(self.cache_key_file)

    def open_cache(self) -> "ChunkCache":
        """The node's cache for a command that reads contents. CacheError, UsageError."""
        from ckptfs.engine.cache import ChunkCache

        size = self.settings().sizes.disk_cache
        cache = ChunkCache.open(self.cache_path(), size=size, secret=self.cache_key())
        try:
            return cache.require_key()
        except BaseException:
            cache.close()
            raise

    def reach(self, counters: NetworkCounters) -> "OpenSource":
        """What opens the source of a reference; its requests are counted in `counters`."""
        from ckptfs.sources import open_source

        return partial(open_source, settings=self.settings(), counters=counters, plain_http=self.plain_http)


def registry_options(function: F) -> F:
    """What every command that touches a registry or the cache takes; the command gets it as `registry`."""

    @wraps(function)
    def command(**options: Any) -> Any:
        found = RegistryOptions(**{name: options.pop(name) for name in RegistryOptions._fields})
        return function(registry=found, **options)

    for option in (
        config_option,
        plain_http_option,
        cache_dir_option,
        click.option(
            "--cache-size", type=ByteSize(), default=None, help="Most that the cache takes on disk, e.g. 10G."
        ),
        click.option(
            "--cache-key",
            "cache_key_file",
            type=click.Path(path_type=Path),
            default=None,
            help="Encrypt the cache with the secret in FILE (at least 16 random bytes).",
        ),
        click.option(
            "--memory", type=ByteSize(), default=None, help="Most that decoded chunks take in memory, e.g. 64M."
        ),
    ):
        command = option(command)
    return cast("F", verbosity_options(command))


def make_settings(
    cache_size: int | None = None, memory: int | None = None, read_deadline: float | None = None
) -> Settings:
    """The defaults with what the command line says."""
    settings = Settings()
    sizes = settings.sizes
    if cache_size is not None:
        if cache_size < LEAST_CACHE:
            raise UsageError(f"--cache-size {cache_size} is too small", hint="give at least 1M")
        sizes = sizes._replace(disk_cache=cache_size)
    if memory is not None:
        if memory < LEAST_CACHE:
            raise UsageError(f"--memory {memory} is too small", hint="give at least 1M")
        sizes = sizes._replace(memory_cache=memory)
    timeouts = settings.timeouts
    if read_deadline is not None:
        timeouts = timeouts._replace(read_deadline=read_deadline)
    return settings._replace(sizes=sizes, timeouts=timeouts, registries=current_configuration().registries)


def read_cache_key(file: Path | None) -> bytes | None:
    """The secret in the file that --cache-key names, without a newline at its end. UsageError."""
    if file is None:
        return None
    try:
        with open(file, "rb") as stream:
            found = os.fstat(stream.fileno())
            if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
                hint = f"run: chmod 600 {shlex.quote(str(file))}"
                raise UsageError(f"the cache key {file} is open to other users", hint=hint)
            secret = stream.read(_KEY_BYTES + 1)
    except OSError as error:
        hint = "make one: head -c 32 /dev/urandom > FILE"
        raise UsageError(f"the cache key {file} cannot be read: {error.strerror}", hint=hint) from None
    if len(secret) > _KEY_BYTES:
        raise UsageError(f"the cache key {file} is larger than 64 KiB", hint="32 random bytes are enough")
    return secret.removesuffix(b"\n")


def configure_logging(verbose: int, quiet: bool) -> None:
    """Log lines to stderr: warnings, with -v what happens, with -vv every request."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    log_to_stderr(level)
