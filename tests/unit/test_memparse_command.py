"""`ckptfs memparse`: sizes, searches and raw memory of processes in an image."""

import json
import math
import os
import stat
from pathlib import Path

import pytest

from ckptfs.cli.memparse import _search, _table, _Wanted
from ckptfs.cli.progress import Line
from ckptfs.inspection.image_files import in_thread
from ckptfs.inspection.memory import ProcessMemory, text_pattern
from ckptfs.inspection.overview import open_images
from ckptfs.inspection.source import LocalFiles
from tests.support.command import ckptfs
from tests.support.counted import with_layouts
from tests.support.criu_images import CORPUS, unpack_counter
from tests.support.fake_registry import FakeRegistry, Trickle
from tests.support.push import push_to_layout
from tests.support.terminal import on_terminal

COUNTER, TREE = f"oci:{CORPUS}/counter/k8s-zstdchunked.oci", f"oci:{CORPUS}/tree/k8s-zstdchunked.oci"
ALL = _Wanted(None, None)
NEEDLE = 0x7FFC95B58FC1  # as `checkpointctl memparse --search container=podman` prints it


def test_sizes(tmp_path: Path) -> None:
    result = ckptfs("memparse", TREE, "--cache-dir", tmp_path)
    assert [line.split() for line in result.out.splitlines()[1:]] == [
        ["14400", "tree", "444.0", "KiB", "256.0", "KiB"],
        ["14401", "tree-cow", "444.0", "KiB", "0", "B"],
        ["14402", "tree-shm", "60.0", "KiB", "384.0", "KiB"],
    ]
    found = ckptfs("memparse", TREE, "--json", "--pid", 14402, "--cache-dir", tmp_path).json
    (process,) = found["processes"]
    assert process == {
        "container": "",
        "pid": 14402,
        "command": "tree-shm",
        "memory_size": 61440,
        "shared_memory_size": 393216,
    }
    assert {"fetched_bytes", "image_bytes", "requests", "round_trips"} <= found.keys()


@pytest.mark.parametrize(
    "pattern", [("--search", "container=podman"), ("-r", "container=p.d..n"), ("-x", b"container=podman".hex(" "))]
)
def test_a_search(pattern: tuple[str, str], tmp_path: Path) -> None:
    result = ckptfs("memparse", COUNTER, *pattern, "--context", 6, "--cache-dir", tmp_path)
    assert result.out == f"      1  {NEEDLE:016x}  xterm.container=podman.HOME=\n"
    found = ckptfs("memparse", COUNTER, *pattern, "--pid", 1, "--json", "--cache-dir", tmp_path).json
    (match,) = found["matches"]
    assert (match["pid"], match["address"], match["text"]) == (1, f"{NEEDLE:#018x}", "container=podman")
    assert found["complete"] is True


def test_a_search_of_every_process_and_its_limit(tmp_path: Path) -> None:
    everything = ckptfs("memparse", TREE, "-s", "GNU C Library", "--json", "--cache-dir", tmp_path).json["matches"]
    assert {match["pid"] for match in everything} == {14400, 14401, 14402} or len(everything) == 0
    few = ckptfs("memparse", TREE, "-x", "00000000", "--limit", 3, "--json", "--cache-dir", tmp_path).json
    assert len(few["matches"]) == 3 and few["complete"] is False
    told = ckptfs("memparse", TREE, "-x", "00000000", "--limit", 3, "--cache-dir", tmp_path)
    assert len(told.out.splitlines()) == 3 and "stopped after 3 matches; raise --limit" in told.err
    all_of_them = ckptfs("memparse", COUNTER, "-s", "container=podman", "--limit", "9" * 20, "--cache-dir", tmp_path)
    assert all_of_them.code == 0 and len(all_of_them.out.splitlines()) == 1
    nothing = ckptfs("memparse", COUNTER, "-s", "no such words", "--cache-dir", tmp_path)
    assert (nothing.code, nothing.out) == (0, "") and nothing.err.startswith("no match\n")


def test_raw_memory(tmp_path: Path) -> None:
    target = tmp_path / "memory.raw"
    found = ckptfs("memparse", COUNTER, "--pid", 1, "--output", target, "--json", "--cache-dir", tmp_path).json
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    memory = ProcessMemory(open_images(LocalFiles(unpack_counter(tmp_path / "unpacked"))), 1)
    written = target.read_bytes()
    assert len(written) == memory.size == sum(area["length"] for area in found["areas"])
    for area in found["areas"]:
        vaddr, length, offset = int(area["address"], 16), area["length"], area["offset"]
        assert written[offset : offset + length] == memory.read(vaddr, length)
    again = ckptfs("memparse", COUNTER, "--pid", 1, "--output", target, "--cache-dir", tmp_path)
    assert again.code == 2 and "exists" in again.line and target.read_bytes() == written


