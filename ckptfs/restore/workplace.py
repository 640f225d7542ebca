"""The directory of one restore: where everything of it stands, and how nothing of it stays.

    DIR/image       the checkpoint, mounted               DIR/merged   the container's root: an overlay
    DIR/base        its root file system, mounted         DIR/upper    what the container writes
    DIR/bundle      config.json and stand-ins for mounts  DIR/work     criu's logs and sockets

Owns making, locking and removing such directories, those too whose restore was killed. Never looks into an image.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shlex
import shutil
import signal
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from ckptfs import namespace
from ckptfs.control.client import ensure_runtime_dir
from ckptfs.control.lock import FileLock
from ckptfs.daemon.asking import umount
from ckptfs.errors import CkptfsError, FormatError, MountError, RestoreError, UsageError, outage
from ckptfs.fuse.mountpoint import detach, mounts
from ckptfs.interrupts import whole
from ckptfs.processes import alive
from ckptfs.restore.runtimes import PID_FILE, RUNTIMES, delete, remove_cgroups
from ckptfs.settings import state_dir

log = logging.getLogger(__name__)

_STATE = "ckptfs-restore.json"  # a directory that has it may be removed, so it is a name that nobody else gives
_KEPT = "kept"
_BEGINNING = "restore.beginning"  # in the runtime directory; never removed, so no `FileLock`
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")  # runc takes more, paths and cgroups do not get longer
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # random(4)


class Workplace:
    """A new directory of our own, locked while the block lasts and removed with all mounts below it afterwards.

    keep    leave everything as it is for whoever wants to look.
    """

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path = path.parent.resolve() / path.name
        self.kept = keep
        self._lock = -1
        self._facts: dict[str, object] = {"boot": _boot()}

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with _alone():
                for path in self.path.parent.iterdir():
                    _bury_dead(path)
                self._make()
        except FileExistsError as error:
            raise RestoreError(f"{error.filename} exists", hint=self._way_out()) from None
        except OSError as error:
            raise RestoreError(f"{self.path} cannot be made: {error.strerror}", hint="name a place: --dir") from None
        return self

    @whole
    def _make(self) -> None:
        with contextlib.ExitStack() as undo:
            # Below it everybody may read what they find: criu's images are of mode 0644.
            self.path.mkdir(mode=0o700)
            undo.callback(shutil.rmtree, self.path, ignore_errors=True)
            self._lock = os.open(self.path / _STATE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, self._lock)
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in ("image", "base", "merged", "upper", "overlay", "bundle", "work"):
                (self.path / name).mkdir(mode=0o755)
            undo.pop_all()

    def __exit__(self, *_: object) -> None:
        if self.kept:
            (self.path / _KEPT).touch()
            log.warning("kept: %s; when you have seen it: %s", self.path, self._removal())
        else:
            clear(self.path)
        os.close(self._lock)

    def _way_out(self) -> str:
        """What to do about a path that is there: only what a restore has left may go, and only when it has ended."""
        if (self.path / _STATE).is_file() and (self.path / _KEPT).is_file():
            return f"a restore was kept there; when you have seen it: {self._removal()}"
        return f"name another with {'--name' if self.path.parent == state_dir() / 'restores' else '--dir'}"

    def _removal(self) -> str:
        """The command line that removes a kept directory."""
        below = [mount for mount in mounts() if Path(mount.path).is_relative_to(self.path)]
        others = [mount.path for mount in reversed(below) if not mount.ours]
        ours = [mount.path for mount in below if mount.ours]
        how = [shlex.join(["umount", *others])] * bool(others) + [shlex.join(["ckptfs", "umount", *ours])] * bool(ours)
        how.append(shlex.join(["rm", "-r", str(self.path)]))
        return "; ".join(how)

    def record(self, **facts: object) -> None:
        """Note what runs from here (pid, lazy_pid, runtime, name), besides what was noted before, and since which boot.

        Whoever finds the directory of a restore that was killed must know. The runtime says the pid in PID_FILE.
        """
        self._facts |= facts
        data = json.dumps(self._facts).encode()
        with self.writing():
            os.pwrite(self._lock, data, 0)
            os.ftruncate(self._lock, len(data))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What goes wrong while something is written here, out of a mount as well, as an error for the user."""
        try:
            yield
        except OSError as error:
            where = f"{error.filename or self.path}: {error.strerror}"
            if error.errno == errno.EIO:
                raise outage(where) from None
            raise RestoreError(where, hint="is there room? another place: --dir") from None

    def admit(self, group: int) -> None:
        """Let `group` pass: of a container with a user namespace the root is nobody special here."""
        os.chown(self.path, -1, group)
        self.path.chmod(0o710)

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def check_name(name: str) -> str:
    """A container's name as runtimes and paths take it. UsageError: another can always be given."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot be a container's name", hint="letters, digits and . _ - only: --name")
    return name


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """The only restore of that name: runtimes and cgroups tell containers by it, wherever the directories are."""
    lock = _lock_of(name)
    if not lock.acquire():
        raise RestoreError(f"another restore has the name {name}", hint="give another --name")
    try:
        yield
    finally:
        lock.release()


def _lock_of(name: str) -> FileLock:
    return FileLock(ensure_runtime_dir() / f"restore-{check_name(name)}.lock")


def clear(path: Path) -> None:
    """Unmount everything below `path`, ours by its daemon, and remove the directory. What is gone already is fine."""
    below = [m for m in mounts() if Path(m.path).is_relative_to(path)]
    for mount in reversed(below):
        with contextlib.suppress(CkptfsError):
            if mount.ours:
                umount(mount.path)
            else:
                detach(mount.path)
    if left := [m.path for m in mounts() if Path(m.path).is_relative_to(path)]:
        how = f"run: umount -l {shlex.quote(left[0])}; rm -r {shlex.quote(str(path))}"
        raise MountError(f"{left[0]} cannot be unmounted", hint=how)
    shutil.rmtree(path, ignore_errors=True)


def mount(source: str, target: Path, kind: str, options: str) -> None:
    """mount(2), without flags. RestoreError with the kernel's reason."""
    try:
        namespace.mount(kind, str(target), source=source, options=options)
    except OSError as error:
        hint = "the kernel's log (dmesg) says more"
        if error.errno == errno.EINVAL and kind == "overlay":
            hint = f"{target.parent} must be on a disk that overlay can write to: --dir"
        raise RestoreError(f"{kind} cannot be mounted on {target}: {error.strerror}", hint=hint) from None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other restore begins meanwhile: it would find directories half buried, or ours half made."""
    descriptor = os.open(ensure_runtime_dir() / _BEGINNING, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _bury_dead(path: Path) -> None:
    """Remove `path` if it is of a restore that was killed and whose container has ended: nobody else will."""
    with contextlib.ExitStack() as stack:
        try:
            if not _may_be_ours(path):
                return
            file = stack.enter_context(open(path / _STATE, "r+b"))  # keeps its lock until the directory is gone
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = json.loads(file.read() or b"{}")
        except (OSError, ValueError):
            return  # it is nothing of ours, or lives
        # One that ended while we came for the lock is gone.
        if (path / _KEPT).exists() or not (path / _STATE).exists():
            return
        try:
            if not (_is_of_this_boot(state) and alive(_pid(path, state))):
                _bury(path, state)
        except (OSError, CkptfsError, AttributeError, LookupError, TypeError, ValueError) as error:
            log.warning("%s is of a restore that was killed, and cannot be removed: %s", path, error)


def _may_be_ours(path: Path) -> bool:
    """A directory that only we can write to: others would tell us there what to run and what to remove.

    And no mount: a name in one of ours is looked for as long as a read may take.
    """
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    return not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and found.st_dev == path.parent.lstat().st_dev


def _boot() -> str:
    """What tells this run of the machine from all others."""
    return _BOOT.read_text().strip()


def _is_of_this_boot(state: Mapping[str, Any]) -> bool:
    """Else the numbers of its processes are those of others by now."""
    return state.get("boot") in (None, _boot())


def _pid(path: Path, state: Mapping[str, Any]) -> object:
    """Of the container; None where no runtime has come so far."""
    if "pid" in state:
        return state["pid"]
    with contextlib.suppress(OSError, ValueError):
        return int((path / "work" / PID_FILE).read_text())
    return None


def _bury(path: Path, state: Mapping[str, Any]) -> None:
    """What a killed restore could not do for itself."""
    runtime = state.get("runtime")
    if runtime not in (None, "criu", *RUNTIMES):  # an image that was pulled to here may have such a file
        raise FormatError(f"{_STATE} names the runtime {runtime!r}")
    if _is_of_this_boot(state) and _runs_criu(state.get("lazy_pid")):
        os.killpg(state["lazy_pid"], signal.SIGKILL)
    if state.keys() & {"name", "runtime", "containerd"}:
        lock = _lock_of(state["name"])
        if lock.acquire():  # else a later restore has the name, and all that goes by it
            try:
                _forget(state, path)
            finally:
                lock.release()
    clear(path)


def _forget(state: Mapping[str, Any], path: Path) -> None:
    name, runtime = state["name"], state.get("runtime")
    if runtime is not None:
        delete(runtime, name, path / "bundle")
    if state.get("containerd"):
        from ckptfs.restore.containerd import bury

        bury(state["containerd"], name, path)
    remove_cgroups(name)


def _runs_criu(pid: object) -> bool:
    with contextlib.suppress(OSError):
        return b"lazy-pages" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False
