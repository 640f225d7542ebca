"""Man pages out of the commands' own help: `python scripts/man_pages.py DIR` writes DIR/man1/ckptfs.1, ..., DIR/man8.

So that the pages say what `--help` says. For packagers and for docs; nothing else calls it.
"""

import inspect
import sys
from pathlib import Path

import click

from ckptfs import __version__
from ckptfs.cli import PROGRAM, main
from ckptfs.cli.mount_helper import is_mount_option


def page(context: click.Context, command: click.Command, others: list[str]) -> str:
    """One page in man(7)'s language."""
    name = context.command_path.replace(" ", "-")
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [
        f'.TH {_escape(name.upper())} 1 "" "{PROGRAM} {__version__}" "User Commands"',
        ".SH NAME",
        f"{_escape(name)} \\- {_escape(command.get_short_help_str(limit=120).rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {_escape(context.command_path)}",
        _escape(usage),
        ".SH DESCRIPTION",
        *_paragraphs(inspect.cleandoc(command.help or "")),
        ".SH OPTIONS",
    ]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            lines += [".TP", f"\\fB{_escape(record[0])}\\fR", _escape(record[1])]
    commands = _commands(context, command)
    if commands:
        lines.append(".SH COMMANDS")
    for word, sub in commands:
        lines += [".TP", f"\\fB{_escape(word)}\\fR", _escape(sub.get_short_help_str(limit=120))]
    lines += [
        ".SH EXIT STATUS",
        "0 ok, 1 bug, 2 usage, 3 not found, 4 not authorised, 5 unavailable, 6 integrity, 7 format, "
        "8 mount or cache, 130 interrupted.",
        ".SH SEE ALSO",
        ", ".join(f"\\fB{_escape(other)}\\fR(1)" for other in others if other != name),
    ]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """File name -> page, of ckptfs and of every command."""
    top = click.Context(main, info_name=PROGRAM, max_content_width=200)
    found: list[tuple[click.Context, click.Command]] = [(top, main)]
    for context, command in found:  # grows while it is gone through
        for word, sub in _commands(context, command):
            found.append((click.Context(sub, info_name=word, parent=context), sub))
    names = sorted(context.command_path.replace(" ", "-") for context, _ in found)
    made = {f"{c.command_path.replace(' ', '-')}.1": page(c, command, names) for c, command in found}
    return made | {"mount.ckptfs.8": helper_page()}


def helper_page() -> str:
    """mount.ckptfs(8): what mount(8) and fstab(5) understand, out of the options of `ckptfs mount`."""
    command = main.get_command(click.Context(main), "mount")
    assert command is not None
    context = click.Context(command, info_name="mount")
    lines = [
        f'.TH MOUNT.CKPTFS 8 "" "{PROGRAM} {__version__}" "System Administration"',
        ".SH NAME",
        "mount.ckptfs \\- mount a checkpoint image with mount(8) or out of fstab(5)",
        ".SH SYNOPSIS",
        ".nf",
        "\\fBmount \\-t ckptfs\\fR [\\fB\\-o\\fR OPTIONS] REF DIR",
        "REF DIR \\fBckptfs\\fR OPTIONS 0 0    (a line of /etc/fstab)",
        ".fi",
        ".SH DESCRIPTION",
        "mount(8) looks for its helpers in /sbin, so it has to be there:",
        ".PP",
        ".nf",
        _escape('ln -s "$(command -v mount.ckptfs)" /sbin/mount.ckptfs'),
        ".fi",
        ".PP",
        "What every file system understands (ro, noauto, nofail, _netdev, x\\-systemd.*) is taken and changes nothing.",
        ".SH OPTIONS",
    ]
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)) is not None:
            for name in (*parameter.opts, *parameter.secondary_opts):
                if is_mount_option(name):
                    word = name.removeprefix("--").replace("-", "_") + ("" if parameter.is_flag else "=VALUE")
                    lines += [".TP", f"\\fB{_escape(word)}\\fR", _escape(record[1])]
    see = ".SH SEE ALSO\n\\fBckptfs-mount\\fR(1), \\fBmount\\fR(8), \\fBfstab\\fR(5)"
    return "\n".join([*lines, ".SH EXIT STATUS", "That of mount(8): 0 ok, 1 usage, 32 the mount failed.", see]) + "\n"


def _commands(context: click.Context, command: click.Command) -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return []
    return [(word, sub) for word in command.list_commands(context) if (sub := command.get_command(context, word))]


def _paragraphs(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in text.replace("\r", "").split("\n\n"):
        if paragraph.startswith("\b"):
            lines += [".PP", ".nf", *map(_escape, paragraph.split("\n")[1:]), ".fi"]
        elif paragraph.strip():
            lines += [".PP", _escape(" ".join(paragraph.split()))]
    return lines


def _escape(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/man_pages.py DIR")
    for name, text in pages().items():
        target = Path(sys.argv[1]) / f"man{name[-1]}" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
