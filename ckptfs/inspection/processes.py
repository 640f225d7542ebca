"""The processes of a checkpoint: names, command lines, environments, open files, sockets, memory sizes.

Reads pstree and, task by task, core, ids, fdinfo, fs, mm, pagemap; of the pages only those that hold command lines and
environments, all announced at once before the first is read. Called by overview and the `memparse` command.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptfs.criu.core import parse_core, parse_fs
from ckptfs.criu.files import LEGACY_IMAGES, OpenFile, Socket, parse_fdinfo, parse_files, parse_legacy_files
from ckptfs.criu.mm import MAP_SHARED, Mm, parse_mm, parse_vmas
from ckptfs.criu.namespaces import parse_memfds
from ckptfs.criu.pstree import Task, parse_ids, parse_pstree
from ckptfs.errors import FormatError, NotFoundError
from ckptfs.inspection.memory import ProcessMemory
from ckptfs.inspection.parts import Part
from ckptfs.inspection.source import Images


@dataclass(frozen=True, slots=True)
class OpenDescriptor:
    """A descriptor of a process, or its working directory or root (`fd` "cwd", "root"; `kind` "")."""

    fd: str
    kind: str
    path: str
    socket: Socket | None = None


@dataclass(frozen=True, slots=True)
class Process:
    """One process. Sizes in bytes: `memory` is what was dumped of its own, `shared` the size of its shared mappings.

    Arguments and environment are what the memory held where execve(2) had put them; None where the pages cannot be
    read (compressed by a newer CRIU), and () for a process without memory, or where nobody asked for them. `cut` tells
    that they were longer than Limits.argument_bytes.
    """

    pid: int
    ppid: int
    pgid: int
    sid: int
    threads: int
    name: str
    state: str
    machine: str
    memory: int = 0
    shared: int = 0
    arguments: tuple[str, ...] | None = ()
    environment: tuple[str, ...] | None = ()
    cut: bool = False
    descriptors: tuple[OpenDescriptor, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Without descriptors and children: where those stand is the overview's choice."""
        out: dict[str, Any] = {"pid": self.pid, "command": self.name, "task_state": self.state}
        if self.arguments:
            out["cmdline"] = " ".join(self.arguments)
            out["arguments"] = list(self.arguments)
        if self.environment:
            out["environment_variables"] = dict(variable.partition("=")[::2] for variable in self.environment)
        out.update(ppid=self.ppid, pgid=self.pgid, sid=self.sid, threads=self.threads)
        out.update(memory_size=self.memory, shared_memory_size=self.shared)
        return out


def read_processes(images: Images, parts: Part = Part.EVERYTHING, pid: int | None = None) -> tuple[Process, ...]:
    """Every process, or `pid` and its descendants, in the order of pstree.img: parents before their children."""
    tasks = parse_pstree(images.need("pstree.img"), limits=images.limits)
    if pid is not None:
        tasks = _family(tasks, pid)
    files = _open_files(images) if parts & (Part.FILES | Part.SOCKETS) else None
    readers = [_Reader(images, task, files, parts) for task in tasks]
    images.files.expect([wanted for reader in readers for wanted in reader.string_ranges()])
    return tuple(reader.process() for reader in readers)


def _family(tasks: Sequence[Task], pid: int) -> tuple[Task, ...]:
    pids = {pid}
    for task in tasks:
        if task.ppid in pids:
            pids.add(task.pid)
    found = tuple(task for task in tasks if task.pid in pids)
    if not any(task.pid == pid for task in found):
        raise NoProcess(f"the checkpoint has no process {pid}", hint="`ckptfs inspect REF --ps-tree` lists them")
    return found


class NoProcess(NotFoundError):
    """The checkpoint is another container's than the one that the process is of."""


