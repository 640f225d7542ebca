"""Whose key a cache directory is encrypted with: one directory has one key, or none.

Without this a wrong key would be a cold cache that silently fills up, and a forgotten key would put plain process
memory beside the encrypted. `<cache-dir>/v1/key` holds a keyed hash that tells keys apart and nothing else. Called by
cache.py.
"""

import os
import shlex
from pathlib import Path

from ckptfs.engine.disk import DiskOps, Handle, read_all, write_all
from ckptfs.errors import CacheError

_BYTES = 32
PLAIN = b"\0" * _BYTES  # the mark of a directory that is not encrypted; never written


def require(path: Path, mine: bytes, *, empty: bool, ops: DiskOps) -> None:
    """Take an empty directory for the key with the fingerprint `mine` (32 bytes).

    CacheError where it belongs to another. A directory without a mark is not encrypted if there is anything in it.
    OSError when it cannot be marked.
    """
    found = _read(path, ops)
    if found is None and empty and mine != PLAIN:
        _write(path, mine, ops)
        found = _read(path, ops)  # of two that come at once, the later one wins for both
    found = found or (PLAIN if not empty else mine)
    root = path.parent.parent
    if found == mine:
        return
    if mine == PLAIN:
        what, advice = "is encrypted", "give its key with --cache-key"
    elif found == PLAIN:
        what, advice = "holds data that is not encrypted", "use another --cache-dir"
    else:
        what, advice = "is encrypted with another key", "give that key"
    clear = f"empty it: ckptfs cache clear --cache-dir {shlex.quote(str(root))}"
    raise CacheError(f"the cache {root} {what}", hint=f"{advice}, or {clear}")


def present(path: Path, ops: DiskOps) -> bool:
    """Whether the directory is encrypted, with whatever key."""
    return _read(path, ops) is not None


def forget(path: Path, ops: DiskOps) -> None:
    """The directory is empty and belongs to nobody again."""
    try:
        ops.unlink(path)
    except FileNotFoundError:
        pass


def _read(path: Path, ops: DiskOps) -> bytes | None:
    try:
        handle = Handle(ops, str(path), os.O_RDONLY)
    except FileNotFoundError:
        return None
    mark = read_all(ops, handle.fd, 0, _BYTES)
    return mark if len(mark) == _BYTES else None  # torn by a crash


def _write(path: Path, mark: bytes, ops: DiskOps) -> None:
    part = path.with_name(f"key-{os.getpid()}.tmp")
    handle = Handle(ops, str(part), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    write_all(ops, handle.fd, [mark], 0)
    ops.rename(part, path)
