"""Every ckptfs command in the documentation is one that the command line takes, options included."""

import re
import shlex
from pathlib import Path

import click
import pytest

from ckptfs.cli import main

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def commands(page: Path) -> list[str]:
    found = []
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            parts = re.split(r"\s{2,}", line.strip().removeprefix("# ").removeprefix("$ "))  # a remark, or another
            ours = (part for part in parts if part.startswith("ckptfs ") and "…" not in part)
            found += [part.split(" | ")[0].split(" && ")[0].rstrip("&\\ ") for part in ours]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for text in commands(page):
        words = ["localhost:5000/x:1" if w == "REF" else w for w in shlex.split(text, comments=True)[1:]]
        command: click.Command | None = main
        while isinstance(command, click.Group):
            name = words.pop(0)
            command = command.get_command(click.Context(command), name)
            assert command is not None, text
        if "--help" not in words:
            command.make_context(text, words)


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
