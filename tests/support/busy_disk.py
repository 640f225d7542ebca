"""A mount whose cache lies on a disk that is busy with others' writes, in a process of its own.

    python -m tests.support.busy_disk BUSY mount REF DIR --foreground ...

While the file BUSY exists, whatever has to be written to the disk hangs; BUSY.hung is there once something does.
Called by tests of what a mount does meanwhile.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptfs.cli import run
from ckptfs.engine.disk import DiskOps

WRITES = ("pwritev", "ftruncate", "allocate", "utime", "unlink", "rename", "mkdir")


def _busy(call: Callable[..., Any], busy: Path) -> Callable[..., Any]:
    def busily(*arguments: Any, **options: Any) -> Any:
        while busy.exists():
            busy.with_name(f"{busy.name}.hung").touch()
            time.sleep(0.01)
        return call(*arguments, **options)

    return busily


if __name__ == "__main__":
    for name in WRITES:
        setattr(DiskOps, name, staticmethod(_busy(getattr(DiskOps, name), Path(sys.argv[1]))))
    sys.exit(run(sys.argv[2:]))
