"""Signals that become KeyboardInterrupt in the main thread, but not while it imports or starts a program.

Python raises it wherever the main thread is. Inside importlib that does harm: a weak reference's callback swallows what
is raised, or a lock stays taken, and a thread that imports the same module waits for ever. Inside subprocess.Popen the
program is there already, and nobody gets to know of it: it would stay. And one that arrives right
before a blocking system call is noticed after it. Of 480 restores that got Ctrl-C while they began, on two busy cores,
16 went on as if nothing had been said. Called by __main__.py, cli/, daemon/, bench/ and restore/.
"""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

_LOOK = 100  # milliseconds that a signal can be late where we wait
_AGAIN = 0.005  # seconds until a signal that came at the wrong moment is looked at again; modules take 1 to 100 ms
_MOST = 400  # times that it is: a disk that hangs must not keep us alive
_WHOLE = {"Popen.__init__", "whole.<locals>.uninterrupted"}  # of these all is done, or nothing

P = ParamSpec("P")
T = TypeVar("T")


def interrupt_by(*numbers: int, once: bool = False) -> Mapping[int, Any]:
    """From now on these signals raise KeyboardInterrupt; returns the handlers they had, for `signal.signal`.

    `once`: those that follow the first are ignored. Uses SIGALRM as well.
    """
    waited = 0

    def handler(_: int, frame: FrameType | None) -> None:
        nonlocal waited
        if waited < _MOST and _must_not_break(frame):
            waited += 1
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
            return
        waited = 0
        if once:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    return {number: signal.signal(number, handler) for number in heard(*numbers, signal.SIGALRM)}


def as_before(handlers: Mapping[int, Any]) -> None:
    """Undo `interrupt_by`, which has returned `handlers`. A signal that would be looked at again is forgotten."""
    signal.setitimer(signal.ITIMER_REAL, 0)  # SIGALRM would end us
    for number, handler in handlers.items():
        signal.signal(number, handler)


def heard(*numbers: int) -> tuple[int, ...]:
    """Those of the signals that may end us: nohup(1) has SIGHUP ignored by what it starts."""
    return tuple(n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN)


@contextlib.contextmanager
def interruptible(*numbers: int) -> Iterator[None]:
    """The first of these signals is a KeyboardInterrupt; those that follow do not disturb what cleans up."""
    before = interrupt_by(*numbers, once=True)
    try:
        yield
    finally:
        as_before(before)


@contextlib.contextmanager
def taken_for_ctrl_c(*numbers: int) -> Iterator[None]:
    """Inside, these signals do what Ctrl-C does: whatever cleans up after that one does so after them.

    For commands that run trio, which has a handler of its own for Ctrl-C and is not to be left by another exception.
    Those that are ignored stay so (nohup), and all are as ever where Ctrl-C is (a job in the background of a script).
    """

    def hand_on(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    ours = () if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else numbers
    before = {number: signal.getsignal(number) for number in ours}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in caught:
        signal.signal(number, hand_on)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])


def lines(pipe: int, child: int | None = None) -> Iterator[bytes]:
    """The lines that somebody writes to `pipe`, as they come, without their ends; it stays open.

    Until nobody can write any more. `child`: or until this one has ended, whose own children may have the pipe.
    """
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    rest = b""
    while True:
        while not poll.poll(_LOOK):
            if child is not None and os.waitid(os.P_PID, child, ended) is not None and not poll.poll(0):
                return
        data = os.read(pipe, 1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from whole


def whole(function: Callable[P, T]) -> Callable[P, T]:
    """What is made in there is known to nobody before it returns: a signal is heard afterwards."""

    @wraps(function)
    def uninterrupted(*arguments: P.args, **options: P.kwargs) -> T:
        return function(*arguments, **options)

    return uninterrupted


def _must_not_break(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_qualname in _WHOLE:
            return True
        frame = frame.f_back
    return False
