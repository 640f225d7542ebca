"""The command line: one module per command, imported when it runs, so that `mount` pays only for what it needs.

Exit codes: 0 ok, 1 bug, 2 usage, 3 not found, 4 not authorised, 5 unavailable, 6 integrity, 7 format, 8 mount or cache.
"""

import importlib
import logging
import os
import sys
from typing import Any

import click

from ckptfs import __version__
from ckptfs.errors import CkptfsError, UsageError
from ckptfs.redaction import redact

PROGRAM = "ckptfs"

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


class _Lazy(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line first
            raise click.Abort from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command = getattr(importlib.import_module(f"ckptfs.cli.{module}"), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ckptfs")
def main() -> None:
    """Mount container checkpoints that live in a registry, and read only what is asked for.

    \b
    ckptfs mount registry.example/app/ckpt:1 /mnt/ckpt
    criu restore -D /mnt/ckpt/checkpoint -W /var/tmp/work --lazy-pages
    ckptfs umount /mnt/ckpt
    """


def run(arguments: list[str], program: str = PROGRAM) -> int:
    """Run one command; returns the exit code. Every failure is one line on stderr. `program`: how it was called."""
    try:
        result = main.main(args=arguments, prog_name=program, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return UsageError.exit_code
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx is not None else program
        return fail(f"{error.format_message()} See `{where} --help`.", UsageError.exit_code)
    except CkptfsError as error:
        return fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has had enough (`ckptfs ls | head`); nothing more may be written, at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        logging.getLogger("ckptfs").debug("bug", exc_info=error)
        return fail(f"internal error: {type(error).__name__}: {error}; run with -v for the traceback", 1)


def fail(message: str, code: int) -> int:
    """One line, whatever is in the message."""
    click.echo(f"ckptfs: {redact(' '.join(message.split()))}", err=True)
    return code
