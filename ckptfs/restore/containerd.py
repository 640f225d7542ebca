"""Restores by containerd, unmodified, through its task API: it is told where the CRIU images are, and its runc reads
them there, in the mount.

Owns the order of the calls, the container's output and its end. The root file system is ours, so this process stays as
long as the container runs. Lazy pages reach criu by its configuration file: containerd cannot ask runc for them. Called
by keeper.py.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckptfs.errors import CkptfsError, RestoreError, UsageError
from ckptfs.restore import runtimes
from ckptfs.restore.bundle import CRIU_CONFIG
from ckptfs.restore.container import make_bundle, stop_signal
from ckptfs.restore.containerd_api import Containerd
from ckptfs.restore.facts import check_engine
from ckptfs.restore.flow import Flow, RestoreRequest
from ckptfs.restore.supervise import Relay, Watch

_RUNTIME = "runc"  # crun takes no configuration file for criu
_LATE, _STEP = 1.0, 0.05  # seconds for a restore that was given up to show itself, and between two looks


def refuse_options(request: RestoreRequest) -> None:
    """UsageError for what containerd cannot be told."""
    if request.runtime not in ("auto", _RUNTIME):
        raise UsageError(f"containerd restores with {_RUNTIME}, not with {request.runtime}", hint="leave --runtime out")
    if wrong := [word for word in request.extra if not word.startswith("--")]:
        hint = "for example: -- --tcp-established"
        raise UsageError(f"{wrong[0]}: what follows -- are options of criu for containerd", hint=hint)


def finish(flow: Flow) -> None:
    """Restore and stay until the container has ended; then containerd has forgotten it."""
    image = flow.open_image()
    lazy = flow.start_lazy_pages()
    flow.require(check_engine(flow.files, flow.settings))
    bundle, origin = make_bundle(flow, image)
    work = flow.place / "work"
    words = [word.removeprefix("--").replace("=", " ", 1) for word in flow.request.extra]
    config = runtimes.write_criu_config(work / "criu.conf", lazy=lazy is not None, words=words)
    bundle.spec.setdefault("annotations", {})[CRIU_CONFIG] = str(config)
    engine = Containerd()
    flow.stack.callback(engine.close)
    engine.create_container(flow.name, json.dumps(bundle.spec).encode())
    answered = False
    flow.stack.callback(lambda: _forget(engine, flow.name, flow.place.path, answered=answered))
    with _pipes(flow, bundle.terminal) as (stdout, stderr, relays):
        engine.create_task(
            flow.name, flow.images, work, stdout, stderr, binary=_RUNTIME, terminal=bundle.terminal and bool(stdout)
        )
        flow.check_machine()
        if lazy is not None:
            lazy.listen()
        try:
            pid = engine.start(flow.name)
            answered = True
        except RestoreError as error:
            answered = True
            said = runtimes.criu_complaint(work / "restore.log") or error.message
            hint = f"the logs are in {work} (stay with --keep)"
            raise RestoreError(f"containerd could not restore: {said}", hint=hint) from None
        lazy_pid = lazy.pid if lazy is not None else None
        flow.place.record(pid=pid, lazy_pid=lazy_pid, name=flow.name, containerd=engine.place)
        watch = Watch(pid, stop_signal(bundle), flow.settings.timeouts.stop, relays)
        running = {"runtime": _RUNTIME, "engine": "containerd", "rootfs": origin}
        watch.run(lazy, lambda: flow.running(pid, **running), flow.resident)
        flow.tell("ended", exit_code=engine.wait(flow.name), ended_ms=flow.now())


def bury(place: Sequence[str], name: str) -> None:
    """A container that has ended after its restore was killed; `place` is where containerd was."""
    with contextlib.suppress(CkptfsError, ImportError):
        engine = Containerd(place)
        try:
            engine.delete_task(name)
        finally:
            engine.delete_container(name)
            engine.close()


def _forget(engine: Containerd, name: str, place: Path, *, answered: bool) -> None:
    """Whatever there is of it: a restore under way, a task, a container.

    Not `answered`: containerd may go on with a restore that we no longer wait for, and its runc makes cgroups.
    """
    _end_restores(place)
    with contextlib.suppress(CkptfsError):
        engine.kill(name, signal.SIGKILL)
        engine.wait(name)
    with contextlib.suppress(CkptfsError):
        engine.delete_task(name)
    with contextlib.suppress(CkptfsError):
        engine.delete_container(name)
    until = time.monotonic() + (0.0 if answered else _LATE)
    while time.monotonic() < until:
        _end_restores(place)
        time.sleep(_STEP)
    runtimes.remove_cgroups(name)


def _end_restores(place: Path) -> None:
    for pid in _restoring(place):
        for criu in runtimes.children(pid):  # runc tidies up when its criu dies
            with contextlib.suppress(ProcessLookupError):
                os.kill(criu, signal.SIGKILL)


def _restoring(place: Path) -> Iterator[int]:
    """Runtimes that containerd has started to restore from `place`."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().split(b"\0")
            if b"restore" in words and any(word.startswith(os.fsencode(place / "image")) for word in words):
                yield int(file.parent.name)


@contextlib.contextmanager
def _pipes(flow: Flow, terminal: bool) -> "Iterator[tuple[str, str, list[Relay]]]":
    """(stdout, stderr, relays): named pipes for containerd to write to, none where nobody listens."""
    if flow.request.output is None:
        yield "", "", []
        return
    names, relays = [], []
    with contextlib.ExitStack() as stack:
        for name, target in zip(("stdout", "stderr")[: 1 if terminal else 2], flow.request.output, strict=False):
            path = flow.place / "work" / name
            os.mkfifo(path, 0o600)
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # else containerd waits for us
            stack.callback(os.close, descriptor)
            names.append(str(path))
            relays.append(Relay(descriptor, target))
        yield names[0], names[1] if len(names) > 1 else "", relays
