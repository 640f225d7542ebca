"""Checkpoints of containers that runc runs without an engine: what their spec says is the test's choice.

Owns the bundle, the container's short life, and the directory that `ckptfs push` takes. Called by tests/restore.
"""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support.podman import OUTPUT
from tests.support.tools import run, wait_for
from tests.support.workload import Line, Output, compile_program

_PROGRAM = "ticker"
_OWNER = 100_000  # the container's root on this machine, with a user namespace


def checkpoint(folder: Path, name: str, **spec: Any) -> Path:
    """A ticker of 4 MB in a container `name`, dumped and gone; its root file system stays in folder/rootfs."""
    dump = folder / "dump"
    with running(folder, name, **spec):
        (dump / "checkpoint").mkdir(parents=True)  # runc 1.1 would make it of mode 0600: of no use to anybody else
        run("runc", "checkpoint", "--image-path", dump / "checkpoint", "--work-path", folder, name)
    shutil.copy(folder / "config.json", dump / "spec.dump")
    (dump / "config.dump").write_text(json.dumps({"name": name, "runtime": "runc"}))
    return dump


@contextlib.contextmanager
def running(
    folder: Path,
    name: str,
    *,
    user_namespace: bool = False,
    terminal: bool = False,
    binds: Mapping[str, Path] | None = None,
) -> Iterator[int]:
    """The pid of a ticker in a container `name` of the bundle `folder`, which is gone after the block."""
    root = folder / "rootfs"
    for directory in ("proc", "dev", "data"):
        (root / directory).mkdir(parents=True)
    shutil.copy(compile_program(_PROGRAM, folder), root)
    spec = _spec(root, user_namespace=user_namespace, terminal=terminal)
    for where, what in (binds or {}).items():
        spec["mounts"].append({"destination": where, "type": "bind", "source": str(what), "options": ["rbind"]})
    (folder / "config.json").write_text(json.dumps(spec))
    if user_namespace:
        for path in (root, *root.iterdir()):
            os.chown(path, _OWNER, _OWNER)
    with _console(folder) if terminal else contextlib.nullcontext([]) as console:
        quiet = f"runc run --detach {' '.join(console)} --bundle {folder} {name} >/dev/null 2>&1"
        run("sh", "-c", quiet)
        try:
            wait_for("the container to tick", lambda: ticks(root))
            yield int(json.loads(run("runc", "state", name).stdout)["pid"])
        finally:
            run("runc", "delete", "--force", name)


def ticks(root: Path) -> list[Line]:
    return Output(root / OUTPUT.lstrip("/")).lines(what="tick")


@contextlib.contextmanager
def _console(folder: Path) -> Iterator[list[str]]:
    """A socket that takes the container's terminal, and the option that says so."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "console"))
        listener.listen(1)
        yield [f"--console-socket={folder / 'console'}"]
        sender, _ = listener.accept()
        with sender:
            os.close(socket.recv_fds(sender, 4096, 1)[1][0])


def _spec(root: Path, *, user_namespace: bool, terminal: bool) -> dict[str, Any]:
    kinds = ["pid", "network", "ipc", "uts", "mount"] + ["user"] * user_namespace
    linux: dict[str, Any] = {"namespaces": [{"type": kind} for kind in kinds]}
    if user_namespace:
        mapping = [{"containerID": 0, "hostID": _OWNER, "size": 65536}]
        linux |= {"uidMappings": mapping, "gidMappings": mapping}
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": terminal,
            "user": {"uid": 0, "gid": 0},
            "args": [f"/{_PROGRAM}", OUTPUT, "4"],
            "cwd": "/",
            "noNewPrivileges": True,
        },
        "root": {"path": str(root)},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
        ],
        "linux": linux,
    }
