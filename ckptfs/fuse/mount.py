"""The life of a mount: kernel settings, readiness, signals, drain, end.

One mount per process (pyfuse3 has one session). Whatever ends it - a signal, `ckptfs umount`, `umount(8)` - leaves
nothing mounted and the process exits.
"""

import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable

import pyfuse3
import trio

from ckptfs.engine.threads import in_thread
from ckptfs.errors import MountError, UnavailableError
from ckptfs.fuse.answers import Answering
from ckptfs.fuse.kernel import set_max_background, set_read_ahead
from ckptfs.fuse.mountpoint import Mount, admits_others, detach, mount_at
from ckptfs.settings import Settings

log = logging.getLogger(__name__)

# pyfuse3's default of 99 lets 130 hung reads starve stat for seconds; reads are capped below this by the reader.
_MAX_TASKS = 4096
_SAID = 64 * 1024  # bytes of what is said while mounting
_LAST_WORDS = 0.5  # seconds for answers that are being given when the drain is over


class MountSession:
    """A mounted file system. `stop` may be called from any task; `run` returns when the mount is gone."""

    def __init__(self, operations: Answering, mountpoint: str, settings: Settings) -> None:
        self.mountpoint = mountpoint
        self._operations = operations
        self._settings = settings
        self._stopping = trio.Event()

    async def run(self, options: set[str], on_ready: Callable[[], None]) -> None:
        """Mount, call `on_ready` once a read has worked, serve until stopped. MountError when it cannot be mounted."""
        # From before the mount on: a signal that comes while there is one must not leave it.
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            await self._serve(signals, options, on_ready)

    async def _serve(self, signals: AsyncIterator[int], options: set[str], on_ready: Callable[[], None]) -> None:
        self._init(options)
        mount = mount_at(self.mountpoint)
        try:
            if mount is None:
                raise MountError(f"{self.mountpoint} was unmounted while mounting")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, signals)
                nursery.start_soon(self._end, nursery.cancel_scope)
                nursery.start_soon(self._announce, mount, on_ready)
                await pyfuse3.main(max_tasks=_MAX_TASKS)
                nursery.cancel_scope.cancel()  # unmounted from outside, or terminated by _end
        finally:
            left = mount_at(self.mountpoint)
            if left is not None and left.ours:
                with contextlib.suppress(MountError):
                    detach(self.mountpoint)
            with contextlib.suppress(OSError, RuntimeError):
                pyfuse3.close(unmount=False)

    def _init(self, options: set[str]) -> None:
        """MountError with the reason, which libfuse and fusermount3 tell nobody but stderr."""
        said, stderr = os.memfd_create("stderr"), os.dup(2)
        os.dup2(said, 2)
        reason = ""
        try:
            pyfuse3.init(self._operations, self.mountpoint, options)
        except RuntimeError as error:
            reason = str(error)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            lines = os.pread(said, _SAID, 0).decode(errors="replace").splitlines(keepends=True)
            os.close(said)
            for line in lines:
                who, _, words = line.partition(": ")
                if reason and who in ("fuse", "fusermount3"):
                    reason = words.strip()
                else:  # of somebody else in this process
                    os.write(2, line.encode())
        if reason:
            hint = "in a container give --cap-add SYS_ADMIN" if os.geteuid() == 0 else "name a directory of your own"
            if "allow_other" in options and os.geteuid() != 0 and not admits_others():
                hint = "--allow-other needs a line user_allow_other in /etc/fuse.conf, which root can add"
            raise MountError(f"{self.mountpoint} cannot be mounted: {reason}", hint=hint)

    def stop(self) -> None:
        """Begin to end: no new prefetch, readers that wait get a few seconds."""
        self._stopping.set()

    async def _announce(self, mount: Mount, on_ready: Callable[[], None]) -> None:
        """A read through the kernel, from a thread: only then others may count on it.

        Where no file is known yet an answer has to do: to open a directory waits for all of its names.
        """
        first = self._operations.first_file()

        def read() -> None:
            set_read_ahead(mount, self._settings.sizes)
            if first:
                _first_read(os.path.join(self.mountpoint, os.fsdecode(first)))

        await in_thread(os.stat, self.mountpoint)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, set_max_background, mount, self._settings.sizes)
            nursery.start_soon(in_thread, read)
        on_ready()

    async def _watch(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if self._stopping.is_set():
                log.warning("second signal %d: unmounting at once", number)
                with contextlib.suppress(MountError):
                    detach(self.mountpoint)
                os._exit(0)
            log.info("signal %d: draining", number)
            self.stop()

    async def _end(self, scope: trio.CancelScope) -> None:
        await self._stopping.wait()
        self._operations.quiesce()
        with trio.move_on_after(self._settings.timeouts.drain):
            await self._operations.drained()
        # First the name goes, then the session: new readers see the empty directory, never a dead mount.
        with contextlib.suppress(MountError):
            await in_thread(detach, self.mountpoint, finish=True)
        pyfuse3.terminate()
        await trio.sleep(_LAST_WORDS)
        scope.cancel()


def mount_options(source: str, *, allow_other: bool, read_only: bool = True) -> set[str]:
    """Read-only, no devices, no set-user-id; permissions judged by the kernel by the image's modes.

    Not `read_only`: the kernel hands on what would write, for the operations to refuse.

    But not where an ordinary user mounts for nobody else: the files are root's, mostly, and the kernel lets only that
    user in, who could read the whole image anyway.
    """
    name = source.encode("ascii", "backslashreplace").decode()  # pyfuse3 takes no other letters
    name = name.replace("\\", "\\\\").replace(",", "\\,")
    options = {f"fsname={name}", "subtype=ckptfs", "ro" if read_only else "rw", "nodev", "nosuid"}
    if allow_other or os.geteuid() == 0:
        options.add("default_permissions")
    if allow_other:
        options.add("allow_other")
    return options


def _first_read(path: str) -> None:
    try:
        with open(path, "rb", buffering=0) as file:
            file.read(1)
    except (FileNotFoundError, IsADirectoryError):
        return  # a layer that came meanwhile has something else there, or nothing; that is an answer too
    except OSError as error:
        raise UnavailableError(f"the first read, of {path}, failed: {error.strerror}") from None
