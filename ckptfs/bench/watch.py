"""A run as it happens: bytes that have come over the link, bytes that the mount has handed out, 20 times a second.

Owns a thread that asks the link and the mount. The mount works a little for every answer, so runs that are watched are
not the ones that are timed.
"""

import threading
import time
from pathlib import Path
from typing import Self

from ckptfs.bench.link import ShapedLink
from ckptfs.control.client import MountFiles, ask
from ckptfs.errors import CkptfsError

_STEP = 0.05  # seconds


class Watcher:
    """`points` are (seconds since the block began, bytes fetched, bytes read), until it ends.

    mountpoint  None where nothing is mounted: no bytes are read then.
    """

    columns = ("seconds", "fetched", "read")

    def __init__(self, link: ShapedLink, mountpoint: Path | None = None) -> None:
        self._link = link
        self._files = MountFiles.of(str(mountpoint)) if mountpoint is not None else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._began = 0.0
        self._points: list[tuple[float, float, float]] = []

    @property
    def points(self) -> tuple[tuple[float, float, float], ...]:
        return tuple(self._points)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._over.wait(_STEP)
            fetched = self._link.stats().bytes_down
            self._points.append((time.monotonic() - self._began, float(fetched), self._read()))

    def _read(self) -> float:
        if self._files is None:
            return 0.0
        try:
            return float(ask(self._files, "status")["reads"]["bytes"])
        except CkptfsError:  # not mounted yet, or not any more
            return self._points[-1][2] if self._points else 0.0
