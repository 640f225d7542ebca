"""Prometheus' text format, read by Prometheus' own parser: names and units, HELP and TYPE, labels that need escapes."""

import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ckptfs.control.exposition import exposition

STATUS: dict[str, Any] = {
    "version": "1.0", "mountpoint": "/mnt/ckpt", "reference": "localhost:5000/counter:1", "digest": "sha256:00",
    "view": "checkpoint", "verify": "chunk", "image_bytes": 1000, "cached_bytes": 400, "complete": False,
    "ready_ms": 250.0, "prefetch": {"bytes": 7, "used_bytes": 3},
    "network": {"requests": 4, "bytes": 500, "retries": 1, "errors": 0, "in_flight": 2},
    "reads": {"count": 9, "bytes": 90, "memory_hits": 5, "disk_hits": 1, "misses": 3, "waiting": 1, "waits": 3,
              "waited_ms": 1500.0, "wait_ms_p50": 20.0, "wait_ms_p99": 900.0},
}  # fmt: skip


def families(*mounts: dict[str, Any]) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(exposition(mounts))}


def test_every_metric_has_help_type_and_its_unit() -> None:
    text = exposition([STATUS])
    assert text.endswith("\n") and "\r" not in text
    for family in families(STATUS).values():
        assert family.documentation and family.type in ("gauge", "counter", "summary"), family
        assert re.fullmatch(r"ckptfs_[a-z_]+", family.name)
        assert not re.search(r"_(ms|kb|mb|percent|count)\b", family.name), "base units, as Prometheus wants them"
    for line in text.splitlines():
        if line.startswith("# TYPE ") and line.endswith(" counter"):
            assert line.split()[2].endswith("_total"), line
    heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads)) == text.count("# HELP")


def test_values_are_those_of_the_status() -> None:
    found = families(STATUS)

    def value(name: str, sample: str = "") -> float:
        return float(next(one.value for one in found[name].samples if one.name == (sample or name)))

    assert value("ckptfs_up") == 1 and value("ckptfs_info") == 1
    assert value("ckptfs_image_bytes") == 1000 and value("ckptfs_ready_seconds") == 0.25
    assert value("ckptfs_network_bytes", "ckptfs_network_bytes_total") == 500
    assert value("ckptfs_reads", "ckptfs_reads_total") == 9
    assert value("ckptfs_read_wait_seconds", "ckptfs_read_wait_seconds_sum") == 1.5
    assert value("ckptfs_read_wait_seconds", "ckptfs_read_wait_seconds_count") == 3
    quantiles = {one.labels.get("quantile"): one.value for one in found["ckptfs_read_wait_seconds"].samples}
    assert quantiles["0.5"] == 0.02 and quantiles["0.99"] == 0.9
    assert found["ckptfs_info"].samples[0].labels["digest"] == "sha256:00"


def test_labels_survive_whatever_a_directory_is_called() -> None:
    nasty = 'a "b"\n\\c}{,=é\u202e'
    for name in (nasty, "\\", "\\n", '"', "\n"):
        samples = families({**STATUS, "mountpoint": name})["ckptfs_up"].samples
        assert [one.labels["mountpoint"] for one in samples] == [name]
    text = exposition([{**STATUS, "mountpoint": "not \udcff UTF-8"}])
    assert text.encode() and "udcff" in text


def test_dead_mounts_and_none() -> None:
    dead = {"mountpoint": "/mnt/b", "reference": "x", "state": "dead; run: ckptfs umount /mnt/b"}
    found = families(STATUS, dead)
    assert [one.value for one in found["ckptfs_up"].samples] == [1, 0]
    assert len(found["ckptfs_image_bytes"].samples) == 1
    assert families()["ckptfs_up"].samples == []


def test_what_a_mount_does_not_say_is_left_out() -> None:
    """Before it is ready, and of a layer store."""
    less = {key: value for key, value in STATUS.items() if key not in ("ready_ms", "cached_bytes", "complete")}
    found = families(less)
    assert [found[name].samples for name in ("ckptfs_ready_seconds", "ckptfs_cached_bytes")] == [[], []]
    assert found["ckptfs_reads"].samples


def test_it_is_what_the_documentation_names() -> None:
    page = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()
    for line in exposition([STATUS]).splitlines():
        if line.startswith("# TYPE"):
            assert f"`{line.split()[2]}`" in page, line
