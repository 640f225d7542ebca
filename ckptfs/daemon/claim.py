"""Who mounts where: one lock for each mount point, held by its daemon, and what the dead have left.

Called by mounting.py and asking.py.
"""

import contextlib
import shlex
from typing import Self

from ckptfs.control.client import MountFiles, ensure_runtime_dir, locked_names, prune_logs, read_state
from ckptfs.control.lock import FileLock
from ckptfs.daemon.requests import Request
from ckptfs.errors import MountError
from ckptfs.fuse.mountpoint import canonical, mount_at, prepare


class Lock(FileLock):
    """The lock of one mount point; held by the daemon as long as it lives. MountError when another has it."""

    def __init__(self, path: str, fd: int = -1) -> None:
        """`fd`: the lock that another process holds for us."""
        self.path = path
        self.files = MountFiles.of(path)
        super().__init__(self.files.lock, fd)

    def __enter__(self) -> Self:
        if not self.acquire():
            raise MountError(f"{self.path} is mounted already", hint=f"run: ckptfs umount {shlex.quote(self.path)}")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()  # a forked daemon holds its own reference

    def remove(self, *, keep_log: bool = True) -> None:
        """The holder has ended: nothing stays behind. Whoever waits for the lock sees that the file is another."""
        if self.current() or not self.files.lock.exists():  # else the files are of who has mounted here since
            self.files.remove(keep_log=keep_log)
            self.files.lock.unlink(missing_ok=True)


class Claim(Lock):
    """The right to mount on a directory that can be mounted on; of several at once exactly one gets it."""

    def __init__(self, request: Request) -> None:
        ensure_runtime_dir()
        sweep()
        prune_logs(request.settings.timeouts.old_log)
        super().__init__(canonical(request.mountpoint))

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            prepare(self.path)
        except BaseException:
            self.remove()
            self.__exit__()
            raise
        return self


def sweep() -> None:
    """Remove what was left by daemons that were killed, once nothing is mounted there any more: nobody else will."""
    for files in locked_names():
        lock = FileLock(files.lock)
        with contextlib.suppress(OSError):
            lock.open()
            with contextlib.closing(lock):
                if lock.take() and lock.current() and not _is_mounted(files):
                    files.remove()
                    files.lock.unlink()


def _is_mounted(files: MountFiles) -> bool:
    state = read_state(files)  # none before a first read has worked: `umount` finds such a mount without
    return state is not None and mount_at(state["mountpoint"]) is not None
