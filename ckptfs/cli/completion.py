"""ckptfs completion: the script that makes a shell complete commands, options and files."""

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes ckptfs commands in a shell.

    \b
    ckptfs completion bash > /etc/bash_completion.d/ckptfs
    ckptfs completion zsh > "${fpath[1]}/_ckptfs"
    ckptfs completion fish > ~/.config/fish/completions/ckptfs.fish
    """
    from click.shell_completion import ShellComplete, get_completion_class

    from ckptfs.cli import PROGRAM, main

    found = get_completion_class(shell)
    assert found is not None
    completer = found(main, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE")
    script = ShellComplete.source(completer)  # bash's own source() asks for a bash on this machine
    # zsh runs the whole file as the function _ckptfs: at the second Tab click takes that for being sourced.
    click.echo(script.replace("$zsh_eval_context[-1] == loadautofunc", f"$funcstack[1] == _{PROGRAM}"))
