"""runc, crun and criu as programs: which can restore, how they are told to, what they say when they cannot.

Owns the command lines and the reading of logs. What differs: runc has --lazy-pages; crun 1.21 has not, but the criu
that it starts reads a configuration file named by the environment; both leave their words in a log that they are given.
"""

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptfs.errors import RestoreError
from ckptfs.namespace import in_own_namespace, mount, unmount
from ckptfs.settings import Settings

RUNTIMES = ("runc", "crun")
PID_FILE = "container.pid"  # in the work directory
_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_TRIES = 100  # of 10 ms
_TIDY = 5.0  # seconds for a runtime to clean up; it takes some 20 ms
# criu says these in every restore without CAP_SYS_RESOURCE, and after every failure.
_HARMLESS = ("RLIMIT_NOFILE", "Restoring FAILED", "exited, status", "cgroupd: recv req")
# What criu says where a checkpoint was made with an option that the restore was not given.
_WANTS = {
    "Connected TCP socket in image": "--tcp-established",
    "External socket found in image": "--ext-unix-sk",
    "not a session leader": "--shell-job",
    "slave peer index": "--shell-job",
}
# EIO in the words of criu, of its restorer, which has no strerror(3), and of Go.
_UNREAD = {  # errno -> what criu and runtimes say of it
    errno.EIO: ("Input/output error", "input/output error", "(-5)"),
    errno.EACCES: ("Permission denied", "permission denied", "(-13)"),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One restore: where the images are, where logs go, and what the container's output is."""

    images: Path
    work: Path
    bundle: Path
    name: str
    lazy: bool
    extra: Sequence[str]
    stdout: int
    stderr: int
    console: Path | None = None

    @property
    def pid_file(self) -> Path:
        return self.work / PID_FILE


def why_not(name: str, settings: Settings) -> str:
    """Why runtime `name` cannot restore here; "" when it can. Not every crun is built with criu."""
    if shutil.which(name) is None:
        return f"{name} is not in PATH"
    return "" if "--image-path" in _help(name, settings.timeouts.tool) else f"this {name} is built without criu"


def require_free(runtime: str, name: str) -> None:
    """RestoreError when the runtime has a container of that name: it is someone else's and must not be touched."""
    if runtime != "criu" and _bundle_of(runtime, name) is not None:
        raise RestoreError(f"{runtime} has a container {name} already", hint="give another --name")


def _bundle_of(runtime: str, name: str) -> str | None:
    """What the container of that name was made from; None where there is none."""
    done = subprocess.run([runtime, "state", name], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    return str(json.loads(done.stdout)["bundle"]) if done.returncode == 0 else None


def restore(runtime: str, job: Job, settings: Settings) -> int:
    """Bring the container to life; returns the pid of its first process on this machine. RestoreError."""
    environment = dict(os.environ)
    lazy = ["--lazy-pages"] if job.lazy else []
    if job.lazy and runtime != "criu" and "--lazy-pages" not in _help(runtime, settings.timeouts.tool):
        lazy = []
        environment["CRIU_CONFIG_FILE"] = str(write_criu_config(job.work / "criu.conf", lazy=True))
    if runtime == "criu":
        command = ["criu", "restore", "--restore-detached", "--images-dir", str(job.images), "--work-dir"]
        command += [
            str(job.work),
            "--log-file",
            "restore.log",
            "-v2",
            "--pidfile",
            str(job.pid_file),
            *lazy,
            *job.extra,
        ]
    else:
        command = [runtime, "--log", str(job.work / "runtime.log"), "--log-format", "json", "restore", "--detach"]
        command += ["--image-path", str(job.images), "--work-path", str(job.work), "--bundle", str(job.bundle)]
        command += ["--pid-file", str(job.pid_file), *lazy, *job.extra]
        command += ["--console-socket", str(job.console)] if job.console else []
        command.append(job.name)
    # Processes of a shell are given the terminal of this one, as its standard input, and its session.
    ours = "--shell-job" in job.extra
    try:
        process = subprocess.Popen(
            command,
            stdin=None if ours else subprocess.DEVNULL,
            stdout=job.stdout,
            stderr=job.stderr,
            env=environment,
            start_new_session=not ours,
        )
    except OSError as error:
        raise RestoreError(f"{command[0]} cannot be started: {error.strerror}") from None
    try:
        code = process.wait()
    except BaseException:
        _interrupt(process)
        raise
    if code != 0:
        raise failure(runtime, job.work)
    try:
        return int(job.pid_file.read_text())
    except FileNotFoundError:
        hint = "what follows -- are options of its restore"
        raise RestoreError(f"{runtime} ended well and restored nothing", hint=hint) from None


def _interrupt(process: "subprocess.Popen[bytes]") -> None:
    """End a restore under way. A runtime whose criu dies tidies up; one that is killed leaves mounts and state."""
    _kill(children(process.pid) or {process.pid})
    try:
        process.wait(_TIDY)
    except subprocess.TimeoutExpired:
        _kill({*children(process.pid), process.pid})
        process.wait()


def _kill(pids: Collection[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children(pid: int) -> set[int]:
    """The processes that `pid` is the parent of."""
    found: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(map(int, file.read_text().split()))
    return found


def delete(runtime: str, name: str, bundle: Path) -> None:
    """Have the runtime forget the container, and end it if it still runs; not one that was made from something else."""
    if runtime != "criu" and _bundle_of(runtime, name) in (None, str(bundle)):
        subprocess.run([runtime, "delete", "--force", name], capture_output=True, check=False, stdin=subprocess.DEVNULL)


def cgroup(name: str) -> str:
    """The container's cgroup; a path of its own, so that the original may still run here.

    Restores share no directory above: one that ends would take it away between two mkdir(2) of another's runtime.
    """
    return f"/ckptfs-{name}"


def remove_cgroups(name: str) -> None:
    """The cgroup and those in it (criu makes all that the container had), in every hierarchy.

    Runtimes remove only the first, if they succeed. criu also makes them in hierarchies that nobody has mounted.
    """
    for top in (_CGROUPS, *_CGROUPS.iterdir()):
        _remove_tree(top / cgroup(name).lstrip("/"))
    if hierarchies := _not_mounted():
        in_own_namespace(functools.partial(_remove_unseen, cgroup(name), hierarchies))


def _remove_unseen(name: str, hierarchies: Sequence[str]) -> None:
    """The same in hierarchies that no directory shows.

    What is left of one container is dumped with the next and made again below that one's cgroup: it doubles each time,
    and criu took 1.6 s for 24 576 of them.
    """
    for options in hierarchies:
        with contextlib.suppress(OSError):
            mount("cgroup", str(_CGROUPS), options=options)
            try:
                _remove_tree(_CGROUPS / name.lstrip("/"))
            finally:
                unmount(str(_CGROUPS))


def _remove_tree(own: Path) -> None:
    """A container's cgroup with all below it."""
    if own.is_dir():
        for path in (*sorted(own.rglob("*/"), reverse=True), own):
            _remove_cgroup(path)


def _not_mounted() -> list[str]:
    """Options by which mount(8) shows the version 1 hierarchies that exist and that no directory shows: cgroups(7)."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    shown = {option for _, _, kind, options, *_ in mounts if kind == "cgroup" for option in options.split(",")}
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    names = [controllers for _, controllers, _ in lines if controllers and shown.isdisjoint(controllers.split(","))]
    return [f"none,{name}" if name.startswith("name=") else name for name in names]


def _remove_cgroup(path: Path) -> None:
    for _ in range(_CGROUP_TRIES):
        try:
            path.rmdir()
        except OSError as error:
            if error.errno == errno.EBUSY and not any(path.glob("*/cgroup.procs")):
                time.sleep(0.01)  # its last process is gone, but not yet for the kernel
                continue
        break


def write_criu_config(path: Path, *, lazy: bool, words: Sequence[str] = (), **options: Path) -> Path:
    """A configuration file of criu: one option per line, without dashes (criu.conf(5)). `words` are such lines."""
    lines = [f"{name.replace('_', '-')} {value}" for name, value in options.items()]
    path.write_text("\n".join([*lines, *words, *(["lazy-pages"] if lazy else [])]) + "\n")
    return path


def failure(runtime: str, work: Path) -> RestoreError:
    """What kept the container from running, from criu's log or else from the runtime's."""
    said = criu_complaint(work / "restore.log") or _last_message(work / "runtime.log") or "it does not say why"
    return RestoreError(f"{runtime} could not restore: {said}", hint=way_out(said, work))


def way_out(said: str, work: Path) -> str:
    """What to do after a restore whose criu or runtime `said` that; their logs are in `work`."""
    for words, option in _WANTS.items():
        if words in said:
            return f"the checkpoint was made with {option}, and is restored with it: -- {option}"
    return f"the logs are in {work} (stay with --keep)"


def could_not_read(said: str) -> frozenset[int]:
    """The errno that criu or a runtime has got from a read, by its words."""
    return frozenset(number for number, words in _UNREAD.items() if any(word in said for word in words))


def criu_complaint(log: Path) -> str:
    """The first error in a log of criu that explains something; "" when there is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        _, found, text = line.partition("Error (")  # where in criu; the tar that it runs has errors of its own there
        if found and not any(word in text for word in _HARMLESS):
            return f"({text.strip()}"
    return ""


def _last_message(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
        entry = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return ""
    message = entry.get("msg", "") if isinstance(entry, dict) else ""
    return " ".join(str(message).split())


@functools.cache
def _help(name: str, patience: float) -> str:
    try:
        done = subprocess.run(
            [name, "restore", "--help"],
            capture_output=True,
            text=True,
            check=False,
            timeout=patience,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
