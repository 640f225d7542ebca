"""What inspection tells of checkpoints, compared with checkpointctl 1.3.0 on the same ones.

tests/data/criu/ENGINE/checkpointctl.json is what `checkpointctl inspect --all --format json` printed.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ckptfs.errors import FormatError, LimitExceeded, NotFoundError
from ckptfs.inspection.container import Container, Mount
from ckptfs.inspection.overview import Overview, containers, inspect, open_images, summarise
from ckptfs.inspection.source import CheckpointFiles, Images, LocalFiles, Range, read_whole
from ckptfs.settings import Limits
from tests.support.criu_images import DUMPS, image, magic, mm, pagemap, task, unpack_counter, unpack_tree, vma


class Counted(LocalFiles):
    """LocalFiles that notes what is announced, and what is read without having been."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.announced: list[list[Range]] = []
        self.read_bytes = 0
        self.surprises: list[Range] = []

    def expect(self, ranges: Sequence[Range]) -> None:
        self.announced.append(list(ranges))

    def read(self, path: str, offset: int, length: int) -> bytes:
        wanted = (path, offset, length)
        self.read_bytes += length
        if not any(p == path and o <= offset and offset + length <= o + n for r in self.announced for p, o, n in r):
            self.surprises.append(wanted)
        return super().read(path, offset, length)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("roots")
    return {
        "podman": unpack_counter(folder / "podman"),
        "cri-o": unpack_tree(folder / "cri-o", "cri-o"),
        "containerd": unpack_tree(folder / "containerd", "containerd"),
        "criu": unpack_tree(folder / "criu"),
    }


def reference(engine: str) -> dict[str, Any]:
    (found,) = json.loads((DUMPS / engine / "checkpointctl.json").read_bytes())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("engine", ["podman", "cri-o", "containerd"])
def test_what_checkpointctl_says(engine: str, roots: dict[str, Path]) -> None:
    ours = inspect(LocalFiles(roots[engine])).to_json()
    theirs = reference(engine)
    for key in ("container_name", "image", "id", "runtime", "created", "engine", "checkpoint_size"):
        assert ours[key] == theirs[key], key
    assert ours["mounts"] == theirs.get("mounts", [])
    assert ours.get("checkpointed") == theirs.get("checkpointed")
    assert ours.get("ip") == theirs.get("ip")
    assert theirs["statistics"].items() <= ours["statistics"].items()

    def same(mine: dict[str, Any], other: dict[str, Any]) -> None:
        assert (mine["pid"], mine["command"]) == (other["pid"], other["command"])
        assert mine["cmdline"] == other["cmdline"].rstrip()  # checkpointctl turns the last NUL into a space
        assert mine.get("environment_variables", {}) == other.get("environment_variables", {})
        for child, their_child in zip(mine.get("children", []), other.get("children", []), strict=True):
            same(child, their_child)

    same(ours["process_tree"], theirs["process_tree"])
    for mine, other in zip(ours["file_descriptors"], theirs["file_descriptors"], strict=True):
        assert mine["pid"] == other["pid"]
        assert [(f["type"], f["fd"]) for f in mine["open_files"]] == [(f["type"], f["fd"]) for f in other["open_files"]]
        named = ("REG", "PIPE", "UNIXSK", "")
        assert [f["path"] for f in mine["open_files"] if f["type"] in named] == [
            f["path"] for f in other["open_files"] if f["type"] in named
        ]
    assert [s["pid"] for s in ours["sockets"]] == [s["pid"] for s in theirs.get("sockets") or []]


def test_json_is_json(roots: dict[str, Path]) -> None:
    for root in roots.values():
        value = inspect(LocalFiles(root)).to_json()
        assert json.loads(json.dumps(value)) == value


def test_more_than_checkpointctl(roots: dict[str, Path]) -> None:
    found = inspect(LocalFiles(roots["podman"]))
    assert found.host_name == "f63b0282238b" and found.inventory is not None
    assert {point.path for point in found.mount_points} >= {"/", "/proc", "/dev/shm"}
    (process,) = found.processes
    assert (process.machine, process.state, process.threads, process.memory) == ("amd64", "Alive", 1, 1630208)
    tree = inspect(LocalFiles(roots["criu"]))
    assert [(p.pid, p.ppid, p.memory, p.shared) for p in tree.processes] == [
        (14400, 0, 454656, 262144),
        (14401, 14400, 454656, 0),
        (14402, 14400, 61440, 393216),
    ]
    assert tree.container == Container() and tree.unknown == ()


