"""`ckptfs inspect` and `show`: what they say of real images, and how little they fetch for it.

Fetching is counted on images in every format: requests, bytes, and round trips as a link would make them.
"""

import functools
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ckptfs.inspection.image_files import in_thread
from ckptfs.inspection.overview import Overview, inspect
from ckptfs.inspection.parts import Part
from ckptfs.telemetry import NetworkCounters
from tests.support.command import ckptfs
from tests.support.counted import with_layouts
from tests.support.criu_images import CORPUS, DUMPS, image, mm, pagemap, task, vma
from tests.support.push import push_to_layout
from tests.support.terminal import on_terminal
from tests.support.trees import layout_of

COUNTER, TREE = CORPUS / "counter", CORPUS / "tree"
LISTED = Part.MOUNTS | Part.STATISTICS | Part.METADATA


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pushed")
    sources = {"counter": COUNTER / "k8s-zstd.oci", "tree": TREE / "k8s-gzip.oci"}
    for name, source in sources.items():
        push_to_layout(f"oci:{source}", folder / name)
    return {name: folder / name for name in sources}


def fetched(layout: Path, cache: Path, parts: Part = Part.EVERYTHING) -> tuple[Overview, NetworkCounters]:
    return with_layouts([layout], cache, lambda images: in_thread(images[0], functools.partial(inspect, parts=parts)))


def reference() -> dict[str, Any]:
    (found,) = json.loads((DUMPS / "podman" / "checkpointctl.json").read_bytes())
    assert isinstance(found, dict)
    return found


# what it says


@pytest.mark.parametrize("name", sorted(path.stem for path in COUNTER.glob("*.oci")))
def test_every_format_tells_what_checkpointctl_tells_of_the_archive(name: str, tmp_path: Path) -> None:
    result = ckptfs("inspect", f"oci:{COUNTER}/{name}.oci", "--json", "--cache-dir", tmp_path)
    assert result.code == 0 and result.err == ""
    (ours,) = result.json["containers"]
    theirs = reference()
    for key in ("container_name", "image", "id", "runtime", "created", "engine", "checkpoint_size", "statistics"):
        assert ours[key] == theirs[key] or theirs[key].items() <= ours[key].items(), key
    assert ours["mounts"] == theirs["mounts"] and ours["file_descriptors"] == theirs["file_descriptors"]
    mine, other = ours["process_tree"], theirs["process_tree"]
    assert (mine["pid"], mine["command"], mine["cmdline"]) == (1, other["command"], other["cmdline"].rstrip())
    assert mine["environment_variables"] == other["environment_variables"]
    assert set(result.json) == {
        "reference", "resolved", "parent", "containers", "fetched_bytes", "image_bytes", "requests", "round_trips",
    }  # fmt: skip


def test_for_people(pushed: dict[str, Path], tmp_path: Path) -> None:
    result = ckptfs("inspect", f"oci:{pushed['counter']}", "--cache-dir", tmp_path)
    for words in ("Image: localhost/base:latest", "[1] /counter 1536 /data/out", "[REG 3] /data/out", "Frozen time"):
        assert words in result.out
    assert "Environment" not in result.out and "Annotations" not in result.out
    assert result.line.startswith("fetched 0 B of 827.1 KiB in 0 requests")
    assert ckptfs("inspect", f"oci:{pushed['counter']}", "-q", "--cache-dir", tmp_path).err == ""


@pytest.mark.parametrize(
    ("options", "there", "absent"),
    [
        (["--stats"], {"statistics"}, {"process_tree", "mounts", "metadata", "sockets", "file_descriptors"}),
        (["--mounts", "--metadata"], {"mounts", "metadata"}, {"process_tree", "statistics"}),
        (["--ps-tree"], {"process_tree"}, {"file_descriptors", "mounts", "statistics"}),
        (["--files"], {"process_tree", "file_descriptors"}, {"sockets", "mounts"}),
        (["--sockets"], {"process_tree", "sockets"}, {"file_descriptors", "mounts"}),
        (["--all"], {"process_tree", "sockets", "file_descriptors", "mounts", "statistics", "metadata"}, set()),
    ],
)
def test_parts(options: list[str], there: set[str], absent: set[str], pushed: dict[str, Path], tmp_path: Path) -> None:
    result = ckptfs("inspect", f"oci:{pushed['counter']}", "--format", "json", *options, "--cache-dir", tmp_path)
    (found,) = result.json["containers"]
    assert there <= found.keys() and not absent & found.keys()
    tree = found.get("process_tree", {})
    assert ("cmdline" in tree, "environment_variables" in tree) == (options == ["--all"],) * 2


