"""`criu lazy-pages`: the process that hands out memory after the container runs.

Owns its start, its end and its words. It must listen before the runtime restores, reads the same images, and ends by
itself when every page has been handed out; after a failed restore it would wait for ever. Started by flow.py.
"""

import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Self

from ckptfs.errors import RestoreError, UnavailableError
from ckptfs.restore.runtimes import criu_complaint
from ckptfs.settings import Settings

_LOG = "lazy-pages.log"


class LazyPages:
    """Runs inside of the block; what is left of it at the end is killed. `images`, `work` as for the restore."""

    def __init__(self, images: Path, work: Path, settings: Settings) -> None:
        self._images = images
        self._work = work
        self._patience = settings.timeouts.lazy_daemon
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = -1

    def __enter__(self) -> Self:
        self._ready, tell = os.pipe()
        command = ["criu", "lazy-pages", "--images-dir", str(self._images), "--work-dir", str(self._work)]
        command += ["--log-file", _LOG, "-v2", "--status-fd", str(tell)]
        null = subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                command, stdin=null, stdout=null, stderr=null, pass_fds=[tell], start_new_session=True
            )
        except OSError as error:
            os.close(self._ready)
            raise RestoreError(f"criu cannot be started: {error.strerror}") from None
        finally:
            os.close(tell)
        return self

    def listen(self) -> None:
        """Until it takes connections; to be called before the runtime restores. RestoreError when it ends instead."""
        # One zero byte comes once the socket takes connections, the end of the pipe if that will never be.
        if select.select([self._ready], [], [], self._patience)[0] and os.read(self._ready, 1) == b"\0":
            return
        said = criu_complaint(self._work / _LOG) or "it does not say why"
        raise RestoreError(f"criu lazy-pages does not start: {said}", hint="try --no-lazy-pages")

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # at its start criu has children that try out the kernel
            self._process.wait()
        os.close(self._ready)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def require(self) -> None:
        """After its end: UnavailableError unless it has handed out every page."""
        assert self._process is not None
        if self._process.wait() != 0:
            said = criu_complaint(self._work / _LOG) or f"exit code {self._process.returncode}"
            raise UnavailableError(
                f"pages of the container's memory could not be read: {said}",
                hint="the registry or the network failed; --keep leaves the logs, --read-deadline hard waits for ever",
            )
