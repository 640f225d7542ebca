"""Row L10, shortened: readers, evictions and resets for seconds; scripts/soak does it for minutes and hours."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.soak.load import MIB, Load, run_load
from tests.support.chunked import PAGES, add_chunked
from tests.support.command import mounted
from tests.support.fake_registry import FakeRegistry
from tests.support.readers import content
from tests.support.tools import require

pytestmark = pytest.mark.fuse

Figure = Callable[[str, object], None]
SMALL = ("--memory", "8M", "--cache-size", "16M")  # of a file of 32 MB: chunks are evicted all the time


@pytest.mark.row("L10")
def test_nothing_grows_under_load(tmp_path: Path, record_property: Figure) -> None:
    require("fusermount3")
    with FakeRegistry() as registry:
        add_chunked(registry, {b"config.dump": b"{}", PAGES: content(32 * MIB)}, 64 * 1024)
        with mounted(registry.reference("repo:latest"), tmp_path, *SMALL) as mount:
            load = Load(processes=2, threads=16, seconds=16, reset_every=2)
            outcome = run_load(registry, [mount.path / PAGES.decode()], [mount.pid], load)
            assert mount.status()["errors"] == []
    record_property("figure", f"{load.seconds:.0f} s: {outcome}")
    assert outcome.wrong == 0
    assert not outcome.errors
    assert outcome.resets >= 5
    assert outcome.growth() < 16 * MIB
    assert outcome.more_descriptors() <= 16