def test_commands_and_environments_are_parts(pushed: dict[str, Path], tmp_path: Path) -> None:
    options = [
        ("--ps-tree-cmd", "cmdline", "environment_variables"),
        ("--ps-tree-env", "environment_variables", "cmdline"),
    ]
    for option, shown, hidden in options:
        tree = ckptfs("inspect", f"oci:{pushed['counter']}", "--json", option, "--cache-dir", tmp_path).json
        process = tree["containers"][0]["process_tree"]
        assert shown in process and hidden not in process


def test_one_process(pushed: dict[str, Path], tmp_path: Path) -> None:
    layout = f"oci:{pushed['tree']}"
    found = ckptfs("inspect", layout, "--json", "--pid", 14401, "--cache-dir", tmp_path).json["containers"][0]
    assert found["process_tree"]["pid"] == 14401 and "children" not in found["process_tree"]
    assert [entry["pid"] for entry in found["file_descriptors"]] == [14401]
    for options in [], ["--stats"], ["--mounts", "--metadata"]:
        result = ckptfs("inspect", layout, "--pid", 9, *options, "--cache-dir", tmp_path)
        assert result.code == 3 and "has no process 9" in result.line
    only = ckptfs("inspect", layout, "--json", "--stats", "--pid", 14401, "--cache-dir", tmp_path)
    (found,) = only.json["containers"]
    assert found["process_tree"]["pid"] == 14401 and "statistics" in found and "mounts" not in found


def test_unknown_images_and_pods(tmp_path: Path) -> None:
    for name in ("web", "db"):
        directory = tmp_path / "pod" / name / "checkpoint"
        directory.mkdir(parents=True)
        (directory / "inventory.img").write_bytes(image("inventory", {1: 1, 3: 1}))
        (directory / "pstree.img").write_bytes(image("pstree", task(5)))
        (directory / "core-5.img").write_bytes(image("core", {1: 1, 3: {1: 1, 2: 0, 3: 0, 4: 0, 5: 0, 6: name}}))
        (directory / "ids-5.img").write_bytes(image("ids", {1: 1, 2: 1, 3: 1, 4: 1}))
        (directory / "mm-5.img").write_bytes(mm(vma(0x1000, 0x2000)))
        (directory / "pagemap-5.img").write_bytes(pagemap(1, (0x1000, 1, 4)))
        (directory / "pages-1.img").write_bytes(bytes(4096))
        (directory / "novelty-7.img").write_bytes(b"?")
        (directory.parent / "config.dump").write_text(json.dumps({"name": name}))
    push_to_layout(tmp_path / "pod", tmp_path / "image")
    result = ckptfs("inspect", f"oci:{tmp_path}/image", "--json", "--cache-dir", tmp_path / "cache")
    assert [c["container_name"] for c in result.json["containers"]] == ["db", "web"]
    assert all(c["unknown_images"] == ["novelty-7.img"] for c in result.json["containers"])
    assert "novelty-7.img" in ckptfs("inspect", f"oci:{tmp_path}/image", "--cache-dir", tmp_path / "cache").out


def test_a_process_of_a_pod_is_shown_with_the_container_that_has_it(tmp_path: Path) -> None:
    for name, pid in (("db", 7), ("web", 5)):
        directory = tmp_path / "pod" / name / "checkpoint"
        directory.mkdir(parents=True)
        (directory / "inventory.img").write_bytes(image("inventory", {1: 1, 3: 1}))
        (directory / "pstree.img").write_bytes(image("pstree", task(pid)))
        core = image("core", {1: 1, 3: {1: 2, 2: 0, 3: 0, 4: 0, 5: 0, 6: name}})  # a zombie has no memory
        (directory / f"core-{pid}.img").write_bytes(core)
        (directory.parent / "config.dump").write_text(json.dumps({"name": name}))
    push_to_layout(tmp_path / "pod", tmp_path / "image")
    words = ("inspect", f"oci:{tmp_path}/image", "--ps-tree", "--cache-dir", tmp_path / "cache", "--pid")
    for name, pid in (("db", 7), ("web", 5)):
        (found,) = ckptfs(*words, pid, "--json").json["containers"]
        assert (found["container_name"], found["process_tree"]["pid"]) == (name, pid)
    missing = ckptfs(*words, 6)
    assert missing.code == 3 and "has no process 6" in missing.line


