"""What every file system here does with errors: the one place where they become errno.

pyfuse3 ends the whole mount on any exception but FUSEError, so every handler goes through `answers`, which turns a
CkptfsError into its errno and a bug into one EIO with a traceback in the log. Used by operations.py and
store_operations.py.
"""

import errno
import functools
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast

import pyfuse3

from ckptfs.errors import CkptfsError, told

log = logging.getLogger(__name__)

_QUIET = 60.0  # seconds between two tracebacks of the same place in the log
_BURST = 20  # failures of readers that are told within that time, of different files
_KEPT = 100  # errors that the status can show

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Answering")
Handler: TypeAlias = Callable[Concatenate[S, P], Coroutine[Any, Any, R]]


def answers(handler: Handler[S, P, R]) -> Handler[S, P, R]:
    """No exception but FUSEError leaves a handler."""

    @functools.wraps(handler)
    async def answer(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except CkptfsError as error:
            self.report(handler.__name__, args, error)
            raise pyfuse3.FUSEError(error.errno) from None
        except Exception as error:
            self.bug(handler.__name__, error)
            raise pyfuse3.FUSEError(errno.EIO) from None
        except BaseExceptionGroup as group:  # trio's nurseries wrap bugs; a cancellation goes on
            bugs = group.subgroup(Exception)
            if bugs is None:
                raise
            self.bug(handler.__name__, bugs)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return cast("Handler[S, P, R]", answer)


class Answering(pyfuse3.Operations, ABC):
    """Read-only operations, whose failures are told once in the log and in `errors`; and what a session needs.

    failures  the same as JSON values for who has been kept from reading: what `told` says, the operation, the errno.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, errors: list[str]) -> None:
        super().__init__()
        self.errors = errors
        self.failures: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._last: dict[str, float] = {}
        self._reported: deque[float] = deque(maxlen=_BURST)

    @abstractmethod
    def first_file(self) -> bytes:
        """The path of a file that is known already, for good; b"" without one: other names could wait for a stream."""

    @abstractmethod
    def quiesce(self) -> None:
        """The mount is about to end: nothing new is fetched unless somebody waits for it."""

    @abstractmethod
    async def drained(self) -> None:
        """Until nobody waits for bytes."""

    def subject(self, operation: str, arguments: Sequence[Any]) -> tuple[str, str]:
        """What a request is about, for people: the file, and the place in it; "" where that says nothing."""
        return "", ""

    def report(self, operation: str, arguments: Sequence[Any], error: CkptfsError) -> None:
        """A failure that the reader sees as errno: once for each file in the log and in the status, and not a flood."""
        file, place = self.subject(operation, arguments)
        flood = len(self._reported) == _BURST and time.monotonic() - self._reported[0] < _QUIET
        if not flood and self._due(f"{operation} {file} {error.exit_code}"):
            self._reported.append(time.monotonic())
            where = f"{operation} {file}{place}" if file else operation
            log.error("%s: %s", where, error)
            self.errors.append(f"{where}: {error}")
            del self.errors[:-_KEPT]
            self._failed(operation, error, f"{where}: {error.message}", error.errno)

    def bug(self, operation: str, error: BaseException) -> None:
        """Ours: the reader gets EIO, the log gets the traceback, the mount lives."""
        if self._due(operation + type(error).__name__):
            log.error("%s failed unexpectedly; the request got EIO", operation, exc_info=error)
            text = f"internal error in {operation}: {type(error).__name__}"
            self.errors.append(text)
            self._failed(operation, error, text, errno.EIO)

    def _failed(self, operation: str, error: BaseException, text: str, number: int) -> None:
        self.failures.append({**told(error), "error": text, "operation": operation, "errno": number})

    def _due(self, what: str) -> bool:
        now = time.monotonic()
        if now - self._last.get(what, -_QUIET) < _QUIET:
            return False
        self._last[what] = now
        return True
