"""A container restored by runc or crun, or processes by criu: root file system, bundle, runtime, and staying with it.

Owns the order from an open image to the end of the container, and where its root file system comes from. Called by
keeper.py; containerd.py takes the bundle only.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptfs.daemon.mounting import Pending
from ckptfs.errors import CkptfsError, FormatError, NotFoundError, UsageError
from ckptfs.fuse.mountpoint import detach
from ckptfs.restore import runtimes
from ckptfs.restore.bundle import Bundle
from ckptfs.restore.checking import Finding
from ckptfs.restore.facts import candidates, check_runtime, root_mode, writer_of
from ckptfs.restore.flow import Flow, RestoreRequest
from ckptfs.restore.image_store import local_image, mounted_image
from ckptfs.restore.lazy_pages import LazyPages
from ckptfs.restore.rootfs import mount_rootfs
from ckptfs.restore.supervise import Console, Relay, Watch, become_subreaper, end_orphans
from ckptfs.restore.workplace import named


def finish(flow: Flow) -> None:
    """Restore what `flow` has begun to mount, and stay until it has ended."""
    image = flow.open_image()
    lazy = flow.start_lazy_pages()
    wanted, settings = flow.request.runtime, flow.settings
    flow.require(check_runtime(flow.files, wanted, settings, lazy=flow.lazy))
    if flow.files.size("spec.dump") is None:
        flow.require(check_options(flow.request))
        flow.check_machine()
        _run(flow, "criu", lazy, None, None)
        return
    names = candidates(writer_of(flow.document("config.dump") or {}), wanted)
    runtime = next(name for name in names if not runtimes.why_not(name, settings))
    bundle, origin = make_bundle(flow, image)
    if flow.request.name:
        runtimes.require_free(runtime, flow.name)
    flow.stack.callback(runtimes.remove_cgroups, flow.name)
    flow.check_machine()
    _run(flow, runtime, lazy, bundle, origin)


def check_options(request: RestoreRequest) -> Iterator[Finding]:
    """What only means something to a container, where the checkpoint is of processes on a host."""
    for option, given in (
        ("--base", request.base or request.image_store),
        ("--rootfs", request.rootfs),
        ("--bind", request.binds),
        ("--network", request.network),
    ):
        if given:
            detail = f"{option} means nothing to processes without a container"
            hint = "leave it out: they have the files and the network of this machine"
            yield Finding("options", False, detail, hint, UsageError)


def make_bundle(flow: Flow, image: Path) -> tuple[Bundle, str]:
    """The bundle with its root file system mounted, and where that came from. FormatError without a spec.dump."""
    spec, config = flow.document("spec.dump"), flow.document("config.dump") or {}
    if spec is None:
        raise FormatError("the checkpoint has no spec.dump, which a container needs", hint="leave --engine out")
    flow.stack.enter_context(named(flow.name))  # before anything is made that goes by it, until all of it is gone
    bundle = Bundle(flow.place, image, spec, config, flow.request.binds, flow.request.network)
    root = _Root(flow)
    with flow.place.writing():
        bundle.write(root.mount(config), flow.name)
    return bundle, root.origin


def _run(flow: Flow, runtime: str, lazy: LazyPages | None, bundle: Bundle | None, rootfs: str | None) -> None:
    become_subreaper()
    work, output = flow.place / "work", flow.request.output
    console = Console(work) if bundle is not None and bundle.terminal else None
    if console is not None:
        flow.stack.callback(console.close)
    flow.stack.callback(end_orphans, flow.daemons)
    flow.stack.callback(runtimes.delete, runtime, flow.name, flow.place / "bundle")
    flow.place.record(runtime=runtime, name=flow.name)
    with _output(flow) as (stdout, stderr, relays):
        where = console.path if console is not None else None
        job = runtimes.Job(
            flow.images,
            work,
            flow.place / "bundle",
            flow.name,
            lazy is not None,
            flow.request.extra,
            stdout,
            stderr,
            where,
        )
        if lazy is not None:
            lazy.listen()
        pid = runtimes.restore(runtime, job, flow.settings)
    if console is not None:
        relays.append(Relay(console.master(), output[0] if output is not None else None))
    watch = Watch(pid, stop_signal(bundle), flow.settings.timeouts.stop, relays, flow.daemons)
    code = watch.run(lazy, lambda: flow.running(pid, runtime=runtime, rootfs=rootfs), flow.resident)
    flow.tell("ended", exit_code=code, ended_ms=flow.now())


class _Root:
    """The container's root. `origin` says where the base came from once it is mounted."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.origin = ""

    def mount(self, config: Mapping[str, Any]) -> Path:
        """From the user's directory or image store; else from the registry, else from the image store."""
        flow, request = self._flow, self._flow.request
        if request.rootfs is not None:
            self.origin = str(request.rootfs)
            return self._overlay(request.rootfs.resolve(), delta=True)
        stored = request.image_store
        failure: CkptfsError | None = None
        if flow.base is not None:
            if request.base is None and (stored := local_image(config)):
                flow.base.cancel()
            else:
                try:
                    return self._from_registry(flow.base)
                except CkptfsError as error:
                    failure = error
        if failure is not None:
            if failure.exit_code == NotFoundError.exit_code:
                hint = "name it: --base REF, --base containers-storage:IMAGE, or --rootfs DIR"
                raise NotFoundError(f"the base image is missing: {failure.message}", hint=hint)
            raise failure
        self.origin = f"containers-storage:{stored}"
        lower = flow.stack.enter_context(mounted_image(stored, flow.settings, keep=request.keep))
        return self._overlay(lower, delta=True)

    def _from_registry(self, base: Pending) -> Path:
        base.wait()
        self.origin = "registry"
        flow = self._flow
        return self._overlay(flow.unpack(base, "base") if flow.request.eager else flow.place / "base", delta=False)

    def _overlay(self, lower: Path, *, delta: bool) -> Path:
        """`delta`: `lower` is the base only, what the container had changed goes over it."""
        flow = self._flow
        above = flow.images.parent / "rootfs-diff" if delta else None
        merged = mount_rootfs(flow.place, lower, above, root_mode(flow.files, flow.settings.limits))
        if not flow.request.keep:  # before what is below it
            flow.stack.callback(detach, str(merged))
        return merged


@contextlib.contextmanager
def _output(flow: Flow) -> Iterator[tuple[int, int, list[Relay]]]:
    """(stdout, stderr, relays) for the container. Its stderr passes through us: a runtime that fails is not heard."""
    if flow.request.output is None:
        yield subprocess.DEVNULL, subprocess.DEVNULL, []
        return
    reader, writer = os.pipe()
    flow.stack.callback(os.close, reader)
    try:
        yield flow.request.output[0], writer, [Relay(reader, flow.request.output[1])]
    finally:
        os.close(writer)


def stop_signal(bundle: Bundle | None) -> int:
    """The signal by which the container wants to be stopped (an annotation of its image); else SIGTERM."""
    annotations = bundle.spec.get("annotations") if bundle is not None else None
    text = str(annotations.get("org.opencontainers.image.stopSignal", "")) if isinstance(annotations, dict) else ""
    with contextlib.suppress(ValueError, KeyError):
        number = int(text) if text.isdigit() else signal.Signals[text].value
        if number in signal.valid_signals():
            return number
    return signal.SIGTERM
