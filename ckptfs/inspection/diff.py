"""Two checkpoints compared: processes, memory pages by virtual address, files by content and metadata.

Memory is compared page by page where both have a page of the same process at the same address; what a source can tell
to be equal without reading (the same chunk, by digest) is not read. Called by image_diff.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ckptfs.criu.memory import Place
from ckptfs.errors import FormatError
from ckptfs.inspection.memory import ProcessMemory
from ckptfs.inspection.processes import Process
from ckptfs.inspection.source import Images, announced
from ckptfs.model.toc import Chunk
from ckptfs.settings import MiB

Status = Literal["added", "removed", "modified"]
# The parts, (offset, length), of two places of the same length that have to be read to know whether they are equal.
Unknown = Callable[[Place, Place], Iterable[tuple[int, int]]]

_PIECE = 1 * MiB  # of memory that is compared at once, from each checkpoint


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file as `diff_files` compares it. `content` is anything that is equal for equal bytes: a digest, chunk keys."""

    type: str
    mode: int
    uid: int
    gid: int
    size: int
    content: object = None
    target: str = ""
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileChange:
    """`fields` names what is different in a modified file."""

    path: str
    status: Status
    fields: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "status": self.status, "fields": list(self.fields)}


@dataclass(frozen=True, slots=True)
class ProcessChange:
    """`fields` maps what is different to (before, after): command, state, arguments, memory_size, open_files, ..."""

    pid: int
    name: str
    status: Status
    fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        changes = {name: {"before": before, "after": after} for name, (before, after) in self.fields.items()}
        return {"pid": self.pid, "command": self.name, "status": self.status, "changes": changes}


@dataclass(frozen=True, slots=True)
class MemoryChange:
    """Pages of one process. `changed` are (vaddr, bytes) areas whose pages differ, of the pages that both have."""

    pid: int
    page_size: int
    same_pages: int
    changed_pages: int
    added_pages: int
    removed_pages: int
    changed: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "pid": self.pid,
            "page_size": self.page_size,
            "same_pages": self.same_pages,
            "changed_pages": self.changed_pages,
            "added_pages": self.added_pages,
            "removed_pages": self.removed_pages,
            "changed": [{"address": f"{vaddr:#018x}", "length": length} for vaddr, length in self.changed],
        }


@dataclass(frozen=True, slots=True)
class ContainerChange:
    """What changed inside one container; `name` is that of its directory in a pod, else ""."""

    name: str = ""
    processes: tuple[ProcessChange, ...] = ()
    memory: tuple[MemoryChange, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "container": self.name,
            "processes": [change.to_json() for change in self.processes],
            "memory": [change.to_json() for change in self.memory],
        }


@dataclass(frozen=True, slots=True)
class Difference:
    """`fetch_bytes`: what fetching the second takes where the first is cached, None where nobody worked it out."""

    containers: tuple[ContainerChange, ...] = ()
    files: tuple[FileChange, ...] = ()
    fetch_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "containers": [change.to_json() for change in self.containers],
            "files": [change.to_json() for change in self.files],
            "fetch_bytes": self.fetch_bytes,
        }


def diff_files(before: Mapping[str, FileFacts], after: Mapping[str, FileFacts]) -> tuple[FileChange, ...]:
    """What changed between two trees (path -> facts), by path."""
    out = []
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path), after.get(path)
        if old is None or new is None:
            out.append(FileChange(path, "added" if old is None else "removed"))
        elif old != new:
            names = ("type", "mode", "uid", "gid", "size", "content", "target", "xattrs")
            fields = tuple(name for name in names if getattr(old, name) != getattr(new, name))
            out.append(FileChange(path, "modified", fields))
    return tuple(out)


def diff_processes(before: Iterable[Process], after: Iterable[Process]) -> tuple[ProcessChange, ...]:
    """What changed between the processes of two checkpoints of one container, by pid."""
    old, new = {process.pid: process for process in before}, {process.pid: process for process in after}
    out = []
    for pid in sorted(old.keys() | new.keys()):
        a, b = old.get(pid), new.get(pid)
        if a is None or b is None:
            name = (a or b).name  # type: ignore[union-attr]
            out.append(ProcessChange(pid, name, "added" if a is None else "removed"))
            continue
        fields = {name: (x, y) for name, x, y in _compared(a, b) if x != y}
        if fields:
            out.append(ProcessChange(pid, b.name, "modified", fields))
    return tuple(out)


