"""How every restore begins: a directory of its own, the mounts and the questions to criu, all at the same time.

Owns what a container's restore (container.py) and an engine's (podman.py, containerd.py) share: the stack with
everything that was started, unwound whatever happens, and the events. Imports little: the daemons are forked before the
rest is needed. Called by keeper.py.
"""

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ckptfs.daemon.asking import statuses
from ckptfs.daemon.mounting import Pending, begin
from ckptfs.daemon.requests import MountRequest
from ckptfs.errors import CkptfsError, UnavailableError, rebuilt
from ckptfs.interrupts import interruptible
from ckptfs.model.oci import Reference
from ckptfs.restore import checking
from ckptfs.restore.runtimes import could_not_read
from ckptfs.restore.supervise import SIGNALS
from ckptfs.restore.workplace import Workplace, check_name
from ckptfs.settings import Settings, state_dir

if TYPE_CHECKING:
    from ckptfs.restore.lazy_pages import LazyPages


class Report(Protocol):
    """Told of progress: step, running, resident, ended. Facts are JSON values; times are ms since the command began."""

    def __call__(self, event: str, **facts: object) -> None: ...


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """What the command line asked for. Of `mount`, the mount point and the view are chosen here.

    base        the base image in a registry or layout; image_store: in podman's storage; rootfs: as a directory.
    binds       destination in the container -> directory or file of this machine; network: a namespace, as a path.
    output      descriptors for the container's standard output and error; None: it is not heard.
    """

    mount: MountRequest
    name: str = ""
    runtime: Literal["auto", "runc", "crun", "criu"] = "auto"
    engine: str | None = None
    lazy: bool = True
    eager: bool = False
    keep: bool = False
    base: Reference | None = None
    image_store: str = ""
    rootfs: Path | None = None
    binds: Mapping[str, str] = field(default_factory=dict)
    network: str = ""
    extra: tuple[str, ...] = ()
    directory: Path | None = None
    output: tuple[int, int] | None = (1, 2)


@contextlib.contextmanager
def begun(request: RestoreRequest, report: Report, *, base: bool) -> "Iterator[Flow]":
    """A restore whose mounts are on their way; everything that it starts has ended when the block has.

    `base`: mount the container's root file system as well.
    """
    for finding in checking.tools(request.runtime, request.engine):
        finding.require()
    with interruptible(*SIGNALS), contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0o022))  # what the container is given here is for all of its users
        try:
            flow = Flow(request, report, stack, base=base)
            try:
                yield flow
            except CkptfsError as error:
                raise flow.reason(error) from None
        finally:
            for number in (*SIGNALS, signal.SIGALRM):  # nothing disturbs the unwinding
                signal.signal(number, signal.SIG_IGN)


