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
    flow.require(check_engine(flow.files, "containerd", flow.settings, lazy=flow.lazy))
    bundle, origin = make_bundle(flow, image)
    work = flow.place / "work"
    words = [word.removeprefix("--").replace("=", " ", 1) for word in flow.request.extra]
    with flow.place.writing():
        config = runtimes.write_criu_config(work / "criu.conf", lazy=lazy is not None, words=words)
    bundle.annotate(CRIU_CONFIG, str(config))

    def resident() -> None:
        runtimes.write_criu_config(config, lazy=False, words=words)  # a lazy dump would wait for a page server
        flow.resident()

    engine = Containerd()
    flow.stack.callback(engine.close)
    flow.place.record(name=flow.name, containerd=engine.place)
    flow.stack.push(lambda kind, _, __: _forget(engine, flow.name, flow.place.path, late=_unanswered(kind)))
    engine.create_container(flow.name, json.dumps(bundle.spec).encode(), owner=str(flow.place.path))
    with _pipes(flow, bundle.terminal) as (stdout, stderr, relays):
        engine.create_task(flow.name, flow.images, work, stdout, stderr, binary=_RUNTIME, terminal=bundle.terminal)
        flow.check_machine()
        if lazy is not None:
            lazy.listen()
        try:
            pid = engine.start(flow.name)
        except RestoreError as error:
            said = runtimes.criu_complaint(work / "restore.log") or error.message
            hint = runtimes.way_out(said, work)
            raise RestoreError(f"containerd could not restore: {said}", hint=hint) from None
        flow.place.record(pid=pid)
        watch = Watch(pid, stop_signal(bundle), flow.settings.timeouts.stop, relays, flow.daemons)
        running = {"runtime": _RUNTIME, "engine": "containerd", "rootfs": origin}
        watch.run(lazy, lambda: flow.running(pid, **running), resident)
        flow.tell("ended", exit_code=engine.wait(flow.name), ended_ms=flow.now())


def bury(containerd: Sequence[str], name: str, place: Path) -> None:
    """A container whose restore in `place` was killed; `containerd` is where that was."""
    with contextlib.suppress(ImportError):
        engine = Containerd(containerd)
        _forget(engine, name, place, late=False)
        engine.close()


def _unanswered(kind: type[BaseException] | None) -> bool:
    """Whether what ended a restore may have left a call that containerd goes on with."""
    return kind is not None and not issubclass(kind, RestoreError)


def _forget(engine: Containerd, name: str, place: Path, *, late: bool) -> None:
    """Whatever there is of it: a restore under way, a task, a container.

    `late`: there may be more in a moment, from a call that we no longer wait for (runc makes cgroups, too).
    """
    until = time.monotonic() + (_LATE if late else 0.0)
    ours = False
    while True:
        _end_restores(place)
        with contextlib.suppress(CkptfsError):
            if engine.has(name, owner=str(place)):
                ours = True
                _remove(engine, name)
        if time.monotonic() >= until:
            break
        time.sleep(_STEP)
    if ours:
        runtimes.remove_cgroups(name)


def _remove(engine: Containerd, name: str) -> None:
    with contextlib.suppress(CkptfsError):
        engine.kill(name, signal.SIGKILL)
        engine.wait(name)
    with contextlib.suppress(CkptfsError):
        engine.delete_task(name)
    engine.delete_container(name)


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
    """(stdout, stderr, relays): named pipes for containerd to write to; a terminal has one though nobody listens."""
    if flow.request.output is None and not terminal:
        yield "", "", []
        return
    names, relays = [], []
    with contextlib.ExitStack() as stack:
        for name, target in zip(
            ("stdout", "stderr")[: 1 if terminal else 2], flow.request.output or (None,), strict=False
        ):
            path = flow.place / "work" / name
            os.mkfifo(path, 0o600)
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # else containerd waits for us
            stack.callback(os.close, descriptor)
            names.append(str(path))
            relays.append(Relay(descriptor, target))
        yield names[0], names[1] if len(names) > 1 else "", relays