@pytest.mark.parametrize("engine", ["podman", "cri-o", "criu"])
def test_two_rounds_and_little_to_fetch(engine: str, roots: dict[str, Path]) -> None:
    """All metadata is announced at once, then the pages with strings; nothing else is read."""
    files = Counted(roots[engine])
    found = inspect(files)
    assert len(files.announced) == 2 and files.surprises == []
    metadata = sum(length for _, _, length in files.announced[0])
    assert sum(length for _, _, length in files.announced[1]) < 3 * 8192
    assert files.read_bytes < found.sizes.total // 2 and metadata < 120_000


def test_a_summary_reads_no_image(roots: dict[str, Path]) -> None:
    files = Counted(roots["podman"])
    container, sizes = summarise(files)
    assert (container.name, sizes.total, sizes.rootfs_diff) == ("counter", 1652280, 340992)
    assert len(files.announced) == 1 and files.surprises == []
    assert all("checkpoint/" not in path for path, _, _ in files.announced[0])


def test_a_bare_directory_of_images(roots: dict[str, Path]) -> None:
    bare = inspect(LocalFiles(roots["criu"] / "checkpoint"))
    assert bare.processes == inspect(LocalFiles(roots["criu"])).processes
    assert bare.statistics is not None and bare.statistics.pages_written == 237


def test_pods_and_what_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "pod" / name / "checkpoint").mkdir(parents=True)
    (tmp_path / "pod" / "one" / "config.dump").write_text('{"name": "first"}')
    (tmp_path / "pod" / "other").mkdir()
    files = LocalFiles(tmp_path / "pod")
    assert containers(files) == ["one/", "two/"]
    assert inspect(files, "one/").container.name == "first"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="there is no checkpoint"):
        containers(LocalFiles(tmp_path / "empty"))


def small(root: Path, **images: bytes) -> LocalFiles:
    """A checkpoint of one process, 5, written field by field; `images` replace or add (None-length removes)."""
    strings = (0x2FF0, 0x3010, 0x3010, 0x3020)
    core = image("core", {1: 1, 3: {1: 1, 2: 0, 3: 0, 4: 0, 5: 0, 6: "main"}})
    memory = bytearray(4 * 4096)
    memory[0x1FF0:0x2010] = b"/bin/main\0--colour\0r\xffd\0".ljust(32, b"\0")
    memory[0x2010:0x2020] = b"A=1\0B=x=y\0".ljust(16, b"\0")
    every = {
        "pstree.img": image("pstree", task(5)),
        "core-5.img": core,
        "ids-5.img": image("ids", {1: 1, 2: 1, 3: 1, 4: 1}),
        "mm-5.img": mm(vma(0x1000, 0x5000), vma(0x9000, 0xB000, flags=0x21), strings=strings),
        "pagemap-5.img": pagemap(1, (0x1000, 4, 6)),
        "pages-1.img": bytes(memory),
        **{name.replace("__", "-").replace("_img", ".img"): data for name, data in images.items()},
    }
    (root / "checkpoint").mkdir(parents=True)
    for name, data in every.items():
        (root / "checkpoint" / name).write_bytes(data)
    return LocalFiles(root)


def test_strings_across_pages(tmp_path: Path) -> None:
    (process,) = inspect(small(tmp_path)).processes
    assert process.arguments == ("/bin/main", "--colour", "r\\xffd")
    assert process.environment == ("A=1", "B=x=y") and not process.cut
    assert process.to_json()["environment_variables"] == {"A": "1", "B": "x=y"}
    assert process.shared == 0x2000


def test_long_strings_are_cut(tmp_path: Path) -> None:
    (process,) = inspect(small(tmp_path), limits=Limits(argument_bytes=9)).processes
    assert process.arguments == ("/bin/main",) and process.cut
    (process,) = inspect(small(tmp_path / "again"), limits=Limits(argument_bytes=32)).processes
    assert not process.cut


def test_strings_that_were_never_written_or_end_before_they_start(tmp_path: Path) -> None:
    nowhere = mm(vma(0x1000, 0x5000), strings=(0x70000, 0x70010, 0x3020, 0x3010))
    (process,) = inspect(small(tmp_path, mm__5_img=nowhere)).processes
    assert (process.arguments, process.environment, process.cut) == ((), (), False)


def test_compressed_pages_hide_only_what_is_in_them(tmp_path: Path) -> None:
    (process,) = inspect(small(tmp_path, pagemap__5_img=pagemap(1, (0x1000, 4, 4 | 8)))).processes
    assert (process.name, process.arguments, process.environment, process.memory) == ("main", None, None, 0)
    assert "cmdline" not in process.to_json()


def test_zombies(tmp_path: Path) -> None:
    zombie = image("core", {1: 1, 3: {1: 6, 2: 9, 3: 0, 4: 0, 5: 0, 6: "gone"}})
    (process,) = inspect(small(tmp_path, core__5_img=zombie)).processes
    assert (process.state, process.memory, process.descriptors) == ("Zombie", 0, ())