def test_a_table_of_images(pushed: dict[str, Path], tmp_path: Path) -> None:
    layouts = [f"oci:{path}" for path in (pushed["counter"], pushed["tree"])]
    result = ckptfs("show", *layouts, "--cache-dir", tmp_path)
    lines = result.out.splitlines()
    assert len(lines) == 3 and "f63b0282238b" in lines[1] and "1.6 MiB" in lines[1]
    assert lines[2].rstrip().endswith(layouts[1])
    rows = ckptfs("show", *layouts, "--json", "--cache-dir", tmp_path).json
    assert [row["container_name"] for row in rows] == ["counter", ""]
    assert rows[0]["total_size"] == reference()["checkpoint_size"]["total_size"]


# what goes wrong


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["inspect"], 2, "Missing argument 'REF'"),
        (["inspect", "oci:/nowhere/at/all"], 3, "/nowhere/at/all"),
        (["inspect", f"oci:{TREE}/k8s-gzip.oci", "--format", "xml"], 2, "'xml'"),
        (["inspect", "127.0.0.1:1/nothing:1"], 5, "127.0.0.1:1"),
        (["inspect", "127.0.0.1:1/nothing:1", "--offline"], 3, "not in this node's cache"),
        (["show"], 2, "Missing argument 'REF...'"),
        (["memparse", f"oci:{TREE}/k8s-gzip.oci", "--pid", "0"], 2, "0 is not in the range"),
        (["diff", f"oci:{TREE}/k8s-gzip.oci"], 2, "Missing argument"),
    ],
)
def test_one_clear_line(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    options = ["--cache-dir", tmp_path] if len(arguments) > 1 else []
    result = ckptfs(*arguments, *options)
    assert result.code == code and words in result.line and result.out == ""


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "readme").write_text("x")
    with tarfile.open(tmp_path / "layer.tar", "w") as archive:
        archive.add(tmp_path / "readme", "readme")
    layout = layout_of((tmp_path / "layer.tar").read_bytes(), tmp_path / "layout")
    good = f"oci:{TREE}/k8s-gzip.oci"
    for words in (["inspect"], ["show", good], ["diff", good], ["memparse"], ["show", "-q", good]):
        result = ckptfs(*words, f"oci:{layout}", "--cache-dir", tmp_path / "cache")
        assert result.code == 7 and result.out == "", words
        assert f"{layout}" in result.line and "is not a checkpoint; `ckptfs ls REF` shows" in result.line


# what it fetches


def test_a_pushed_image_costs_one_request_and_one_more_for_command_lines(
    pushed: dict[str, Path], tmp_path: Path
) -> None:
    overview, counters = fetched(pushed["counter"], tmp_path / "a", LISTED | Part.PROCESSES | Part.FILES | Part.SOCKETS)
    manifest = json.loads((pushed["counter"] / "index.json").read_bytes())["manifests"][0]["size"]
    assert (counters.requests, counters.bytes) == (1, manifest)  # no layer was asked
    assert overview.processes[0].memory == 1630208 and len(overview.processes[0].descriptors) == 6

    overview, counters = fetched(pushed["counter"], tmp_path / "b")
    assert overview.processes[0].arguments == ("/counter", "1536", "/data/out")
    assert (counters.requests, counters.round_trips(math.inf)) == (2, 2)
    assert counters.bytes < manifest + 4096

    overview, counters = fetched(pushed["tree"], tmp_path / "c")
    assert counters.requests <= 3 and counters.round_trips(math.inf) == 2
    assert counters.bytes < 60_000 and len(overview.processes) == 3


