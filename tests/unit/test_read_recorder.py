"""A recording of reads whose file cannot be written any more."""

import time
from pathlib import Path

import pytest
import trio

from ckptfs.engine import recording
from ckptfs.engine.reader import Handle
from ckptfs.engine.recording import ReadRecorder
from ckptfs.model.names import InodeNames
from ckptfs.model.toc import Inode
from ckptfs.model.tree import Tree


def test_reads_that_cannot_be_recorded_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or a mount of weeks would end for want of memory because a disk was full for a moment."""
    monkeypatch.setattr(recording, "_INTERVAL", 0.01)
    recorder = ReadRecorder(Path("/dev/full"), InodeNames(Tree()), time.monotonic())
    handle = Handle(Inode(0o100644, size=100), b"file")

    async def main() -> None:
        with trio.fail_after(5):
            recorder(handle, 0, 10, None)
            await recorder.run()

    trio.run(main)
    assert "reads are not recorded any more: No space left on device" in caplog.text
    for _ in range(10):
        recorder(handle, 0, 10, None)
    assert len(recorder._facts) == 0
