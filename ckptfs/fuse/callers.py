"""Who opens a file: CRIU restoring with lazy pages, for which pages are better read without the kernel's page cache.

The lazy-pages daemon reads every page once, some of them because a process waits for them right now. With the page
cache the kernel would read up to 4 MiB ahead of each piece, and a fault would wait for all that. The restore beside it
reads a few pages only. Nothing but speed depends on the answer: whoever pretends to be CRIU gets no more than direct
I/O. Called by operations.py.
"""

import trio

_ARGUMENTS = {b"lazy-pages", b"--lazy-pages"}  # `criu lazy-pages`, `criu restore --lazy-pages`
_PATIENCE = 0.5  # seconds; 0.1 ms is usual
_MOST = 4096  # bytes of a command line that are looked at

# Reading a command line reads the memory of that process, which may be mapped from a file system that does not answer,
# this one included: never in the event loop, never by more than a few threads, and after a while without an answer.
_threads = trio.CapacityLimiter(4)


async def pages_lazily(pid: int) -> bool:
    """Whether `pid` was started with lazy pages on its command line. False where that cannot be seen (pid 0)."""
    if not pid or not _threads.available_tokens:
        return False
    with trio.move_on_after(_PATIENCE):
        return await trio.to_thread.run_sync(_has_argument, pid, abandon_on_cancel=True, limiter=_threads)
    return False


def _has_argument(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            return not _ARGUMENTS.isdisjoint(file.read(_MOST).split(b"\0"))
    except OSError:
        return False
