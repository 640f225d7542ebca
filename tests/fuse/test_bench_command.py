"""`ckptfs bench` on a real image: lazily through FUSE, eagerly with skopeo, over a link that is slow for real."""

import json
from pathlib import Path

import pytest

from ckptfs.bench.results import Sample, Series, Stamp, read_results
from tests.support.command import ckptfs
from tests.support.tools import require

pytestmark = [pytest.mark.fuse, pytest.mark.registry]

LAYOUT = Path(__file__).parents[1] / "data/corpus/tree/k8s-zstdchunked.oci"


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("skopeo", "tar")


def test_lazy_and_eager_are_compared(tmp_path: Path) -> None:
    done = ckptfs("bench", f"oci:{LAYOUT}", "--out", tmp_path / "out", "--runs", 2, "--rtt", "5ms", "--json")
    assert done.code == 0, done.err
    assert "<svg" in Path(done.json["report"]).read_text()
    facts = list(read_results([Path(done.json["results"])]))
    assert isinstance(facts[0], Stamp)
    flows = {"ckptfs, lazy pages", "ckptfs, plain restore", "ckptfs pull", "skopeo, tar"}
    samples = [fact for fact in facts if isinstance(fact, Sample)]
    assert {fact.flow for fact in facts if isinstance(fact, Series)} == flows
    assert sorted(sample.flow for sample in samples) == sorted([*flows, *flows])
    for sample in samples:
        assert 0.005 < sample.values["ready"] <= sample.values["start"] <= sample.values["all"]
        assert 0 < sample.values["bytes_at_start"] <= sample.values["bytes"]
    assert len(done.json["figures"]) == 6
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".html", ".jsonl"]
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_a_recorded_trace_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({"path": "checkpoint/inventory.img", "offset": 0, "length": 20}) + "\n")
    done = ckptfs("bench", f"oci:{LAYOUT}", "--out", tmp_path / "out", "--runs", 1, "--rate", "1Gbit", "--trace", trace)
    assert done.code == 0, done.err
    assert "ckptfs: until the process could run" in done.out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("oci:{tmp}/nowhere",), 3, "there is no directory"),
        (("archive:{tmp}/x.tar",), 2, "push it to a registry"),
        (("oci:{tmp}", "--rtt", "soon"), 2, "is not a time"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    words: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    done = ckptfs("bench", *(word.format(tmp=tmp_path) for word in words), "--out", tmp_path / "out")
    assert done.code == code
    assert said in done.err
