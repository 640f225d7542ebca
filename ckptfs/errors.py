"""Every way in which ckptfs fails, in one tree.

    CkptfsError
    ├── UsageError          2   the command line, a reference or a setting is wrong
    ├── NotFoundError       3   the registry has no such repository, tag or blob; no such path in the image
    ├── AuthError           4   the registry refused the credentials
    ├── UnavailableError    5   network, registry or deadline: trying again can help
    ├── IntegrityError      6   bytes do not have the digest that they should have
    ├── FormatError         7   a manifest, layer, TOC or image file is not what it claims to be
    │   └── LimitExceeded   7   ... or is larger than settings.Limits allows
    ├── MountError          8   the mount point is missing, busy, stale or not permitted
    ├── CacheError          8   the cache directory cannot be used as it is
    └── RestoreError        8   this machine cannot restore, or criu or the runtime said no

A class carries what it means elsewhere: `exit_code` for the command line, `errno` for a reader of the mount,
`retryable` for the fetcher. Foreign exceptions are translated into these where they enter (sources/, layers/,
engine/cache).
ENOENT is never made from an error: to CRIU it means "this image is empty".
"""

import errno as _errno
from collections.abc import Mapping
from typing import Any


class CkptfsError(Exception):
    """A failure with a one-line message for people; `hint` says what to do about it."""

    exit_code = 1
    errno = _errno.EIO
    retryable = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(CkptfsError):
    exit_code = 2
    errno = _errno.EINVAL


class NotFoundError(CkptfsError):
    exit_code = 3


class AuthError(CkptfsError):
    exit_code = 4
    errno = _errno.EACCES


class UnavailableError(CkptfsError):
    """`retry_after` is the number of seconds that the other side asked for, None when it did not.

    `permanent` is for what the same place would answer again: a certificate, a refused redirect, a broken protocol.
    """

    exit_code = 5
    retryable = True

    def __init__(
        self, message: str, *, hint: str = "", retry_after: float | None = None, permanent: bool = False
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after
        self.retryable = not permanent


def outage(message: str) -> UnavailableError:
    """What EIO out of one of our mounts means to who reads there."""
    return UnavailableError(message, hint="the registry or the network failed: try it again")


class IntegrityError(CkptfsError):
    exit_code = 6


class FormatError(CkptfsError):
    exit_code = 7


class LimitExceeded(FormatError):
    pass


class MountError(CkptfsError):
    exit_code = 8


class CacheError(CkptfsError):
    exit_code = 8


class RestoreError(CkptfsError):
    exit_code = 8


def told(error: BaseException) -> dict[str, Any]:
    """{error, hint, code}: JSON values, of which another process makes the same error again with `rebuilt`."""
    if isinstance(error, CkptfsError):
        return {"error": error.message, "hint": error.hint, "code": error.exit_code}
    return {"error": f"internal error: {error!r}", "hint": "", "code": CkptfsError.exit_code}


def rebuilt(message: Mapping[str, Any]) -> CkptfsError:
    """What `told` has said, with its exit code."""
    error = CkptfsError(message["error"], hint=message["hint"])
    error.exit_code = message["code"]
    return error


def only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error that several tasks ended with: ours before any other."""
    found = list(_leaves(group))
    for error in found:
        if isinstance(error, CkptfsError):
            return error
    return found[0]


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    out: list[BaseException] = []
    for error in group.exceptions:
        out.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return out
