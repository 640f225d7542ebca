"""What a process that holds other people's memory does to keep it to itself, and to stay alive.

Owns the settings of our own process (core dumps, ptrace, the OOM killer) and of the interpreter of a long-lived one.
What restored processes would inherit is only for daemons, which start none.
"""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Collection

_PR_SET_DUMPABLE = 4  # prctl(2)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
_OOM_SCORE = -800  # among the last to be killed: the restored processes hang on us; -1000 would be never

_SWITCH = sys.getswitchinterval()


def harden() -> None:
    """No core dump, no ptrace by our own user; the OOM killer takes others first.

    Not dumpable means that /proc/PID belongs to root, so the OOM score comes first. We still see our own /proc/self
    (the kernel lets a thread group look at itself). Nothing of it is needed: what is not allowed is left out.
    """
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
        if int(file.read()) > _OOM_SCORE:
            file.seek(0)
            file.write(str(_OOM_SCORE))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keep_memory_private()


def keep_memory_private() -> None:
    """No core dump of this process and no ptrace; programs that it starts are as they would be."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def reuse_memory() -> None:
    """Two heaps for all threads, and what was freed is used again before the kernel gets it back.

    glibc's eight for each core hold 50 MB more after a restore, and are not faster here. And it would give back every
    megabyte that was put together for a read: that the next one is made of new pages cost 0.07 s for each GB.
    `release_memory` is for when nobody reads. Call before threads are started.
    """
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # its most; larger blocks are mapped, and given back, one by one
        mallopt(_M_TRIM_THRESHOLD, 8 << 20)  # of each heap: the end of the second one is never given back otherwise


def settle() -> None:
    """Start-up is over: what lives now lives as long as the mount, so it is never looked at again.

    Until here the collector should be off (`gc.disable`): it would walk every entry of a table of contents that is
    being read, again and again, and that costs a quarter of the time for large ones.
    """
    gc.freeze()
    gc.enable()
    sys.setswitchinterval(_SWITCH)  # daemon/standby.py makes it shorter for as long


def release_memory() -> None:
    """Hand freed memory back to the kernel: glibc keeps what lies between living blocks, 100 MB after a restore."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # musl has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def close_inherited(keep: Collection[int | None]) -> None:
    """Let go of the descriptors that our command was started with, except `keep`.

    A script's lock would be held, and who reads its pipe to the end would wait, for as long as the daemon lives.
    """
    for number in {int(name) for name in os.listdir("/proc/self/fd")}.difference(keep):
        with contextlib.suppress(OSError):  # the one that listdir had
            if os.get_inheritable(number):  # none that Python has opened is
                os.close(number)
