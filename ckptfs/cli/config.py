"""ckptfs config: what is set, and where it was set. Changes nothing; the files are TOML for an editor."""

import json
import os
from pathlib import Path
from typing import Any

import click

from ckptfs import configuration
from ckptfs.cli.options import config_option, configure_logging, current_configuration, verbosity_options


@click.group()
def config() -> None:
    """What is set for good, in files and in the environment.

    \b
    ckptfs config show
    """


@config.command()
@click.option("--json", "as_json", is_flag=True, help="One object: key to value and origin.")
@config_option
@verbosity_options
def show(as_json: bool, verbose: int, quiet: bool) -> None:
    """Every key with its value and where that came from.

    In rising precedence: /etc/ckptfs/config.toml, ~/.config/ckptfs/config.toml, --config FILE, the environment
    (CKPTFS_CACHE_DIR ...), the options of a command.

    \b
    ckptfs config show --json
    """
    configure_logging(verbose, quiet)
    found = current_configuration().values
    for name in sorted(configuration.unknown_variables(os.environ)):
        click.echo(f"ckptfs: {name} in the environment means nothing to ckptfs", err=True)
    if as_json:
        facts = {name: {"value": _plain(one.value), "origin": one.origin} for name, one in found.items()}
        click.echo(json.dumps(facts, indent=2))
        return
    texts = {name: json.dumps(_plain(one.value)) for name, one in found.items()}
    name_width, width = max(map(len, texts)), max(map(len, texts.values()))
    for name, one in found.items():
        click.echo(f"{name:{name_width}}  {texts[name]:{width}}  {one.origin}")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
