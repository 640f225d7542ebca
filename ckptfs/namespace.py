"""A mount namespace for a moment: what kernel file systems show where nobody has mounted them.

Nobody else sees what is mounted there, and it is gone with the script. Needs root. Called by fuse/kernel.py and
restore/runtimes.py.
"""

import subprocess

_PATIENCE = 10.0  # seconds


def in_own_namespace(script: str, *arguments: str) -> str:
    """Run a script of sh in a mount namespace of its own; "" or why it failed. Blocks for some milliseconds."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""