def _compared(a: Process, b: Process) -> Iterator[tuple[str, Any, Any]]:
    yield "command", a.name, b.name
    yield "task_state", a.state, b.state
    yield "threads", a.threads, b.threads
    yield "arguments", _list(a.arguments), _list(b.arguments)
    yield "environment_variables", _list(a.environment), _list(b.environment)
    yield "memory_size", a.memory, b.memory
    yield "shared_memory_size", a.shared, b.shared
    yield "open_files", _open(a), _open(b)


def _list(strings: tuple[str, ...] | None) -> list[str] | None:
    return None if strings is None else list(strings)


def _open(process: Process) -> dict[str, str]:
    return {entry.fd: entry.path for entry in process.descriptors}


def _everything(a: Place, _: Place) -> Iterable[tuple[int, int]]:
    return [(0, a.length)]


def diff_memory(before: Images, after: Images, pid: int, unknown: Unknown = _everything) -> MemoryChange:
    """The pages of one process in two checkpoints. Reads the pages that have `unknown` parts."""
    old, new = ProcessMemory(before, pid), ProcessMemory(after, pid)
    page = new.page_size
    if old.page_size != page:
        raise FormatError(f"process {pid} has pages of {old.page_size} bytes in one checkpoint and {page} in the other")

    def expect(batch: Sequence[tuple[int, int]]) -> None:
        old.expect(batch)
        new.expect(batch)

    changed = 0
    areas: list[tuple[int, int]] = []
    for vaddr, length in announced(_to_read(old, new, unknown), lambda piece: piece[1], expect):
        for at in _different_pages(old, new, vaddr, length):
            changed += 1
            if areas and sum(areas[-1]) == at:
                areas[-1] = (areas[-1][0], areas[-1][1] + page)
            else:
                areas.append((at, page))
    common = sum(length for _, length in _common(old, new))
    added, removed = (new.size - common) // page, (old.size - common) // page
    return MemoryChange(pid, page, common // page - changed, changed, added, removed, tuple(areas))


def fetch_bytes(before: Iterable[Chunk], after: Iterable[Chunk]) -> int:
    """What fetching the chunks of `after` takes where those of `before` are cached already: encoded bytes."""
    have = {chunk.key for chunk in before}
    return sum({chunk.key: chunk.size for chunk in after if chunk.key not in have}.values())


def _common(old: ProcessMemory, new: ProcessMemory) -> Iterator[tuple[int, int]]:
    """The areas of memory that both have, ascending."""
    theirs = list(old.areas())
    position = 0
    for start, length in new.areas():
        end = start + length
        while position < len(theirs) and theirs[position][0] < end:
            other, size = theirs[position]
            low, high = max(start, other), min(end, other + size)
            if low < high:
                yield low, high - low
            if other + size > end:
                break
            position += 1


def _different_pages(old: ProcessMemory, new: ProcessMemory, vaddr: int, length: int) -> Iterator[int]:
    """Addresses of the pages of [vaddr, vaddr + length) that differ."""
    page = new.page_size
    a, b = old.read(vaddr, length), new.read(vaddr, length)
    if a == b:
        return
    for offset in range(0, length, page):
        if a[offset : offset + page] != b[offset : offset + page]:
            yield vaddr + offset


def _to_read(old: ProcessMemory, new: ProcessMemory, unknown: Unknown) -> Iterator[tuple[int, int]]:
    """What has to be read: (vaddr, length) of whole pages, at most _PIECE bytes each, ascending."""
    page = new.page_size
    start = end = 0
    for vaddr, length in _common(old, new):
        for a, b in _paired(old.places(vaddr, length), new.places(vaddr, length)):
            for offset, size in unknown(a, b):
                low = (a.vaddr + offset) // page * page
                high = -(-(a.vaddr + offset + size) // page) * page
                if low > end:
                    yield from _cut(start, end)
                    start = low
                end = max(end, high)
    yield from _cut(start, end)


def _cut(start: int, end: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, _PIECE):
        yield at, min(_PIECE, end - at)


def _paired(first: Iterable[Place], second: Iterable[Place]) -> Iterator[tuple[Place, Place]]:
    """What two ascending lists of places have in common, piece by piece."""
    others = iter(second)
    other = next(others, None)
    for place in first:
        end = place.vaddr + place.length
        while other is not None and other.vaddr < end:
            low, high = max(place.vaddr, other.vaddr), min(end, other.vaddr + other.length)
            if low < high:
                yield _part(place, low, high), _part(other, low, high)
            if other.vaddr + other.length > end:
                break
            other = next(others, None)


def _part(place: Place, low: int, high: int) -> Place:
    return place._replace(vaddr=low, offset=place.offset + low - place.vaddr, length=high - low)
