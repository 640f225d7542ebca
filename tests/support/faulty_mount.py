"""A mount whose handlers have bugs on command, in a process of its own.

    python -m tests.support.faulty_mount ARMED mount REF DIR --foreground ...

While the file ARMED holds "HANDLER EXCEPTION", that handler raises that exception in place of doing its work. The
decorator around the handlers is the product's own. Called by the test of row L1.
"""

import functools
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ckptfs.cli import run
from ckptfs.fuse.answers import answers
from ckptfs.fuse.operations import Operations

BUGS: dict[str, Callable[[], BaseException]] = {
    "RuntimeError": lambda: RuntimeError("a bug"),
    "MemoryError": MemoryError,
    "RecursionError": lambda: RecursionError("too deep"),
    "KeyError": lambda: KeyError(7),
    "ExceptionGroup": lambda: ExceptionGroup("two", [ValueError("one"), ExceptionGroup("more", [OSError("two")])]),
}

Handler = Callable[..., Awaitable[Any]]


def handlers() -> dict[str, Handler]:
    """Every handler by name, without the decorator."""
    return {name: member.__wrapped__ for name, member in vars(Operations).items() if hasattr(member, "__wrapped__")}


def _read(armed: Path) -> str:
    return armed.read_text()


def _arm(name: str, handler: Handler, armed: Path) -> Handler:
    @functools.wraps(handler)
    async def faulty(*args: Any, **options: Any) -> Any:
        wanted, _, bug = _read(armed).partition(" ")
        if wanted == name:
            raise BUGS[bug]()
        return await handler(*args, **options)

    return faulty


if __name__ == "__main__":
    for name, handler in handlers().items():
        setattr(Operations, name, answers(_arm(name, handler, Path(sys.argv[1]))))
    sys.exit(run(sys.argv[2:]))
