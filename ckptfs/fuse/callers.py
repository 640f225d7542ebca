"""Who opens a file: CRIU while it restores, for which pages are better read without the kernel's page cache.

It reads every page once. With lazy pages some of them because a process waits for them right now: with the page cache
the kernel would read up to 4 MiB ahead of each piece, and a fault would wait for all that. Without lazy pages it reads
from front to back straight into the memory of the process: in the page cache all of it would be once more, beside the
node's own cache (4 GB: 3.1 s of CPU for each instead of 5.8, on a virtual machine that gets its memory page by page).
Nothing but speed depends on the answer: whoever pretends to be CRIU gets no more than direct I/O. Called by
operations.py.
"""

from enum import Enum

import trio

_LAZILY = {b"lazy-pages", b"--lazy-pages"}  # `criu lazy-pages`, `criu restore --lazy-pages`
_RESTORING = {b"restore", b"swrk"}  # `criu restore`; `criu swrk 3` is what runtimes start
_PATIENCE = 0.5  # seconds; 0.1 ms is usual
_MOST = 4096  # bytes of a command line that are looked at

# Reading a command line reads the memory of that process, which may be mapped from a file system that does not answer,
# this one included: never in the event loop, never by more than a few threads, and after a while without an answer.
_threads = trio.CapacityLimiter(4)


class Access(Enum):
    """What a process wants of a file: to read it as any other, each page once, or pages as they are needed."""

    CACHED = "cached"
    ONCE = "once"
    LAZILY = "lazily"


async def access_of(pid: int) -> Access:
    """By the command line of `pid`. CACHED where that cannot be seen (pid 0)."""
    if not pid or not _threads.available_tokens:
        return Access.CACHED
    with trio.move_on_after(_PATIENCE):
        return await trio.to_thread.run_sync(_by_command_line, pid, abandon_on_cancel=True, limiter=_threads)
    return Access.CACHED


def _by_command_line(pid: int) -> Access:
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            words = file.read(_MOST).split(b"\0")
    except OSError:
        return Access.CACHED
    if not _LAZILY.isdisjoint(words):
        return Access.LAZILY
    criu = any(word.rpartition(b"/")[2] == b"criu" for word in words)  # not the first word where a wrapper starts it
    return Access.ONCE if criu and not _RESTORING.isdisjoint(words) else Access.CACHED
