"""A source whose reference is already being resolved, in a thread, while the rest of the program is still imported."""

import threading

from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor, Index, Manifest, Reference
from ckptfs.sources import Source


class EarlySource:
    """Starts `resolve` at once and hands out its result, or its error, to the first who asks."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._document: Manifest | Index | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._resolve, name="resolve", daemon=True)
        self._thread.start()

    @property
    def reference(self) -> Reference:
        return self._source.reference

    def resolve(self) -> Manifest | Index:
        self._thread.join()
        if self._document is None:
            raise self._error or RuntimeError("resolve ended without a document")
        return self._document

    def fetch(self, descriptor: Descriptor) -> bytes:
        return self._source.fetch(descriptor)

    def blob(self, descriptor: Descriptor) -> Blob:
        return self._source.blob(descriptor)

    def _resolve(self) -> None:
        try:
            self._document = self._source.resolve()
        except BaseException as error:
            self._error = error
