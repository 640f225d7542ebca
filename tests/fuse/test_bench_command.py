"""`ckptfs bench` on a real image: lazily through FUSE, eagerly with skopeo, over a link that is slow for real."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckptfs.bench.results import Sample, Series, Stamp, read_results
from tests.support.command import ckptfs
from tests.support.disks import disk_of
from tests.support.each import each
from tests.support.fake_registry import FakeRegistry
from tests.support.tools import require, wait_for

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
    done = ckptfs("bench", f"oci:{LAYOUT}", "--out", tmp_path / "out", "--runs", 1, "--rate", 0, "--trace", trace)
    assert done.code == 0, done.err
    assert "ckptfs: until the process could run; 20 ms, no cap" in done.out


def test_results_may_lie_behind_a_link(tmp_path: Path) -> None:
    """A mount and its daemon are known by the real path."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    layout = tmp_path / os.fsdecode(b"\xff")  # nor need names be UTF-8
    layout.symlink_to(LAYOUT)
    done = ckptfs("bench", f"oci:{layout}", "--out", tmp_path / "link/out", "--runs", 1, "--rtt", "1ms", "--rate", 0)
    assert done.code == 0 and f"report: {tmp_path}/link/out/" in done.out, done.err


def test_a_policy_for_images_does_not_matter(tmp_path: Path) -> None:
    """policy.json of hosts that run signed images only: skopeo refused, and all that was measured was lost."""
    policy = tmp_path / ".config/containers/policy.json"
    policy.parent.mkdir(parents=True)
    policy.write_text('{"default": [{"type": "reject"}]}')
    words = ("bench", f"oci:{LAYOUT}", "--out", tmp_path / "out", "--runs", 1, "--rtt", "1ms", "--rate", 0)
    done = ckptfs(*words, env={"HOME": str(tmp_path)})
    assert done.code == 0 and "skopeo, tar: until" in done.out, done.err


def test_a_way_that_fails_leaves_what_the_others_have_measured(tmp_path: Path) -> None:
    skopeo = tmp_path / "bin/skopeo"
    skopeo.parent.mkdir()
    skopeo.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    skopeo.chmod(0o755)
    words = ("bench", f"oci:{LAYOUT}", "--out", tmp_path / "out", "--runs", 1, "--rtt", "1ms", "--rate", 0, "--json")
    done = ckptfs(*words, env={"PATH": f"{skopeo.parent}:{os.environ['PATH']}"})
    assert done.code == 5, done.err
    said = "skopeo, tar; 1 ms, no cap: skopeo failed: no such luck"
    assert f"not measured: {said}\n" in done.err
    assert [absent["why"] for absent in done.json["absent"]] == [said]
    assert any("ckptfs pull: until" in figure["name"] for figure in done.json["figures"])
    assert said in Path(done.json["report"]).read_text()


def test_a_metrics_port_that_a_mount_has_is_left_to_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        setting = {"CKPTFS_METRICS": f"127.0.0.1:{taken.getsockname()[1]}"}
        words = ("bench", f"oci:{LAYOUT}", "--out", tmp_path / "out", "--runs", 1, "--rtt", "1ms", "--rate", 0)
        done = ckptfs(*words, env=setting)
    assert done.code == 0, done.err


@each(
    "words, code, said",
    [
        (("oci:{tmp}/nowhere",), 3, "there is no directory"),
        (("archive:{tmp}/x.tar",), 2, "push it to a registry"),
        (("oci:{tmp}", "--rtt", "soon"), 2, "is not a time"),
        (("oci:{tmp}", "--rtt", "1.2.3ms"), 2, "is not a time"),
        (("oci:{tmp}", "--rate", "."), 2, "is not a rate"),
        ((f"oci:{LAYOUT}", "--trace", "{tmp}/bytes"), 7, "line 1 is no access"),
        ((f"oci:{LAYOUT}", "--trace", "{tmp}/empty"), 3, "has no reads"),
        ((f"oci:{LAYOUT}", "--trace", "{tmp}/other"), 3, "the image has no nowhere; was the trace"),
        ((f"oci:{LAYOUT}:nope",), 3, "nope"),
        (("127.0.0.1:1/nobody/here:1",), 5, "127.0.0.1:1"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    words: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\n")
    (tmp_path / "empty").touch()
    (tmp_path / "other").write_text(json.dumps({"path": "nowhere", "offset": 0, "length": 1}) + "\n")
    done = ckptfs("bench", *(word.format(tmp=tmp_path) for word in words), "--out", tmp_path / "out")
    assert done.code == code
    assert said in done.line
    assert list(tmp_path.glob("out/*")) == []


def test_an_image_that_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    """What a mount has EIO for is the image's, not what the command prints."""
    with FakeRegistry() as registry:
        registry.add_layout(LAYOUT, "repo")
        layer = max(registry.blobs, key=lambda digest: len(registry.blobs[digest]))
        damaged = bytearray(registry.blobs[layer])
        damaged[len(damaged) // 2] ^= 1
        registry.blobs[layer] = bytes(damaged)
        done = ckptfs("bench", registry.reference("repo:latest"), "--out", tmp_path / "out", "--runs", 1)
    assert done.code == 5 and "cannot be read: Input/output error; is the registry there?" in done.line
    assert list(tmp_path.glob("out/*")) == []


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    """What a command that bench runs has logged before its error is not part of ours."""
    with disk_of(tmp_path / "out", "size=1200k") as out:
        done = ckptfs("bench", f"oci:{LAYOUT}", "--out", out, "--runs", 1, "--rtt", "1ms", "--rate", 0)
        assert (done.code, list(out.iterdir())) == (8, []), done.err
        assert re.fullmatch(r"ckptfs: cannot write \S+: No space left on device; [^:]*", done.line), done.line


def test_an_image_is_had_from_where_the_configuration_says(tmp_path: Path) -> None:
    with FakeRegistry() as mirror:
        mirror.add_layout(LAYOUT, "app/tree")
        config = tmp_path / "config.toml"
        config.write_text(f'mirrors = {{ "registry.invalid" = ["{mirror.host}"] }}\nmirror_tags = true\n')
        words = ("registry.invalid/app/tree:latest", "--config", config, "--out", tmp_path / "out")
        done = ckptfs("bench", *words, "--runs", 1, "--rtt", "1ms", "--rate", 0, "--json")
        assert done.code == 0, done.err


@pytest.mark.parametrize("moment", ["mounting", "reading"])
def test_an_interrupt_ends_all_of_it_at_once(moment: str, tmp_path: Path) -> None:
    """Ctrl-C is heard by all of a terminal's processes: the mount is read to its end only if link and relay stay."""
    out = tmp_path / "out"
    words = ["bench", f"oci:{LAYOUT}", "--out", out, "--rtt", "200ms", "--rate", "500kbit"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptfs", *map(str, words)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )

    def there() -> bool:
        on_the_link = list(out.glob(".bench-*/2/mnt"))
        return bool(on_the_link) and (moment == "mounting" or os.path.ismount(on_the_link[0]))

    wait_for("the mount", there, patience=30)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=90)
    assert (process.returncode, err) == (130, "ckptfs: interrupted\n")
    assert time.monotonic() - began < 15
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert list(out.iterdir()) == []
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], check=False, capture_output=True).stdout == b""