@pytest.mark.parametrize(
    ("layout", "most", "least"),
    # bytes with command lines, and without: measured plus a tenth; the images are of 0.6 and 0.8 MB
    [
        (COUNTER / "k8s-zstdchunked.oci", 33_500, 26_000),
        (COUNTER / "skopeo19-zstdchunked.oci", 33_700, 26_300),
        (TREE / "k8s-zstdchunked.oci", 14_200, 6_700),
        # stargz-snapshotter makes one chunk of a file of up to 4 MiB: the command line costs all the pages
        (COUNTER / "k8s-stargz-zstdchunked.oci", 840_000, 25_100),
        # 256 KiB are read of the end of a blob, where its table of contents is somewhere
        (COUNTER / "k8s-estargz64k.oci", 345_000, 311_100),
    ],
)
def test_images_of_others_cost_what_is_shown(layout: Path, most: int, least: int, tmp_path: Path) -> None:
    overview, counters = fetched(layout, tmp_path / "a")
    assert overview.processes[0].arguments and counters.bytes <= most
    assert counters.round_trips(math.inf) <= 4  # manifest, table of contents, metadata, command lines
    _, counters = fetched(layout, tmp_path / "b", LISTED)
    assert counters.bytes <= least and counters.round_trips(math.inf) <= 3


@pytest.mark.parametrize("layout", [COUNTER / "k8s-zstd.oci", TREE / "k8s-gzip.oci"])
def test_a_stream_is_read_once(layout: Path, tmp_path: Path) -> None:
    size = json.loads((layout / "index.json").read_bytes())["manifests"][0]["size"]
    overview, counters = fetched(layout, tmp_path)
    blob = max(file.stat().st_size for file in (layout / "blobs" / "sha256").iterdir())
    assert overview.processes and counters.bytes <= size + blob + 16 * 1024  # the end is looked at for a seek table


def test_nothing_is_fetched_twice(pushed: dict[str, Path], tmp_path: Path) -> None:
    _, first = fetched(COUNTER / "k8s-zstdchunked.oci", tmp_path)
    _, second = fetched(COUNTER / "k8s-zstdchunked.oci", tmp_path)
    assert second.requests == 1 < first.requests  # the manifest: a layout has no name for what it had last


def test_a_gigabyte_that_we_pushed(tmp_path: Path) -> None:
    """At most 256 KiB; the chunks of such a pages file are listed in its layer, not in the manifest."""
    images = tmp_path / "images"
    images.mkdir()
    size, start = 1 << 30, 0x10000000
    strings = start + size - 4096
    (images / "inventory.img").write_bytes(image("inventory", {1: 1, 3: 1}))
    (images / "pstree.img").write_bytes(image("pstree", task(5)))
    (images / "core-5.img").write_bytes(image("core", {1: 1, 3: {1: 1, 2: 0, 3: 0, 4: 0, 5: 0, 6: "big"}}))
    (images / "ids-5.img").write_bytes(image("ids", {1: 1, 2: 1, 3: 1, 4: 1}))
    addresses = (strings, strings + 9, strings + 9, strings + 13)
    (images / "mm-5.img").write_bytes(mm(vma(start, start + size), strings=addresses))
    (images / "pagemap-5.img").write_bytes(pagemap(1, (start, size // 4096, 6)))
    with open(images / "pages-1.img", "wb") as pages:
        for chunk in range(size >> 18):  # every chunk is another, and none takes long to compress
            pages.write(chunk.to_bytes(8, "big").ljust(1 << 18, b"x"))
        pages.seek(size - 4096)
        pages.write(b"/bin/big\0A=1\0".ljust(4096, b"\0"))
    push_to_layout(images, tmp_path / "image")
    (images / "pages-1.img").unlink()
    overview, counters = fetched(tmp_path / "image", tmp_path / "cache")
    (process,) = overview.processes
    assert (process.memory, process.arguments, process.environment) == (size, ("/bin/big",), ("A=1",))
    assert counters.bytes <= 256 * 1024 and counters.round_trips(math.inf) <= 3


@pytest.mark.parametrize("columns", [40, 60, 99])
def test_show_on_a_narrow_terminal_is_a_paragraph_each(columns: int, tmp_path: Path) -> None:
    layouts = [f"oci:{CORPUS}/counter/k8s-zstdchunked.oci", f"oci:{TREE}/k8s-gzip.oci"]
    with on_terminal("show", *layouts, "--cache-dir", tmp_path, columns=columns) as terminal:
        assert terminal.end(60) == 0
    assert terminal.raw.count("Container: ") == 2
    for layout in layouts:
        assert layout in terminal.raw  # in one piece, which the terminal may wrap
    with on_terminal("show", *layouts, "--cache-dir", tmp_path, columns=160) as terminal:
        assert terminal.end(60) == 0
    assert terminal.raw.count("Container") == 1 and "Container: " not in terminal.raw
