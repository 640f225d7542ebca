"""Restores by podman, unmodified: it is given a stub, and criu reads the mount (stub.py says how).

Owns the calls of podman. The container is podman's afterwards and needs nothing of us once all its memory is there.
Called by keeper.py.
"""

import contextlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckptfs.errors import NotFoundError, RestoreError, UsageError
from ckptfs.restore.bundle import CRIU_CONFIG
from ckptfs.restore.facts import check_engine
from ckptfs.restore.flow import Flow, RestoreRequest
from ckptfs.restore.image_store import has_image
from ckptfs.restore.runtimes import criu_complaint, way_out
from ckptfs.restore.stub import Redirection, write_stub
from ckptfs.restore.supervise import wait_resident
from ckptfs.restore.workplace import check_name
from ckptfs.settings import Settings


def refuse_options(request: RestoreRequest) -> None:
    """UsageError for what only means something when the container is restored here."""
    for option, given in (
        ("--eager", request.eager),
        ("--base", request.base or request.image_store),
        ("--rootfs", request.rootfs),
        ("--bind", request.binds),
        ("--network", request.network),
        ("--runtime", request.runtime != "auto"),
    ):
        if given:
            raise UsageError(
                f"{option} means nothing to podman", hint="options of podman container restore go after --"
            )
    if any(word.startswith(("--name", "-n")) for word in request.extra):
        raise UsageError("podman is told the name by us", hint="give --name before --")


def finish(flow: Flow) -> None:
    """Restore and stay until all pages are in; then the container is podman's alone."""
    flow.open_image()
    lazy = flow.start_lazy_pages()
    flow.require(check_engine(flow.files, "podman", flow.settings, lazy=flow.lazy))
    config = flow.document("config.dump") or {}
    name = check_name(flow.request.name or str(config.get("name", "")) or flow.name)
    with ThreadPoolExecutor(1) as worker:
        taken = worker.submit(_exists, name)
        redirection = Redirection(flow.place.path)
        redirection.write(flow.images, lazy=lazy is not None)
        archive = flow.place / "stub.tar"
        try:
            write_stub(flow.files, archive, redirection.config, flow.settings.limits)
        except OSError as error:
            raise RestoreError(f"{archive} cannot be written: {error.strerror}", hint="is there room?") from None
        flow.check_machine()
        if lazy is not None:
            lazy.listen()
        if taken.result():
            raise RestoreError(f"podman has a container {name} already", hint="give another --name")
    undo = flow.stack.enter_context(contextlib.ExitStack())
    undo.callback(_remove, name, redirection.config)
    # podman refuses both together; without a name it restores the container as the one that it was.
    named = [] if "--tcp-established" in flow.request.extra and not flow.request.name else [f"--name={name}"]
    done = _podman("container", "restore", f"--import={archive}", *named, *flow.request.extra)
    if done.returncode != 0:
        raise _failure(done, redirection.work, str(config.get("rootfsImageName", "")), flow.settings)
    shown = _podman("container", "inspect", "--format={{.State.Pid}}", name)
    if shown.returncode != 0:
        raise RestoreError(
            f"podman has restored no container {name}", hint="what follows -- are options of its restore"
        )
    pid = int(shown.stdout)
    flow.name = name
    flow.place.record(pid=pid)
    flow.running(pid, runtime=config.get("runtime"), engine="podman", container=done.stdout.strip())
    if lazy is not None and pid and not wait_resident(pid, lazy):
        raise KeyboardInterrupt  # a container without the rest of its memory is of no use
    undo.pop_all()
    if lazy is not None:
        flow.resident()


def _exists(name: str) -> bool:
    return _podman("container", "exists", name).returncode == 0


def _remove(name: str, config: Path) -> None:
    """The container that was restored with that configuration of criu; one of its name may be somebody else's."""
    shown = f'--format={{{{.ID}}}} {{{{index .Config.Annotations "{CRIU_CONFIG}"}}}}'
    identity, _, annotation = _podman("container", "inspect", shown, name).stdout.strip().partition(" ")
    if annotation == str(config):
        _podman("rm", "--force", "--time=0", "--ignore", identity)


def _podman(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["podman", *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def _failure(
    done: subprocess.CompletedProcess[str], work: Path, base: str, settings: Settings
) -> RestoreError | NotFoundError:
    said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1].removeprefix("Error: ")
    if base and not has_image(base, settings):
        return NotFoundError(f"podman lacks the base image {base}: {said}", hint="pull, load or build it first")
    said = criu_complaint(work / "restore.log") or said
    return RestoreError(f"podman could not restore: {said}", hint=way_out(said, work))
