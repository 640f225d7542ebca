"""Files and directories that a command writes to a path of the user's choice: whole under their name, or not at all.

Owns what OSError means there. `pull` has a destination of its own.
"""

import errno
import os
import secrets
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, cast

from ckptfs.cli.options import F
from ckptfs.errors import CacheError, CkptfsError, UsageError
from ckptfs.interrupts import taken_for_ctrl_c

# What another path is needed for; anything else may be mended where it is.
_WRONG_PATH = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP))


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A hidden name beside `target`, which is new: what is made there gets the name `target` at the end.

    After an exception nothing is left. OSError, from whatever is written meanwhile, becomes an error for the user.
    """
    target = target.absolute()
    staging = target.parent / f".ckptfs-{secrets.token_hex(4)}.partial"
    try:
        if os.path.lexists(target):
            raise UsageError(f"{target} exists", hint="name a path that does not")
        try:
            yield staging
            os.rename(staging, target)
        except BaseException:
            _remove(staging)
            raise
    except OSError as error:
        raise _unwritable(target, error) from None


def tidy(function: F) -> F:
    """A command that leaves nothing half written behind by whatever it is ended: also a lost terminal, or `timeout`."""

    @wraps(function)
    def command(*arguments: Any, **options: Any) -> Any:
        with taken_for_ctrl_c(signal.SIGTERM, signal.SIGHUP):
            return function(*arguments, **options)

    return cast("F", command)


def create(path: Path) -> int:
    """A new file that only its owner can read, open for writing."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def write(path: Path, data: bytes) -> None:
    """In place of what is there; after an error, which becomes one for the user, nothing is there."""
    try:
        with open(path, "wb") as file:
            try:
                file.write(data)
                file.flush()
            except OSError:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _unwritable(path, error) from None


def temporary() -> Path:
    """Where files lie for as long as a command runs. A container with a read-only root may have no such place."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise CacheError("there is no directory for temporary files", hint="name one: TMPDIR=DIR") from None


def require_writable(path: Path) -> None:
    """For what is written at the end of something long: whether it can be, tried before. Changes nothing."""
    try:
        try:
            os.close(create(path))
            path.unlink()
        except FileExistsError:
            os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> CkptfsError:
    message = f"{path} cannot be written: {error.strerror}"
    if error.errno in _WRONG_PATH:
        return UsageError(message, hint="name a path in a directory that is there")
    return CacheError(message, hint="name one in a directory with room, of your own")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
