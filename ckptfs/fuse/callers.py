"""Who opens a file: CRIU's lazy-pages daemon, for which pages are better read without the kernel's page cache.

The daemon reads every page once, some of them because a process waits for them right now. With the page cache the
kernel would read up to 4 MiB ahead of each piece, and a fault would wait for all that. Nothing but speed depends on the
answer: whoever pretends to be the daemon gets no more than direct I/O. Called by operations.py.
"""

import trio

_ARGUMENT = b"lazy-pages"
_PATIENCE = 0.05  # seconds; 0.1 ms is usual
_MOST = 4096  # bytes of a command line that are looked at

# Reading a command line reads the memory of that process, which may be mapped from a file system that does not answer,
# this one included: never in the event loop, never by more than a few threads, and after a while without an answer.
_threads = trio.CapacityLimiter(4)


async def is_lazy_pages_daemon(pid: int) -> bool:
    """Whether `pid` was started as `criu lazy-pages`. False where that cannot be seen (0: in another namespace)."""
    if not pid or not _threads.available_tokens:
        return False
    with trio.move_on_after(_PATIENCE):
        return await trio.to_thread.run_sync(_has_argument, pid, abandon_on_cancel=True, limiter=_threads)
    return False


def _has_argument(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            return _ARGUMENT in file.read(_MOST).split(b"\0")
    except OSError:
        return False
