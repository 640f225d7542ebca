"""The pages of the documentation, and the ckptfs commands that they tell a user to type.

Owns how commands are found: in blocks, where two spaces begin a remark or another command, and in backquotes. Called by
the tests that parse all of them and by those that run them.
"""

import re
from pathlib import Path

from tests.support.tools import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path) -> list[str]:
    """What stands between fences, of any language."""
    return re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of one block, without remarks, prompts and what follows in a pipe."""
    found = []
    for line in text.splitlines():
        parts = re.split(r"\s{2,}", line.strip().removeprefix("# ").removeprefix("$ "))  # a remark, or another
        ours = (part for part in parts if part.startswith("ckptfs ") and "…" not in part)
        found += [part.split(" | ")[0].split(" && ")[0].rstrip("&\\ ") for part in ours]
    return found


def quoted(page: Path) -> list[str]:
    """Commands in the middle of a sentence: mostly without what they need."""
    return re.findall(r"`(ckptfs [a-z][^`\n…]*)`", page.read_text())
