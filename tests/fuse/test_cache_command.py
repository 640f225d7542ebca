"""ckptfs cache: what it says of the node's cache, and what it does to it."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.command import Result, ckptfs, mounted
from tests.support.disks import disk_of
from tests.support.fake_registry import FakeRegistry
from tests.support.tools import require, wait_for

CORPUS = Path(__file__).parent.parent / "data" / "corpus" / "counter"


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        registry.add_layout(CORPUS / "k8s-zstdchunked.oci", "chunked")
        registry.add_layout(CORPUS / "k8s-zstd.oci", "stream")
        yield registry


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def run(cache: Path, *words: object) -> Result:
    return ckptfs("cache", *words, "--cache-dir", cache)


@pytest.mark.parametrize("repository", ["chunked", "stream"])
def test_a_warm_image_needs_no_network(repository: str, registry: FakeRegistry, cache: Path) -> None:
    reference = registry.reference(f"{repository}:latest")
    warmed = run(cache, "warm", reference, "--json").json
    assert warmed["cached_bytes"] == warmed["image_bytes"] > 800_000
    assert warmed["fetched_bytes"] > 0.9 * warmed["image_bytes"]
    again = run(cache, "warm", reference)
    assert again.code == 0 and "all of it is in the cache" in again.out and "in 1 request\n" in again.out
    registry.log.clear()
    copied = ckptfs("cp", reference, "checkpoint", cache.parent / "copy", "--offline", "--cache-dir", cache)
    assert copied.code == 0 and registry.log == []


def test_metadata_only(registry: FakeRegistry, cache: Path) -> None:
    reference = registry.reference("chunked:latest")
    warmed = run(cache, "warm", reference, "--metadata", "--json").json
    assert warmed["cached_bytes"] < warmed["image_bytes"]
    offline = ("--offline", "--cache-dir", cache)
    assert ckptfs("cp", reference, "checkpoint/inventory.img", cache.parent / "copy", *offline).code == 0
    assert ckptfs("cp", reference, "checkpoint/pages-1.img", cache.parent / "pages", *offline).code != 0


def test_a_cache_that_is_too_small_is_told(registry: FakeRegistry, cache: Path) -> None:
    done = run(cache, "warm", registry.reference("stream:latest"), "--cache-size", "1M")
    assert done.code == 8 and "--cache-size" in done.line


def test_warm_reports_what_keeps_it_from_being_done(registry: FakeRegistry, cache: Path) -> None:
    assert run(cache, "warm", registry.reference("chunked:none")).code == 3
    assert run(cache, "warm", "oci:/no/where").code == 3
    assert run(cache, "warm").code == 2


def test_info_verify_prune_clear(registry: FakeRegistry, cache: Path) -> None:
    for word in ("info", "verify", "prune", "clear"):
        nothing = run(cache, word)
        assert nothing.code == 3 and str(cache) in nothing.line and not cache.exists()
    run(cache, "warm", registry.reference("stream:latest"))
    run(cache, "warm", registry.reference("chunked:latest"))
    info = run(cache, "info", "--json").json
    assert info["path"] == str(cache) and info["chunks"] > 50 and info["documents"] >= 4
    assert info["bytes"] > 3_000_000 and not info["encrypted"] and not info["in_use"]
    assert "not encrypted" in run(cache, "info").out
    assert run(cache, "verify", "--json").json == {"checked": info["chunks"] + info["documents"], "damaged": 0}
    assert run(cache, "verify").out == f"{info['chunks'] + info['documents']} chunks and documents are sound\n"

    segment = max(cache.rglob("*.seg"), key=lambda path: path.stat().st_size)
    with segment.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    damaged = run(cache, "verify")
    assert damaged.code == 6 and "1 of" in damaged.line
    assert run(cache, "verify").code == 0

    assert run(cache, "prune", "--to", "1M").code == 0
    assert run(cache, "info", "--json").json["bytes"] <= 1 << 20
    assert "freed" in run(cache, "clear").out
    assert run(cache, "info", "--json").json["chunks"] == 0
    assert run(cache, "prune", "--to", "much").code == 2


def test_an_encrypted_cache_is_kept_in_order_without_its_key(
    registry: FakeRegistry, cache: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    run(cache, "warm", registry.reference("chunked:latest"), "--cache-key", key)
    info = run(cache, "info", "--json").json
    assert info["encrypted"] and info["chunks"] > 20
    assert run(cache, "verify").code == 0
    assert run(cache, "prune", "--to", "0").code == 0
    assert run(cache, "info", "--json").json["encrypted"]
    assert run(cache, "clear").code == 0
    assert not run(cache, "info", "--json").json["encrypted"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB."""
    with disk_of(tmp_path / "disk", "size=600k,mode=700") as disk:
        yield disk


def fill(path: Path) -> None:
    """Until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_disk_that_is_full_or_read_only(registry: FakeRegistry, small_disk: Path) -> None:
    cache, reference = small_disk / "cache", registry.reference("chunked:latest")
    full = run(cache, "warm", reference)
    assert full.code == 8 and "fit into the cache" in full.err
    fill(small_disk / "other")
    assert run(cache, "clear", "--json").json["bytes"] == 0
    fill(small_disk / "more")
    metadata = run(cache, "warm", reference, "--metadata")
    assert metadata.code == 8 and "chunks did not fit" in metadata.err, "it does not say that all is here"
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert run(cache, "info", "--json").json["in_use"] is False
    assert run(cache, "verify").code == 0
    for words in (("clear",), ("clear", "--force"), ("prune", "--to", "0")):
        refused = run(cache, *words)
        assert refused.code == 8 and "Read-only file system" in refused.line and "for writing" in refused.line


def test_what_mounts_are_writing_stays(registry: FakeRegistry, cache: Path, tmp_path: Path) -> None:
    require("fusermount3")
    with mounted(registry.reference("chunked:latest"), tmp_path, cache=cache) as mount:
        wait_for("background fetch", lambda: mount.status()["complete"], step=0.1)
        pruned = run(cache, "prune", "--to", "1K")
        assert pruned.code == 0 and "the rest is being written by mounts" in pruned.out
        assert run(cache, "verify", "--json").json["damaged"] == 0
        assert run(cache, "clear").code == 8
        cleared = run(cache, "clear", "--force", "--json").json
        assert cleared["freed_bytes"] > 800_000 and cleared["bytes"] == 0
        assert (mount.path / "checkpoint" / "pages-1.img").read_bytes()
        assert mount.status()["errors"] == []


def test_every_subcommand_has_help_with_an_example() -> None:
    for command in ("info", "verify", "prune", "clear", "warm"):
        shown = ckptfs("cache", command, "--help")
        assert shown.code == 0 and f"ckptfs cache {command}" in shown.out.partition("Options:")[0], command