class Flow:
    """One restore. `daemons` are the processes that serve it."""

    def __init__(self, request: RestoreRequest, report: Report, stack: contextlib.ExitStack, *, base: bool) -> None:
        self.request = request
        self.stack = stack
        self.settings: Settings = request.mount.settings
        self.lazy = request.lazy and not request.eager
        self.daemons: set[int] = set()
        self._report = report
        reference = request.mount.reference
        stem = reference.repository.rpartition("/")[2] or Path(reference.path).name.partition(".")[0] or "restored"
        self.name = check_name(request.name or f"{stem[:48]}-{secrets.token_hex(2)}")
        directory = request.directory or state_dir() / "restores" / self.name
        self.place = stack.enter_context(Workplace(directory, keep=request.keep))
        # With a user namespace criu opens images when it is no longer root here. The place keeps all others out.
        image = request.mount._replace(view="checkpoint", allow_other=True)
        self._image = self._begin_mount(image, "image")
        root = request.mount._replace(view="rootfs", base=request.base)
        self.base = self._begin_mount(root, "base") if base else None
        self.check_machine = self._begin_checks()

    def open_image(self) -> Path:
        """Wait until the checkpoint can be read as a directory, and look whether it can be restored here.

        For `eager` it is a copy on this machine's disk.
        """
        from ckptfs.inspection.source import LocalFiles
        from ckptfs.restore.facts import check_checkpoint

        self.status = self._image.wait()
        self.ready_ms = self.now()
        self.tell("step", text=f"{self.status['digest'][:19]} is mounted after {self.ready_ms:.0f} ms")
        image = self.place / "image"
        self.files = LocalFiles(image)
        self.require(check_checkpoint(self.files, self.settings))
        if self.request.eager:
            image = self.unpack(self._image, "image")
            self.files = LocalFiles(image)
        self.images = image / "checkpoint"
        return image

    def unpack(self, mounted: Pending, name: str) -> Path:
        """All of a mount as local files, and the mount gone: what a pull and an unpacking leave."""
        from ckptfs.restore.bundle import copy_tree

        target = self.place / f"{name}-unpacked"
        with self.place.writing():
            target.mkdir(mode=0o755)
            copy_tree(self.place / name, target)
        mounted.end()
        self.tell("step", text=f"pulled and unpacked ({name}) after {self.now():.0f} ms")
        return target

    def start_lazy_pages(self) -> "LazyPages | None":
        """The daemon, which must still be waited for; None when all memory is to be there before the container runs."""
        if not self.lazy:
            return None
        from ckptfs.restore.lazy_pages import LazyPages

        lazy = self.stack.enter_context(LazyPages(self.images, self.place / "work", self.settings))
        self.daemons.add(lazy.pid)
        self.place.record(lazy_pid=lazy.pid)
        return lazy

    def document(self, name: str) -> dict[str, Any] | None:
        """A JSON object of the checkpoint; None where it has none."""
        from ckptfs.restore.facts import document

        return document(self.files, name, self.settings.limits)

    def reason(self, error: CkptfsError) -> CkptfsError:
        """Why a program, or we, could not go on: what our mounts could not give to read, if that was it."""
        numbers = could_not_read(error.message)
        for name in ("image", "base") if numbers else ():
            with contextlib.suppress(CkptfsError):
                failures = [one for one in statuses(str(self.place / name))[0]["failures"] if one["errno"] in numbers]
                if failures:
                    why = rebuilt({**failures[-1], "error": f"{error.message}: {failures[-1]['error']}"})
                    if why.exit_code == UnavailableError.exit_code:
                        why.hint = "--read-deadline hard waits for as long as it takes"
                    return why
        return error

    def require(self, findings: Iterable[checking.Finding]) -> None:
        """Raise the first that does not hold."""
        for finding in findings:
            finding.require()

    # -- events --------------------------------------------------------------------------------------------------------

    def running(self, pid: int, **facts: object) -> None:
        facts = {"name": self.name, "pid": pid, "lazy": self.lazy, **facts}
        facts |= {"ready_ms": self.ready_ms, "running_ms": self.now(), "directory": str(self.place.path)}
        facts |= {"digest": self.status["digest"], "reference": str(self.request.mount.reference)}
        self.tell("running", **facts)

    def resident(self) -> None:
        self.tell("resident", resident_ms=self.now())

    def tell(self, event: str, **facts: object) -> None:
        self._report(event, **facts)

    def now(self) -> float:
        """Milliseconds since the command was started."""
        return round((time.monotonic() - self.request.mount.started) * 1000, 1)

    # -- what runs meanwhile -------------------------------------------------------------------------------------------

    def _begin_mount(self, wanted: MountRequest, name: str) -> Pending:
        pending = begin(wanted._replace(mountpoint=str(self.place / name)))
        self.daemons.add(pending.pid)
        if not self.request.keep:
            self.stack.callback(pending.end)
        return pending

    def _begin_checks(self) -> Callable[[], None]:
        """Ask criu and the kernel; the result waits for the answer and raises what stands against a restore."""
        worker = self.stack.enter_context(ThreadPoolExecutor(1))
        answer = worker.submit(checking.kernel_once, self.settings, lazy=self.lazy)
        return lambda: self.require(answer.result())
