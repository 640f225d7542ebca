"""Blobs first, in parallel and only what is lacking; the manifest last. Never a tag that shows half an image.

An interrupted push leaves blobs without a manifest, which the next push finds and does not send again. Owns the upload
threads and what is told about progress; knows neither registries nor checkpoints.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from ckptfs.errors import UnavailableError
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor, Digest
from ckptfs.push.target import Target

_UPLOADS = 4  # one at a time leaves a link with delay idle between two blobs; a registry allows a few
_ENDING = 0.5  # seconds that an interrupt leaves to them: to a disk they end with their next piece, and tidy up


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes. `read` of `total` of the checkpoint are packed; `sent` of `to_send`, `present` were there already.

    Before that, `compared` of `to_compare` bytes of memory with a parent's.
    """

    read: int = 0
    total: int = 0
    sent: int = 0
    to_send: int = 0
    present: int = 0
    compared: int = 0
    to_compare: int = 0


class Publisher:
    """A context manager: leaving it with an error stops the uploads and publishes nothing."""

    def __init__(self, target: Target, begun: Progress, report: Callable[[Progress], None] | None = None) -> None:
        """`begun`: what is known so far. `report` is called often, from several threads, one at a time."""
        self._target = target
        self._report = report or (lambda _: None)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_UPLOADS, "upload")
        self._uploads: list[Future[None]] = []
        self._seen: set[Digest] = set()
        self._stopped = False
        self.progress = begun

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = error is not None
        # A registry may take minutes to answer an upload that nobody wants any more.
        self._pool.shutdown(wait=kind is not KeyboardInterrupt, cancel_futures=self._stopped)
        if kind is KeyboardInterrupt:
            wait([upload for upload in self._uploads if not upload.cancelled()], _ENDING)

    def packed(self, count: int) -> None:
        """`count` more bytes of the checkpoint have been read and compressed."""
        self._tell(read=count)

    def add(
        self, descriptor: Descriptor, blob: Blob, *, origin: str = "", done: Callable[[], None] | None = None
    ) -> None:
        """Have a blob there when `publish` is called; `done` is called when it has been dealt with, for good or ill.

        origin: a repository of the same registry that has it.
        """
        self._raise_failed()
        if descriptor.digest in self._seen:
            if done is not None:
                done()
            return
        self._seen.add(descriptor.digest)
        self._uploads.append(self._pool.submit(self._upload, descriptor, blob, origin, done))

    def publish(self, raw: bytes, media_type: str, tag: str) -> Digest:
        """Wait for the blobs, then put the manifest. Raises what kept a blob away."""
        for upload in self._uploads:
            upload.result()
        return self._target.put_manifest(raw, media_type, tag)

    def _raise_failed(self) -> None:
        for upload in self._uploads:
            if upload.done():
                upload.result()

    def _upload(self, descriptor: Descriptor, blob: Blob, origin: str, done: Callable[[], None] | None) -> None:
        try:
            if self._target.has(descriptor) or (origin and self._target.mount(descriptor, origin)):
                self._tell(present=descriptor.size)
                return
            self._tell(to_send=descriptor.size)
            self._target.put_blob(descriptor, blob, self._sent)
        finally:
            if done is not None:
                with suppress(OSError):
                    done()

    def _sent(self, count: int) -> None:
        if self._stopped:
            raise UnavailableError("the push was stopped", permanent=True)
        self._tell(sent=count)

    def _tell(self, *, read: int = 0, sent: int = 0, to_send: int = 0, present: int = 0) -> None:
        with self._lock:
            now = self.progress
            self.progress = replace(
                now,
                read=now.read + read,
                sent=now.sent + sent,
                to_send=now.to_send + to_send,
                present=now.present + present,
            )
            self._report(self.progress)
