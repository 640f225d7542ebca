"""Whose key a cache directory is encrypted with: one directory has one key, or none.

Without this a wrong key would be a cold cache that silently fills up, and a forgotten key would put plain process
memory beside the encrypted. `<cache-dir>/v1/key` holds a keyed hash that tells keys apart and nothing else, or zeros
where there is no key. Who has no key marks the directory before it writes there. Who has one takes a directory only
when it is empty and nobody else has it open: one that is not marked may be in use by an earlier version, or by a mount
whose disk was too full for a mark. Called by cache.py.
"""

import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ckptfs.engine.directory import CacheDirectory
from ckptfs.engine.disk import DiskOps, Handle, read_all
from ckptfs.engine.documents import replace
from ckptfs.errors import CacheError

_BYTES = 32
PLAIN = b"\0" * _BYTES  # the mark of a directory that is not encrypted
_PATIENCE = 2.0  # seconds for others to end, or to mark the directory: `ckptfs cache info` takes moments


def require(directory: CacheDirectory, mine: bytes, *, empty: Callable[[], bool], ops: DiskOps) -> None:
    """Have the directory belong to the key with the fingerprint `mine` (32 bytes), or be PLAIN.

    CacheError where it belongs to another, or may do so. OSError when it cannot be marked as encrypted.
    """
    path = directory.key_mark
    found = _read(path, ops)
    if mine == PLAIN:
        if found is None:
            with suppress(OSError):  # what is there can be read also from a disk that is full or read-only
                _write(directory, PLAIN, ops)
        found = found or PLAIN
    elif found in (None, PLAIN):
        found = _taken(directory, mine, empty, ops)
    if found == mine:
        return
    root = path.parent.parent
    if mine == PLAIN:
        what, advice = "is encrypted", "give its key with --cache-key"
    elif found is None:
        what, advice = "is in use, and may get data that is not encrypted", "unmount first, use another --cache-dir"
    elif found == PLAIN:
        what, advice = "is not encrypted", "use another --cache-dir"
    else:
        what, advice = "is encrypted with another key", "give that key"
    clear = f"empty it: ckptfs cache clear --cache-dir {shlex.quote(str(root))}"
    raise CacheError(f"the cache {root} {what}", hint=f"{advice}, or {clear}")


def is_encrypted(path: Path, ops: DiskOps) -> bool:
    """With whatever key."""
    return _read(path, ops) not in (None, PLAIN)


def forget(path: Path, ops: DiskOps) -> None:
    """The directory is empty and belongs to nobody again."""
    try:
        ops.unlink(path)
    except FileNotFoundError:
        pass


def _taken(directory: CacheDirectory, mine: bytes, empty: Callable[[], bool], ops: DiskOps) -> bytes | None:
    """The mark of a directory that had none or PLAIN, once it is `mine` if that is possible."""
    path = directory.key_mark
    with directory.alone(_PATIENCE, unless=lambda: _read(path, ops) is not None) as alone:
        found = _read(path, ops)
        if alone and found in (None, PLAIN):
            found = mine if empty() else PLAIN
            _write(directory, found, ops)
        return found


def _read(path: Path, ops: DiskOps) -> bytes | None:
    try:
        handle = Handle(ops, str(path), os.O_RDONLY)
    except FileNotFoundError:
        return None
    mark = read_all(ops, handle.fd, 0, _BYTES)
    return mark if len(mark) == _BYTES else None  # torn by a crash


def _write(directory: CacheDirectory, mark: bytes, ops: DiskOps) -> None:
    replace(ops, str(directory.documents), str(directory.key_mark), [mark])
