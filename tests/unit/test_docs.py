"""Every ckptfs command in the documentation is one that the command line takes, options included."""

import re
import shlex
from pathlib import Path

import click
import pytest

from ckptfs.cli import main
from tests.support.pages import PAGES, blocks, commands, quoted

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def command_of(words: list[str]) -> click.Command:
    """The command that `words` begin with, which are taken away."""
    command: click.Command | None = main
    while isinstance(command, click.Group) and words:
        command = command.get_command(click.Context(command), words.pop(0))
    assert command is not None
    return command


@pages
def test_commands_parse(page: Path) -> None:
    for text in (command for block in blocks(page) for command in commands(block)):
        words = ["localhost:5000/x:1" if w == "REF" else w for w in shlex.split(text, comments=True)[1:]]
        command = command_of(words)
        if "--help" not in words:
            command.make_context(text, words)


@pages
def test_lines_can_be_pasted(page: Path) -> None:
    """Remarks beside commands are comments, for a shell too."""
    for line in (line for block in blocks(page) for line in block.splitlines()):
        words = shlex.split(line.removeprefix("# "), comments=True) if line.lstrip("# ").startswith("ckptfs ") else []
        if words and "&&" not in words and "|" not in words and "…" not in line:
            words = ["localhost:5000/x:1" if word in ("REF", "REF2") else word for word in words[1:]]
            command_of(words).make_context(line, words)


@pages
def test_commands_in_sentences_exist(page: Path) -> None:
    """What they name need not be there, but the command and its options must."""
    for text in quoted(page):
        words = shlex.split(text)[1:]
        command = command_of(words)
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        named = {word.partition("=")[0] for word in words[: words.index("--") if "--" in words else None]}
        assert {word for word in named if word.startswith("-")} <= options | {"-h", "--help"}, text


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands(block)) for page in PAGES for block in blocks(page)) > 60
    assert sum(len(quoted(page)) for page in PAGES) > 30


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
