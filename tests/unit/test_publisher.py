"""Uploads that are interrupted."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ckptfs.push import Progress
from ckptfs.push.layout_target import LayoutTarget
from ckptfs.push.publisher import Publisher
from tests.support.blobs import BytesBlob, blob_of

DATA = bytes(200_000)


@dataclass
class Slow(BytesBlob):
    """Its second piece comes a tenth of a second after the first one has been asked for."""

    begun: threading.Event = field(default_factory=threading.Event)

    def stream(self, offset: int, length: int, **options: object) -> Iterator[bytes | memoryview]:
        self.begun.set()
        yield self.data[:1000]
        time.sleep(0.1)
        yield self.data[1000:]


def test_an_interrupted_push_leaves_no_half_of_a_blob_in_a_layout(tmp_path: Path) -> None:
    """The process ends without its threads: what they have begun would stay."""
    blob = Slow(DATA, blob_of(DATA).descriptor)
    with pytest.raises(KeyboardInterrupt), Publisher(LayoutTarget(tmp_path), Progress()) as publisher:
        publisher.add(blob.descriptor, blob)
        assert blob.begun.wait(10)
        raise KeyboardInterrupt
    assert list((tmp_path / "blobs/sha256").iterdir()) == []
