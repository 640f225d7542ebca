"""What a restore needs of this machine, found out before anything is started.

Owns the conditions, their reasons and hints. Asks criu itself what the kernel can do. Called by flow.py, which raises
the first condition that does not hold, and by `ckptfs check`, which prints them all. What it needs of the checkpoint is
in facts.py.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptfs.errors import CkptfsError, RestoreError
from ckptfs.settings import Settings, runtime_dir

_OLDEST = (3, 15)  # images of time namespaces and clone3 with chosen pids
# criu below 4.1 cannot read the vDSO of newer kernels ("Unexpected rt vDSO area bounds"); `criu check` does not see it
_VDSO_KERNEL, _VDSO_CRIU = (6, 13), (4, 1)


@dataclass(frozen=True, slots=True)
class Finding:
    """One condition; `detail` says what was found, `hint` what to do when it does not hold."""

    subject: str
    ok: bool
    detail: str
    hint: str = ""
    error: type[CkptfsError] = RestoreError

    def require(self) -> None:
        """Raise unless the condition holds."""
        if not self.ok:
            raise self.error(self.detail, hint=self.hint)


def tools(runtime: str, engine: str | None) -> Iterator[Finding]:
    """Rights and programs, looked at without starting any. `runtime` may be auto."""
    root = os.geteuid() == 0
    yield Finding("rights", root, "root" if root else "criu restores only as root", "run it with sudo")
    fuse = os.path.exists("/dev/fuse")
    hint = "load the module: modprobe fuse; in a container give --device /dev/fuse"
    yield Finding("fuse", fuse, "/dev/fuse" if fuse else "/dev/fuse is missing", hint)
    found = shutil.which("criu")
    hint = "install criu 4.1 or newer; docs/restore.md says how on Debian 12"
    yield Finding("criu", found is not None, found or "criu is not in PATH", hint)
    if engine == "containerd":
        from ckptfs.restore.containerd_api import findings

        yield from findings()
    elif engine is not None:
        found = shutil.which(engine)
        yield Finding(engine, found is not None, found or f"{engine} is not in PATH", f"install {engine}")
    if runtime not in ("auto", "criu"):
        found = shutil.which(runtime)
        yield Finding(runtime, found is not None, found or f"{runtime} is not in PATH", f"install {runtime}")


def kernel(settings: Settings, *, lazy: bool) -> Iterator[Finding]:
    """What criu says about itself and the kernel; criu must be there. Takes 0.1 s."""
    version = criu_version(settings)
    release = platform.release()
    shown = ".".join(map(str, version)) if version else "of an unknown version"
    old = version < _OLDEST or (_numbers(release) >= _VDSO_KERNEL and version < _VDSO_CRIU)
    detail = f"criu {shown} is too old for Linux {release}" if old else f"criu {shown}"
    yield Finding("criu version", not old, detail, "install criu 4.1 or newer; docs/restore.md says how on Debian 12")
    if old:
        return
    ok, said = _ask_criu(settings, "check")
    detail = f"criu works on Linux {release}" if ok else f"criu does not work on Linux {release}: {said}"
    yield Finding("kernel", ok, detail, "run: criu check")
    if lazy and ok:
        ok, said = _ask_criu(settings, "check", "--feature", "uffd-noncoop")
        detail = "userfaultfd" if ok else f"no lazy pages on Linux {release}: {said}"
        yield Finding("lazy pages", ok, detail, "Linux 4.11 or newer has them; or restore with --no-lazy-pages")


def kernel_once(settings: Settings, *, lazy: bool) -> list[Finding]:
    """The same for restores: what held is remembered until the next boot, for this criu and this kernel.

    Asking costs as much time as mounting the image. criu itself remembers the kernel in the same place (criu.kdat).
    """
    program = Path(shutil.which("criu") or "criu")
    note = runtime_dir() / "criu-works"
    try:
        status = program.stat()
        known = json.dumps([str(program), status.st_mtime_ns, status.st_size, platform.release(), lazy])
        if note.read_text() == known:
            return []
    except OSError:
        known = ""
    found = list(kernel(settings, lazy=lazy))
    if known and all(finding.ok for finding in found):
        with contextlib.suppress(OSError):
            note.write_text(known)
    return found


def unprivileged_userfaultfd() -> bool:
    """Whether processes without capabilities on this machine get page faults of the kernel's, too: userfaultfd(2)."""
    try:
        return Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0"
    except OSError:
        return True  # Linux 5.1 and older ask nobody


def criu_version(settings: Settings) -> tuple[int, ...]:
    """(major, minor, ...) of the criu in PATH; () when it does not say."""
    _, said = _ask_criu(settings, "--version")
    match = re.search(r"Version: (\d+(?:\.\d+)*)", said)
    return tuple(map(int, match[1].split("."))) if match else ()


def _ask_criu(settings: Settings, *words: str) -> tuple[bool, str]:
    """Whether criu agrees, and its words: all on success, the last line otherwise."""
    try:
        done = subprocess.run(
            ["criu", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=settings.timeouts.tool,
            stdin=subprocess.DEVNULL,
            cwd=Path("/"),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"criu cannot be run ({error})"
    if done.returncode == 0:
        return True, done.stdout
    lines = (done.stdout + done.stderr).strip().splitlines()
    return False, lines[-1].strip() if lines else f"exit {done.returncode}"


def _numbers(release: str) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else ()
