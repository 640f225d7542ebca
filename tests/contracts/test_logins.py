"""Logins that other tools have made: podman's own, wherever it keeps them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.docker_registry import DockerRegistry
from tests.support.tools import ROOT, require

pytestmark = pytest.mark.registry


@pytest.mark.parametrize("runtime", ["", "run"])
def test_where_podman_keeps_a_login(runtime: str, tmp_path: Path) -> None:
    """$XDG_RUNTIME_DIR, or /run/containers/UID without: as of root in a service, and with sudo."""
    require("podman", "unshare", root=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("XDG_RUNTIME_DIR", "REGISTRY_AUTH_FILE")}
    environment |= {"HOME": str(tmp_path)}
    if runtime:
        (tmp_path / runtime).mkdir(mode=0o700)
        environment["XDG_RUNTIME_DIR"] = str(tmp_path / runtime)
    with DockerRegistry(users={"anna": "secret"}) as registry:
        ls = [sys.executable, "-m", "ckptfs", "ls", registry.reference("none:1"), "--cache-dir", f"{tmp_path}/cache"]
        script = [
            "mkdir -p /run/containers && mount -t tmpfs none /run/containers || exit 1",
            f"{shlex.join(ls)}; [ $? = 4 ] || exit 1",
            f"podman login --tls-verify=false -u anna -p secret {registry.host} || exit 1",
            f"exec {shlex.join(ls)}",
        ]
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(script)],
            capture_output=True, text=True, check=False, timeout=120, env=environment, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 3, done.stderr