class _Reader:
    """One process: everything but strings when made, the strings when asked."""

    def __init__(self, images: Images, task: Task, files: Mapping[int, OpenFile] | None, parts: Part) -> None:
        self._images = images
        self._parts = parts
        self._pid = task.pid
        self._mm: Mm | None = None
        self._memory: ProcessMemory | None = None
        core = parse_core(images.need(f"core-{task.pid}.img"), f"core-{task.pid}.img", images.limits)
        self._process = Process(
            task.pid, task.ppid, task.pgid, task.sid, len(task.threads), core.comm, core.state, core.machine
        )
        if core.has_memory:
            self._look(files)

    def _look(self, files: Mapping[int, OpenFile] | None) -> None:
        images, pid = self._images, self._pid
        mm = parse_mm(images.need(f"mm-{pid}.img"), f"mm-{pid}.img", images.limits)
        vmas = mm.vmas
        if not vmas and (data := images.read(f"vmas-{pid}.img")) is not None:
            vmas = parse_vmas(data, f"vmas-{pid}.img", images.limits)
        self._mm = mm
        try:
            self._memory = ProcessMemory(images, pid)
        except (FormatError, NotFoundError):
            pass  # the process is shown without what its pages would tell
        self._process = replace(
            self._process,
            memory=self._memory.size if self._memory else 0,
            shared=sum(vma.end - vma.start for vma in vmas if vma.flags & MAP_SHARED),
            descriptors=tuple(self._descriptors(files)) if files is not None else (),
            arguments=None if self._memory is None and Part.COMMANDS in self._parts else (),
            environment=None if self._memory is None and Part.ENVIRONMENT in self._parts else (),
        )

    def string_ranges(self) -> list[tuple[str, int, int]]:
        """What `process` will read of the pages, for CheckpointFiles.expect."""
        if self._memory is None:
            return []
        limit = self._images.limits.argument_bytes
        spans = (self._span(Part.COMMANDS), self._span(Part.ENVIRONMENT))
        return [
            wanted for start, end in spans for wanted in self._memory.ranges(start, max(min(end - start, limit), 0))
        ]

    def process(self) -> Process:
        if self._memory is None:
            return self._process
        arguments, cut = self._strings(*self._span(Part.COMMANDS))
        environment, cut_too = self._strings(*self._span(Part.ENVIRONMENT))
        return replace(self._process, arguments=arguments, environment=environment, cut=cut or cut_too)

    def _span(self, part: Part) -> tuple[int, int]:
        """Where the strings of a part are in memory; nowhere if they are not asked for."""
        if self._mm is None or part not in self._parts:
            return 0, 0
        return self._mm.arguments if part is Part.COMMANDS else self._mm.environment

    def _strings(self, start: int, end: int) -> tuple[tuple[str, ...], bool]:
        """The NUL-terminated strings of [start, end), and whether they were cut."""
        assert self._memory is not None
        length = max(end - start, 0)
        limit = min(length, self._images.limits.argument_bytes)
        text = self._memory.read(start, limit).decode("utf-8", "backslashreplace").rstrip("\0")
        return tuple(text.split("\0")) if text else (), limit < length

    def _descriptors(self, files: Mapping[int, OpenFile]) -> list[OpenDescriptor]:
        images, pid = self._images, self._pid
        out = []
        ids = parse_ids(images.need(f"ids-{pid}.img"), f"ids-{pid}.img", images.limits)
        name = f"fdinfo-{ids.files}.img"
        if (data := images.read(name)) is not None:
            for descriptor in parse_fdinfo(data, name, images.limits):
                file = files.get(descriptor.file)
                path, socket = (file.path, file.socket) if file else (f"{descriptor.kind.lower()}[?]", None)
                out.append(OpenDescriptor(str(descriptor.fd), descriptor.kind, path, socket))
        if (data := images.read(f"fs-{pid}.img")) is not None:
            directories = parse_fs(data, f"fs-{pid}.img", images.limits)
            for word, number in (("cwd", directories.cwd), ("root", directories.root)):
                out.append(OpenDescriptor(word, "", files[number].path if number in files else "unknown"))
        return out


def _open_files(images: Images) -> dict[int, OpenFile]:
    memfds = {}
    if (data := images.read("memfd.img")) is not None:
        memfds = {memfd.id: memfd.name for memfd in parse_memfds(data, limits=images.limits)}
    if (data := images.read("files.img")) is not None:
        return {file.id: file for file in parse_files(data, memfds=memfds, limits=images.limits)}
    out = {}
    for kind in LEGACY_IMAGES:
        if (data := images.read(f"{kind}.img")) is not None:
            out.update({file.id: file for file in parse_legacy_files(data, kind, f"{kind}.img", images.limits)})
    return out


def by_parent(processes: Sequence[Process]) -> Mapping[int, list[Process]]:
    """pid -> children, by pid; 0 -> the roots, those whose parent is not among them."""
    pids = {process.pid for process in processes}
    out: dict[int, list[Process]] = defaultdict(list)
    for process in sorted(processes, key=lambda process: process.pid):
        out[process.ppid if process.ppid in pids else 0].append(process)
    return out
