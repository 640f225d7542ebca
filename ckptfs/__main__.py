"""`ckptfs` and `python -m ckptfs`: errors become one line and an exit code here. And checkpointctl's plugin.

checkpointctl runs `checkpointctl-NAME` for `checkpointctl NAME`, and asks each one that it finds for a description at
every start: half a second is all it waits, so nothing is imported for that.
"""

import codecs
import contextlib
import io
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

_NO_DAEMON = {"-h", "--help", "-f", "--foreground", "--eager"}  # commands with these start none
_DESCRIBED = 42  # the exit code by which checkpointctl knows that a plugin understood the question (cmd/plugin.go)
_ESCAPED = "ckptfs.escaped"  # how what cannot be printed is


def main() -> None:
    _run()


def _run(*program: str) -> NoReturn:
    _open_closed_streams()
    _print_names_as_they_are()
    begins_daemon = sys.argv[1:2] in (["mount"], ["restore"]) and _NO_DAEMON.isdisjoint(sys.argv)
    before: Mapping[int, Any] = {}
    try:
        if begins_daemon:
            from ckptfs import interrupts
            from ckptfs.daemon import standby

            standby.fork(sys.argv)
            before = interrupts.interrupt_by(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        from ckptfs.cli import run

        code = run(sys.argv[1:], *program)
    except KeyboardInterrupt:  # within the first tenth of a second, or twice; while a mount is on its way
        print("ckptfs: interrupted", file=sys.stderr)
        code = 130
    if before:
        interrupts.as_before(before)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on Python would print a traceback for it
    if code or (begins_daemon and sys.argv[1] == "mount"):
        # Nobody who was told that it failed waits for threads that wait for a registry, as Python would; and who waits
        # for a mount need not wait until this process has been taken apart (2.5 ms)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _open_closed_streams() -> None:
    """`ckptfs ... >&-`: no file that is opened may get the number of a stream, for what is printed would go there.

    Python has None for closed streams. Writing to our standard output fails then, as it would have; stderr is silent.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free: this one
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


def _print_names_as_they_are() -> None:
    """Names of files need not be UTF-8: what os.fsdecode has made of them is printed as the bytes that they are.

    What a locale has no character for (a name out of a document, µs) is an escape; one that has no more than ASCII says
    nothing of who reads.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error(_ESCAPED, _escaped)
        only_ascii = codecs.lookup(sys.stdout.encoding).name == "ascii"
        sys.stdout.reconfigure(encoding="utf-8" if only_ascii else None, errors=_ESCAPED)


def _escaped(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return b"".join(
        bytes([ord(letter) - 0xDC00]) if 0xDC80 <= ord(letter) <= 0xDCFF else letter.encode("ascii", "backslashreplace")
        for letter in letters
    ), error.end


def checkpointctl_plugin() -> None:
    """`checkpointctl ckptfs inspect REF` is `ckptfs inspect REF`, and so is every other command."""
    if sys.argv[1:] == ["--plugin-description"]:
        print("Look into checkpoint images in a registry, mount and restore them, without pulling them")
        sys.exit(_DESCRIBED)
    _run("checkpointctl ckptfs")


if __name__ == "__main__":
    main()