def test_unknown_images_are_named(tmp_path: Path) -> None:
    files = small(tmp_path, novelty__7_img=b"?")
    for name in ("descriptors.json", "dump.log", "notes"):
        (tmp_path / "checkpoint" / name).write_text("x")
    assert inspect(files).unknown == ("notes", "novelty-7.img")
    assert inspect(files).to_json()["unknown_images"] == ["notes", "novelty-7.img"]


def test_podman_networks(tmp_path: Path) -> None:
    files = small(tmp_path)
    (tmp_path / "spec.dump").write_text('{"annotations": {"io.container.manager": "libpod"}}')
    interface = {"subnets": [{"ipnet": "10.88.0.2/16", "gateway": "10.88.0.1"}], "mac_address": "aa:bb:cc:dd:ee:ff"}
    (tmp_path / "network.status").write_text(json.dumps({"podman": {"interfaces": {"eth0": interface}}}))
    found = inspect(files).to_json()
    assert (found["ip"], found["mac"]) == ("10.88.0.2", "aa:bb:cc:dd:ee:ff")
    assert found["networks"] == [
        {
            "name": "podman",
            "interfaces": {"eth0": {"ip": "10.88.0.2/16", "mac": "aa:bb:cc:dd:ee:ff", "gateway": "10.88.0.1"}},
        }
    ]


@pytest.mark.parametrize("name", ["config.dump", "spec.dump"])
@pytest.mark.parametrize("text", ["[]", "{", "1", '"x"', "\ud800".encode("utf-16-le", "surrogatepass")])
def test_dumps_that_are_none(name: str, text: str | bytes, tmp_path: Path) -> None:
    files = small(tmp_path)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match=name):
        inspect(files)


@pytest.mark.parametrize(
    "spec",
    [
        {"annotations": 3, "mounts": {"a": 1}, "process": []},
        {"annotations": {"a": 1, "io.container.manager": ["x"]}, "mounts": [3, None], "process": {"args": "sh"}},
        {"annotations": {"io.container.manager": "cri-o", "io.kubernetes.cri-o.Metadata": "[1]"}},
    ],
)
def test_dumps_with_strange_values_are_shown_without_them(spec: dict[str, Any], tmp_path: Path) -> None:
    files = small(tmp_path)
    (tmp_path / "spec.dump").write_text(json.dumps(spec))
    (tmp_path / "config.dump").write_text('{"name": 4, "createdTime": 5, "id": null}')
    found = inspect(files).container
    assert (found.name, found.id, found.created, found.command) == ("", "", None, ())
    assert set(found.mounts) <= {Mount("", "", "")}


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ({"core__5_img": b"x" * 12}, r"core-5\.img is not a CRIU image"),
        ({"pstree_img": image("pstree", task(5), task(6, 5))}, r"has no checkpoint/core-6\.img"),
        ({"pstree_img": magic("pstree")}, "names no process"),
        ({"mm__5_img": magic("mm") + b"\x01"}, "the file ends before"),
    ],
)
def test_broken_images_are_named(images: dict[str, bytes], said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        inspect(small(tmp_path, **images))


# sources


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"0123")
    (tmp_path / "out").symlink_to("/etc")
    (tmp_path / "in").symlink_to("a")
    files: CheckpointFiles = LocalFiles(tmp_path)
    assert files.list("") == ["a/", "in", "out"] and files.list("a") == ["file"] and files.list("none") == ()
    assert files.size("a/file") == 4 and files.size("a") is None and files.size("none") is None
    assert files.read("a/file", 1, 2) == b"12" and files.read("in/file", 0, 4) == b"0123"
    assert files.size("out/passwd") is None and files.list("out") == ()
    with pytest.raises(NotFoundError):
        files.read("out/passwd", 0, 1)
    with pytest.raises(NotFoundError):
        files.read("none", 0, 1)
    with pytest.raises(FormatError, match="ends before byte 9"):
        files.read("a/file", 0, 9)


@pytest.mark.parametrize(
    "read", [lambda f, n: read_whole(f, "config.dump", n), lambda f, n: inspect(f, limits=Limits(dump_bytes=n))]
)
def test_the_size_of_dumps_is_bounded(read: Callable[[LocalFiles, int], Any], tmp_path: Path) -> None:
    files = small(tmp_path)
    (tmp_path / "config.dump").write_bytes(b'{"name": "x"}')
    read(files, 13)
    with pytest.raises(LimitExceeded, match=r"config\.dump has 13 bytes"):
        read(files, 12)


def test_images(tmp_path: Path) -> None:
    images: Images = open_images(small(tmp_path))
    assert images.read("none.img") is None
    with pytest.raises(FormatError, match=r"the checkpoint has no checkpoint/none\.img"):
        images.need("none.img")
    assert isinstance(inspect(images.files), Overview)