def test_a_process_of_a_pod(tmp_path: Path) -> None:
    """Each container has its own process 1."""
    for name in ("db", "web"):
        unpack_counter(tmp_path / "pod" / name)
    push_to_layout(tmp_path / "pod", tmp_path / "image")
    words = ("memparse", f"oci:{tmp_path}/image", "--cache-dir", tmp_path / "cache")
    assert [process["container"] for process in ckptfs(*words, "--json").json["processes"]] == ["db", "web"]
    (process,) = ckptfs(*words, "--json", "--container", "web").json["processes"]
    assert process["container"] == "web"
    output = ("--pid", 1, "--output", tmp_path / "memory.raw")
    which = ckptfs(*words, *output)
    assert which.code == 2 and "a process 1 in db, web" in which.line and "--container" in which.line
    assert not (tmp_path / "memory.raw").exists()
    assert ckptfs(*words, *output, "--container", "web").code == 0
    assert (tmp_path / "memory.raw").stat().st_size == process["memory_size"]
    unknown = ckptfs(*words, "--container", "cache")
    assert unknown.code == 3 and "no container cache" in unknown.line and "db, web" in unknown.line


def test_a_dump_as_checkpointctl_prints_it(tmp_path: Path) -> None:
    lines = ckptfs("memparse", COUNTER, "--pid", 1, "--cache-dir", tmp_path).out.splitlines()
    assert lines[0] == "0000000000401000  48 83 ec 08 48 c7 c0 00 00 00 00 48 85 c0 74 02  |H...H......H..t.|"
    assert "*" in lines


@pytest.mark.parametrize("option", ["-s", "-r"])
def test_bytes_that_are_no_text(option: str, tmp_path: Path) -> None:
    """What a shell hands on: `--search $'\xff'`."""
    common = ["--limit", 5, "--json", "--cache-dir", tmp_path]
    found = ckptfs("memparse", COUNTER, "-x", "ff ff ff ff", *common).json["matches"]
    text = os.fsdecode(b"\xff\xff\xff\xff")
    assert ckptfs("memparse", COUNTER, option, text, *common).json["matches"] == found != []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-s", "a", "-r", "b"], 2, "search for one at a time"),
        (["-s", ""], 2, "nothing to search for"),
        (["-r", "a*"], 2, "matches the empty string"),
        (["-x", "0"], 2, "is not hexadecimal"),
        (["-s", "a", "-p", "1", "-o", "x"], 2, "--output writes memory"),
        (["-o", "x"], 2, "--output needs a process"),
        (["-p", "77"], 3, "has no process 77"),
        (["-p", "77", "-o", "/nowhere/x"], 3, "has no process 77"),
        (["-p", "1", "-o", "/nowhere/x"], 2, "/nowhere/x cannot be written: No such file or directory"),
    ],
)
def test_one_clear_line(options: list[str], code: int, words: str, tmp_path: Path) -> None:
    result = ckptfs("memparse", COUNTER, *options, "--cache-dir", tmp_path)
    assert result.code == code and words in result.line and result.out == ""


def test_sizes_fetch_no_page_and_a_search_each_page_once(tmp_path: Path) -> None:
    push_to_layout(COUNTER, tmp_path / "image")
    manifest = json.loads((tmp_path / "image" / "index.json").read_bytes())["manifests"][0]["size"]
    _, counters = with_layouts(
        [tmp_path / "image"],
        tmp_path / "a",
        lambda images: in_thread(images[0], lambda f: _table(f, ALL, True, Line())),
    )
    assert (counters.requests, counters.bytes) == (1, manifest)

    def work(files: object) -> object:
        return _search(files, ALL, text_pattern("container=podman"), 0, 10, True, Line())  # type: ignore[arg-type]

    found, counters = with_layouts(
        [tmp_path / "image"],
        tmp_path / "b",
        lambda images: in_thread(images[0], work),  # type: ignore[arg-type]
    )
    assert isinstance(found, dict) and len(found["matches"]) == 1
    layers = sum(file.stat().st_size for file in (tmp_path / "image" / "blobs" / "sha256").iterdir())
    assert counters.bytes < layers and counters.round_trips(math.inf) <= 3


def test_a_search_that_takes_its_time_shows_progress_until_it_finds_something(tmp_path: Path) -> None:
    with FakeRegistry({("blobs/", None): Trickle(0.2, 32 * 1024)}) as registry:
        registry.add_layout(CORPUS / "counter" / "k8s-zstdchunked.oci", "repo")
        words = ("memparse", registry.reference("repo:latest"), "-s", "container=podman", "--cache-dir", tmp_path)
        with on_terminal(*words) as terminal:
            assert terminal.end(60) == 0 and terminal.in_order
    before, match, after = terminal.raw.partition("container=podman")
    assert match and "fetched" in before
    assert after.count("fetched") == 1 and "requests" in after  # the last line
