"""What a test needs from the machine: commands, rights, free ports, processes that do not outlive it.

Owns the rule that a missing tool skips a test on a developer's machine and fails it in CI. Called by every other
module of tests/support and by tests; knows nothing of ckptfs.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
SETUP_BIN = ROOT / ".setup" / "bin"  # where scripts/setup puts a criu that works


def use_setup_tools() -> None:
    """Puts what scripts/setup made in front of PATH, for this process and those it starts (podman starts criu)."""
    paths = os.environ.get("PATH", "").split(":")
    for folder in ("/usr/sbin", "/sbin"):
        if folder not in paths:
            paths.append(folder)
    os.environ["PATH"] = ":".join([str(SETUP_BIN), *(path for path in paths if path != str(SETUP_BIN))])


def unavailable(reason: str) -> None:
    """Skips the running test, or fails it where everything must be there (CI)."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; scripts/setup installs it", pytrace=False)
    pytest.skip(reason)


def require(*commands: str, root: bool = False) -> None:
    if root and os.geteuid() != 0:
        unavailable("needs root")
    if missing := [command for command in commands if shutil.which(command) is None]:
        unavailable(f"needs {' '.join(missing)}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a tool to its end; on failure the exception carries what the tool said."""
    options = {"timeout": 120, "stdin": subprocess.DEVNULL, **options}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{said}")
    return done


def start(*command: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """Starts a server or daemon that the kernel ends if this process dies first."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **options}
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *(str(word) for word in command)], **options)


def end(process: subprocess.Popen[bytes], *, patience: float = 5.0) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(AttributeError):
        process.stderr.close()  # type: ignore[union-attr]


def wait_for(what: str, condition: Callable[[], T], *, patience: float = 10.0, step: float = 0.01) -> T:
    """Polls until `condition` returns something true, and returns that."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {patience:g} s")
        time.sleep(step)
    return value
