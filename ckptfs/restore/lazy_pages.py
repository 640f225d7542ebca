"""`criu lazy-pages`: the process that hands out memory after the container runs.

Owns its start, its end and its words. It must listen before the runtime restores, reads the same images, and ends by
itself when every page has been handed out; after a failed restore it would wait for ever. Called by flow.py.
"""

import contextlib
import os
import select
import subprocess
from pathlib import Path
from typing import Self

from ckptfs.errors import RestoreError, UnavailableError
from ckptfs.restore.runtimes import criu_complaint
from ckptfs.settings import Settings

_LOG = "lazy-pages.log"


class LazyPages:
    """Listens inside of the block; what is left of it at the end is killed. `images`, `work` as for the restore."""

    def __init__(self, images: Path, work: Path, settings: Settings) -> None:
        self._images = images
        self._work = work
        self._patience = settings.timeouts.lazy_daemon
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        ready, tell = os.pipe()
        command = ["criu", "lazy-pages", "--images-dir", str(self._images), "--work-dir", str(self._work)]
        command += ["--log-file", _LOG, "-v2", "--status-fd", str(tell)]
        null = subprocess.DEVNULL
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, ready)
            try:
                self._process = subprocess.Popen(
                    command, stdin=null, stdout=null, stderr=null, pass_fds=[tell], start_new_session=True
                )
            finally:
                os.close(tell)
            # One zero byte comes once the socket takes connections, the end of the pipe if that will never be.
            listens = select.select([ready], [], [], self._patience)[0] and os.read(ready, 1) == b"\0"
        if not listens:
            self.__exit__()
            said = criu_complaint(self._work / _LOG) or "it does not say why"
            raise RestoreError(f"criu lazy-pages does not start: {said}", hint="try --no-lazy-pages")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def require(self) -> None:
        """After its end: UnavailableError unless it has handed out every page."""
        assert self._process is not None
        if self._process.wait() != 0:
            said = criu_complaint(self._work / _LOG) or f"exit code {self._process.returncode}"
            raise UnavailableError(
                f"pages of the container's memory could not be read: {said}",
                hint="the registry or the network failed; --keep leaves the logs, --read-deadline hard waits for ever",
            )
