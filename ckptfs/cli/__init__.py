"""The command line: one module per command, imported when it runs, so that `mount` pays only for what it needs.

Exit codes: 0 ok, 1 bug, 2 usage, 3 not found, 4 not authorised, 5 unavailable, 6 integrity, 7 format, 8 mount or cache.
"""

import contextlib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import click

from ckptfs import __version__
from ckptfs.errors import CkptfsError, MountError, UsageError
from ckptfs.redaction import redact

PROGRAM = "ckptfs"
_COLOUR = False if os.environ.get("NO_COLOR") else None  # None: on a terminal

# Command -> module of this package that has a function of that name (dashes as underscores).
COMMANDS = {
    "mount": "mount",
    "store": "store",
    "umount": "umount",
    "status": "status",
    "ls": "browse",
    "cat": "browse",
    "cp": "browse",
    "inspect": "inspect",
    "show": "inspect",
    "diff": "diff",
    "memparse": "memparse",
    "push": "push",
    "pull": "pull",
    "index": "index",
    "restore": "restore",
    "profile": "profile",
    "check": "check",
    "stub": "stub",
    "bench": "bench",
    "cache": "cache",
    "config": "config",
    "completion": "completion",
}


# What writing to a file, a pipe or a terminal fails with: standard output is what nobody else translates.
_UNWRITABLE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF))


class _ReaderGone(Exception):
    """Whoever reads our output has had enough (`ckptfs ls | head`)."""


@contextlib.contextmanager
def _not_for_click() -> Iterator[None]:
    """What click would answer in its own way."""
    try:
        yield
    except KeyboardInterrupt:  # an empty line
        raise click.Abort from None
    except BrokenPipeError:  # an exit code that means a bug
        raise _ReaderGone from None


class _Lazy(click.Group):
    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _not_for_click():  # it prints --help
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _not_for_click():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command = getattr(importlib.import_module(f"ckptfs.cli.{module}"), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command


@click.command(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "color": _COLOUR},
)
@click.version_option(__version__, prog_name="ckptfs")
def main() -> None:
    """Mount container checkpoints that live in a registry, and read only what is asked for.

    \b
    ckptfs mount registry.example/app/ckpt:1 /mnt/ckpt
    criu lazy-pages --daemon -D /mnt/ckpt/checkpoint -W /var/tmp/w
    criu restore -d --lazy-pages -D /mnt/ckpt/checkpoint -W /var/tmp/w
    ckptfs umount /mnt/ckpt    # when criu lazy-pages has ended
    """


def run(arguments: list[str], program: str = PROGRAM) -> int:
    """Run one command; returns the exit code. Every failure is one line on stderr. `program`: how it was called."""
    try:
        return _run(arguments, program)
    except (_ReaderGone, BrokenPipeError):
        silence(sys.stdout)
        return 0
    except CkptfsError as error:
        return fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno in _UNWRITABLE and error.filename is None:
            silence(sys.stdout)
            return fail(f"cannot write the output: {error.strerror}", MountError.exit_code)
        if error.errno == errno.ENOENT and _nowhere():
            return fail("the directory you are in is not there any more; cd to one that is", UsageError.exit_code)
        return _bug(error)
    except Exception as error:
        return _bug(error)


def _run(arguments: list[str], program: str) -> int:
    try:
        result = main.main(args=arguments, prog_name=program, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return UsageError.exit_code
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx is not None else program
        sentence = error.format_message()
        stop = "" if sentence.endswith((".", "?")) else "."
        return fail(f"{sentence}{stop} See `{where} --help`.", UsageError.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return fail("interrupted", 130)


def fail(message: str, code: int) -> int:
    """One line, whatever is in the message."""
    try:
        click.echo(f"ckptfs: {redact(' '.join(line.strip() for line in message.splitlines()))}", err=True)
    except OSError:  # the exit code is all that is left to tell
        silence(sys.stderr)
    return code


def _nowhere() -> bool:
    """Whether relative paths mean nothing: the working directory has been removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _bug(error: Exception) -> int:
    logging.getLogger("ckptfs").info("bug", exc_info=error)
    return fail(f"internal error: {type(error).__name__}: {error}; run with -v for the traceback", 1)


def silence(stream: TextIO) -> None:
    """Nothing more can be written there, and what is still buffered must not fail when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
