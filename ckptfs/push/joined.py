"""A source that is an increment of ours (increment.py), as the whole checkpoint that it stands for.

So that an image that was pushed on top of others can be pushed without them, or on top of another. Increments of criu's
own, whose `parent` is a link, stay as they are. Reads each pages file front to back, as every source is read.
"""

import posixpath
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from ckptfs.criu.images import parse_name
from ckptfs.criu.increments import Joined
from ckptfs.criu.pagemap import Pagemap, parse_pagemap
from ckptfs.errors import FormatError
from ckptfs.layers.zstd_chunked_writer import Payload, read_exactly
from ckptfs.push.checkpoint_files import Checkpoint, CheckpointFile
from ckptfs.push.spool import PiecesPayload
from ckptfs.settings import Limits, MiB


def joined(checkpoint: Checkpoint, limits: Limits) -> Checkpoint:
    """The checkpoint without its parents; itself when it has none that lies inside of it."""
    files = {file.path: file for file in checkpoint.files}
    tops = [f.directory for f in checkpoint.files if f.name == b"inventory.img" and _has_parent(files, f.directory)]
    tops = [top for top in tops if not top.endswith(b"/parent")]
    if not tops:
        return checkpoint
    for top in tops:
        _join(files, top, limits)
    return replace(checkpoint, files=[files[path] for path in sorted(files)])


def _has_parent(files: Mapping[bytes, CheckpointFile], top: bytes) -> bool:
    whole = files.get(top + b"/whole")
    return whole is not None and whole.inode.is_dir


def _join(files: dict[bytes, CheckpointFile], top: bytes, limits: Limits) -> None:
    dumped: dict[bytes, CheckpointFile] = {}
    for path in [path for path in files if path.rpartition(b"/")[0] == top + b"/whole"]:
        name = path.rpartition(b"/")[2]
        whole = parse_pagemap(files[path].read(limits.criu_image_bytes), name.decode(), limits)
        levels = list(_levels(files, top + b"/" + name, limits))
        sources = [_pages_of(files, top + b"/parent" * n, level) for n, level in enumerate(levels)]
        found = [file for file in sources if file is not None]
        if not levels or len(found) != len(levels):
            raise FormatError(f"{name.decode('utf-8', 'replace')} lacks the pages of an increment")
        pages = top + b"/" + whole.file.encode()
        dumped[top + b"/" + name] = replace(files[path], path=top + b"/" + name)
        if levels[0].runs == whole.runs:  # none of its pages is the parent's
            dumped[pages] = replace(found[0], path=pages)
            continue
        memory = Joined(levels, {level.file: file.inode.size for level, file in zip(levels, found, strict=True)})
        memory.check(whole)
        inode = replace(found[0].inode, size=memory.size, extents=())
        dumped[pages] = CheckpointFile(pages, inode, None, partial(_payload, memory, found))
    for path in [path for path in files if _is_of_increments(path, top)]:
        del files[path]
    files.update(dumped)


def _is_of_increments(path: bytes, top: bytes) -> bool:
    directory, _, name = path.rpartition(b"/")
    if directory == top:
        kind = parse_name(name.decode("utf-8", "replace"))
        return name in (b"parent", b"whole") or (kind is not None and kind.kind == "pages")
    return path.startswith((top + b"/parent/", top + b"/whole/"))


def _levels(files: Mapping[bytes, CheckpointFile], path: bytes, limits: Limits) -> Iterator[Pagemap]:
    """The pagemap at `path`, that of the same name in its parent, and so on."""
    directory, _, name = path.rpartition(b"/")
    for _ in range(limits.increments):
        file = files.get(directory + b"/" + name)
        if file is None:
            return
        yield parse_pagemap(file.read(limits.criu_image_bytes), name.decode(), limits)
        directory += b"/parent"


def _pages_of(files: Mapping[bytes, CheckpointFile], directory: bytes, pagemap: Pagemap) -> CheckpointFile | None:
    """The pages file of a pagemap in `directory`, through the link that is there for one of a parent."""
    file = files.get(directory + b"/" + pagemap.file.encode())
    target = _target(file) if file is not None else None
    found = files.get(target) if target is not None else file
    return found if found is not None and found.is_regular else None


def _target(file: CheckpointFile) -> bytes | None:
    if not stat.S_ISLNK(file.inode.mode):
        return None
    return posixpath.normpath(posixpath.join(file.directory, file.inode.target))


def _payload(memory: Joined, sources: list[CheckpointFile]) -> Payload:
    return PiecesPayload(_pages(memory, sources))


def _pages(memory: Joined, sources: list[CheckpointFile]) -> Iterator[bytes]:
    """The pages of all levels in the order of addresses; in each file they ascend as well."""
    with ExitStack() as stack:
        readers = [_Forward(file) for file in sources]
        for reader in readers:
            stack.callback(reader.close)
        for level, offset, length in memory.places():
            for done in range(0, length, MiB):
                yield readers[level].read(offset + done, min(MiB, length - done))


class _Forward:
    """A file that is read at ascending offsets."""

    def __init__(self, file: CheckpointFile) -> None:
        self._path = file.path
        self._payload = file.open() if file.open is not None and file.inode.size else None
        self._at = 0

    def read(self, offset: int, length: int) -> bytes:
        while self._at < offset:
            self._take(min(MiB, offset - self._at))
        return self._take(length)

    def close(self) -> None:
        if self._payload is not None:
            self._payload.close()

    def _take(self, length: int) -> bytes:
        data = bytearray(length)
        if self._payload is not None:
            read_exactly(self._payload, memoryview(data), self._path)
        elif length:
            raise FormatError("a pages file without content is asked for pages")
        self._at += length
        return bytes(data)
