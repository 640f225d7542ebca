"""The systemd units in deploy/systemd: as systemd reads them, and with commands that exist."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from ckptfs.cli import main
from tests.support.tools import ROOT, require

UNITS = sorted((ROOT / "deploy" / "systemd").iterdir())


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_understands_it(unit: Path, tmp_path: Path) -> None:
    require("systemd-analyze")
    program = tmp_path / "ckptfs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = re.sub(r"^(Exec\w+=-?)ckptfs", rf"\g<1>{program}", unit.read_text(), flags=re.MULTILINE)
    copy = tmp_path / unit.name.replace("@", "@name")
    copy.write_text(re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", copy],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_its_commands_parse(unit: Path) -> None:
    for words in re.findall(r"^Exec\w+=-?ckptfs (.*)$", unit.read_text(), re.MULTILINE):
        command, *arguments = shlex.split(words.replace("$OPTIONS ", "").replace("%i", "name"))
        values = {"${REF}": "localhost:5000/x:1", "${DIRECTORY}": "/mnt/x"}
        found = main.get_command(click.Context(main), command)
        assert found is not None
        found.make_context(command, [values.get(word, word) for word in arguments])


def test_options_of_the_runtime_can_be_given_to_a_restore() -> None:
    text = (ROOT / "deploy/systemd/ckptfs-restore@.service").read_text()
    (options,) = re.findall(r"^#\s+OPTIONS=(.*)$", text, re.MULTILINE)
    (line,) = re.findall(r"^ExecStart=ckptfs restore (.*)$", text, re.MULTILINE)
    words = shlex.split(line.replace("${REF}", "localhost:5000/x:1").replace("$OPTIONS", options))
    found = main.get_command(click.Context(main), "restore")
    assert found is not None
    parsed = found.make_context("restore", words).params
    assert (str(parsed["reference"]), parsed["extra"]) == ("localhost:5000/x:1", ("--tcp-established",))


def test_the_mount_unit_is_named_after_its_directory() -> None:
    require("systemd-escape")
    where = re.search(r"^Where=(.*)$", (ROOT / "deploy/systemd/mnt-ckpt.mount").read_text(), re.MULTILINE)
    assert where is not None
    escape = [shutil.which("systemd-escape") or "", "--path", "--suffix=mount", where[1]]
    assert subprocess.run(escape, capture_output=True, text=True, check=True).stdout.strip() == "mnt-ckpt.mount"
