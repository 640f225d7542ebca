"""A second user: commands run as `nobody`, who owns nothing and is in no group.

Owns a mount namespace for them in which /dev/fuse is open to all and this Python and this checkout can be reached,
wherever they lie. Called by tests about other users and about mounts without root.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.tools import ROOT

NOBODY = 65534


def let_in(folder: Path) -> None:
    """Let every user walk to `folder`, however deep it lies in directories of ours."""
    for directory in (folder, *folder.parents):
        directory.chmod(directory.stat().st_mode | 0o011)


def as_nobody(*command: str, fuse: bool = False, subordinate: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `command`; with `fuse` in a namespace of its own, with `ckptfs` on its PATH and a home that goes away.

    `subordinate`: with user IDs for a user namespace (subuid(5)), and `fuse`.
    """
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    if not fuse:
        return subprocess.run([*drop, *command], capture_output=True, text=True, check=False, timeout=60)
    home = Path(tempfile.mkdtemp(prefix="nobody-", dir="/var/tmp"))
    try:
        for folder in ("bin", "run"):
            (home / folder).mkdir(mode=0o700)
        (home / "bin" / "ckptfs").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ckptfs "$@"\n')
        (home / "bin" / "ckptfs").chmod(0o700)
        for path in (home, *home.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        environment = {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "PATH": f"{home}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        ids = [f"mount --bind {home}/ids {file}" for file in ("/etc/subuid", "/etc/subgid") if subordinate]
        (home / "ids").write_text("nobody:100000:65536\n")
        script = "\n".join(["set -e", *_open_doors(home), *ids, f"exec {shlex.join([*drop, *command])}"])
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=environment,
            cwd=home,
        )
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _open_doors(home: Path) -> list[str]:
    """Shell lines: an open /dev/fuse, and closed directories above what nobody needs replaced by open ones."""
    lines = [f"mknod -m 666 {home}/fuse c 10 229", f"mount --bind {home}/fuse /dev/fuse"]
    needed = {Path(sys.base_prefix), Path(sys.prefix), ROOT, Path(os.path.realpath(sys.executable)).parent}
    closed: dict[Path, list[Path]] = {}
    for path in needed:
        for above in reversed(path.parents):
            if not above.stat().st_mode & 0o001:
                closed.setdefault(above, []).append(path)
                break
    for door, behind in closed.items():
        stages = [home / f"stage-{number}" for number, _ in enumerate(behind)]
        for path, stage in zip(behind, stages, strict=True):
            lines += [f"mkdir {stage}", f"mount --bind {shlex.quote(str(path))} {stage}"]
        lines.append(f"mount -t tmpfs -o mode=755 none {shlex.quote(str(door))}")
        for path, stage in zip(behind, stages, strict=True):
            lines += [f"mkdir -p {shlex.quote(str(path))}", f"mount --bind {stage} {shlex.quote(str(path))}"]
    return lines
