"""`ckptfs pull` gives what an eager extraction by the real tools gives, in every format; after a failure, nothing."""

import gzip
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from ckptfs.bench.link import ShapedLink
from ckptfs.pull import contents
from tests.support import golden
from tests.support.blobs import TAR
from tests.support.command import Result, ckptfs, mounted
from tests.support.disks import disk_of
from tests.support.docker_registry import DockerRegistry
from tests.support.fake_registry import FakeRegistry, Flip
from tests.support.other_user import as_nobody
from tests.support.push import two_checkpoints
from tests.support.tars import END, header, member, pax
from tests.support.tools import require, run, wait_for
from tests.support.trees import layout_of, make_tree, tar_listing

CORPUS = Path(__file__).parents[1] / "data" / "corpus"
LAYOUTS = sorted(CORPUS.glob("*/*.oci"))
IDS = [f"{path.parent.name}-{path.stem}" for path in LAYOUTS]
COMPRESS = {"": bytes, "+gzip": gzip.compress, "+zstd": zstandard.ZstdCompressor().compress}


def pull(reference: object, target: Path, *options: object) -> Result:
    """A pull that must succeed, and leaves nothing else behind."""
    result = ckptfs("pull", reference, target, *options)
    assert result.code == 0, result.err
    assert not leftovers(target)
    return result


def leftovers(target: Path) -> list[str]:
    return [name for name in os.listdir(target.parent) if "partial" in name]


@pytest.mark.row("F1")
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_raw_equals_the_eager_extraction(layout: Path, tmp_path: Path) -> None:
    require(root=True)
    pull(f"oci:{layout}", tmp_path / "out", "--view", "raw")
    found = golden.whole_seconds(golden.directory_listing(tmp_path / "out"))
    assert found == golden.load(layout.with_suffix(".golden.json"))


@pytest.mark.fuse
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_a_view_equals_its_mount(layout: Path, tmp_path: Path) -> None:
    require("fusermount3", root=True)
    pull(f"oci:{layout}", tmp_path / "out")
    with mounted(f"oci:{layout}", tmp_path) as mount:
        assert golden.directory_listing(tmp_path / "out") == golden.directory_listing(mount.path)
        shown, pulled = os.lstat(mount.path), os.lstat(tmp_path / "out")
        fields = ("st_mode", "st_uid", "st_gid", "st_mtime_ns")
        assert [getattr(shown, field) for field in fields] == [getattr(pulled, field) for field in fields]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, golden.Listing]:
    """A tar of everything that a tar can hold, and what GNU tar makes of it."""
    require("tar", root=True)
    top = tmp_path_factory.mktemp("pull")
    (top / "tree").mkdir()
    make_tree(top / "tree", random.Random(7), modest=False)
    (top / "tree" / ".wh.gone").unlink()  # in a layer it says that something is not there
    packing = ("--format=pax", "--sparse", "--xattrs", "--xattrs-include=*", "--numeric-owner")
    run("tar", *packing, "-cf", top / "tree.tar", "-C", top / "tree", ".")
    return (top / "tree.tar").read_bytes(), tar_listing(top / "tree.tar", top / "extracted")


@pytest.mark.row("F1")
@pytest.mark.parametrize("suffix", COMPRESS)
def test_everything_that_a_tar_can_hold(suffix: str, tree: tuple[bytes, golden.Listing], tmp_path: Path) -> None:
    data, expected = tree
    with FakeRegistry() as registry:
        registry.add_image("repo", "1", [(TAR + suffix, COMPRESS[suffix](data))])
        pull(registry.reference("repo:1"), tmp_path / "out", "--view", "raw")
    assert golden.directory_listing(tmp_path / "out") == expected
    for name in ("all-hole", "hole-back", "many-holes"):
        assert (tmp_path / "out" / name).stat().st_blocks <= 60 * 8 + 16, name
    (tmp_path / "tree.tar").write_bytes(data)
    pull(f"archive:{tmp_path}/tree.tar", tmp_path / "again", "--view", "raw")
    assert golden.directory_listing(tmp_path / "again") == expected


def test_more_files_than_may_be_open(
    tree: tuple[bytes, golden.Listing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptfs.model.oci import Reference
    from ckptfs.pull import pull as write
    from ckptfs.settings import Settings
    from ckptfs.sources import open_source
    from ckptfs.telemetry import NetworkCounters

    monkeypatch.setattr(contents, "_OPEN", 0)
    (tmp_path / "tree.tar").write_bytes(tree[0])
    counters = NetworkCounters()
    source = open_source(Reference.parse(f"archive:{tmp_path}/tree.tar"), settings=Settings(), counters=counters)
    result = write(source, tmp_path / "out", lambda reference: source, counters, view="raw")
    assert golden.directory_listing(tmp_path / "out") == tree[1]
    assert result.files == sum(entry["type"] != "dir" for entry in tree[1]["entries"].values())


def test_what_was_pushed_comes_back(registry: DockerRegistry, tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    reference = registry.reference("pull/first:1")
    assert ckptfs("push", tmp_path / "first.tar", reference).code == 0
    facts = pull(reference, tmp_path / "out", "--json").json
    assert golden.directory_listing(tmp_path / "out") == tar_listing(tmp_path / "first.tar", tmp_path / "tar")
    assert facts["files"] == sum(
        entry["type"] == "file" for entry in golden.directory_listing(tmp_path / "tar")["entries"].values()
    )
    assert facts["layout"] == "flat" and facts["view"] == "checkpoint" and facts["omitted"] == 0
    assert 0 < facts["network"]["bytes"] <= 1.02 * facts["image_bytes"]
    (tmp_path / "empty").mkdir()
    said = pull(reference, tmp_path / "empty")
    assert said.out == "" and "wrote" in said.err and said.err.count("\n") == 1


# Never outside of the directory.


@pytest.mark.row("M2")
@pytest.mark.parametrize("suffix", COMPRESS)
def test_links_of_the_image_lead_nowhere(suffix: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("as it was")
    goal = os.fsencode(outside)
    first = [
        header(b"link", flag=b"2", link=goal),
        header(b"up", flag=b"2", link=b"../outside"),
        header(b"file", flag=b"2", link=goal + b"/victim"),
        header(b"loop", flag=b"2", link=b"loop"),
        header(b"dir", flag=b"5", mode=0o755),
    ]
    second = [
        member(b"link/new", b"through a link"),
        member(b"up/new", b"through a link"),
        member(b"file", b"instead of a link"),
        header(b"dir", flag=b"2", link=goal),
        header(b"hard", flag=b"1", link=b"link/new"),
    ]
    loop = member(b"loop/new", b"through a loop")
    layers = {"one": [[*first, *second]], "two": [first, [*second, loop]], "refused": [[*first, loop]]}
    with FakeRegistry() as registry:
        for name, made in layers.items():
            blobs = [(TAR + suffix, COMPRESS[suffix](b"".join(layer) + END)) for layer in made]
            registry.add_image(name, "1", blobs)
            if name != "refused":
                pull(registry.reference(f"{name}:1"), tmp_path / name, "--view", "raw")
                assert (tmp_path / name / "file").read_text() == "instead of a link"
                assert os.readlink(tmp_path / name / "dir") == str(outside)
        assert ckptfs("pull", registry.reference("refused:1"), tmp_path / "refused").code == 7
    inside = tmp_path / "one" / str(outside).lstrip("/")  # as podman unpacks it: the link's root is the layer's
    assert (inside / "new").read_text() == (tmp_path / "one" / "hard").read_text() == "through a link"
    assert os.readlink(tmp_path / "one" / "link") == str(outside)
    assert os.listdir(tmp_path / "one" / "outside") == ["new"]
    for name in ("link", "up", "loop"):
        assert (tmp_path / "two" / name / "new").is_file() and not (tmp_path / "two" / name).is_symlink()
    assert os.listdir(outside) == ["victim"] and (outside / "victim").read_text() == "as it was"


def test_tars_whose_directory_can_have_no_name(tmp_path: Path) -> None:
    """They stay files; every way to copy the image gives the others."""
    tar = member(b"f", b"data") + END
    names = (b".tar", b"..tar", b"...tar", b"x.tar")
    files = [member(b"checkpoint/inventory.img"), *(member(b"volumes/" + name, tar) for name in names)]
    with FakeRegistry() as registry:
        registry.add_image("repo", "1", [(TAR, b"".join(files) + END)])
        reference = registry.reference("repo:1")
        pull(reference, tmp_path / "pulled")
        copied = ckptfs("cp", reference, "/", tmp_path / "copied", "--cache-dir", tmp_path / "cache")
    assert copied.code == 0, copied.err
    for way in ("pulled", "copied"):
        assert sorted(os.listdir(tmp_path / way / "volumes")) == sorted(["x", *map(os.fsdecode, names)])
        assert (tmp_path / way / "volumes" / "x" / "f").read_text() == "data"


@pytest.mark.parametrize("name", [b"../out", b"a/../../out", b"../../../../../../../tmp/out"])
def test_names_that_lead_outside_are_refused(name: bytes, tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        registry.add_image("repo", "1", [(TAR, member(name, b"data") + END)])
        result = ckptfs("pull", registry.reference("repo:1"), tmp_path / "out")
    assert result.code == 7 and not os.listdir(tmp_path)


# What fails leaves nothing.


def failed(tmp_path: Path, *arguments: object) -> Result:
    before = os.listdir(tmp_path)
    result = ckptfs("pull", *arguments)
    assert result.code != 0 and len(result.line) > 0
    assert os.listdir(tmp_path) == before
    return result


@pytest.mark.row("N2")
@pytest.mark.parametrize("suffix", ["", "+gzip", "+zstd"])
def test_a_wrong_byte_is_found_out(suffix: str, tmp_path: Path) -> None:
    layer = COMPRESS[suffix](member(b"file", random.Random(1).randbytes(3_000_000)) + END)
    with FakeRegistry({("blobs/", None): Flip(12_000_000)}) as registry:
        registry.add_image("repo", "1", [(TAR + suffix, layer)])
        # -q: without it, it is also told who sent the wrong bytes at first
        result = failed(tmp_path, registry.reference("repo:1"), tmp_path / "out", "--view", "raw", "-q")
    assert result.code == 6 and "digest" in result.line


@pytest.mark.row("N2")
@pytest.mark.parametrize("size", [0, 8192, 200_000, 3_000_000])
def test_a_wrong_byte_of_a_plain_tar_on_disk(size: int, tmp_path: Path) -> None:
    """A small layer is all that its scan reads; one without bytes of files still has names."""
    layer = header(b"link", flag=b"2", link=b"elsewhere") + member(b"file", bytes(size)) + END
    reference = f"oci:{layout_of(layer, tmp_path)}"
    blob = max((tmp_path / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(layer[:-300] + b"x" + layer[-299:])
    result = failed(tmp_path, reference, tmp_path / "out", "--view", "raw", "-q")
    assert result.code == 6 and "digest" in result.line


@pytest.mark.row("N2")
def test_what_was_wrong_when_names_were_read(tmp_path: Path) -> None:
    """The names of a plain tar come from its scan, which may have been told something else than the stream."""
    layer = pax([(b"path", b"name")]) + member(b"short", b"data") + END
    bit = layer.index(b"path=name") * 8 + 5 * 8
    with FakeRegistry() as registry:
        digest = registry.add_blob(layer)
        registry.add_image("repo", "1", [(TAR, layer)])
        registry.script[f"blobs/{digest}", 1] = Flip(bit)
        result = failed(tmp_path, registry.reference("repo:1"), tmp_path / "out", "--view", "raw", "-q")
    assert result.code == 6 and "names were read" in result.line


@pytest.mark.row("N1")
def test_a_wrong_chunk_is_asked_for_again(tmp_path: Path) -> None:
    layout = CORPUS / "counter" / "k8s-zstdchunked.oci"
    with FakeRegistry({("blobs/", 2): Flip()}) as registry:
        registry.add_layout(layout, "repo")
        (tag,) = {tag for _, tag in registry.manifests if not tag.startswith("sha256")} or {""}
        reference = registry.reference(f"repo:{tag}") if tag else registry.reference(f"repo@{_digest(registry)}")
        pull(reference, tmp_path / "out", "--view", "raw")
    assert golden.whole_seconds(golden.directory_listing(tmp_path / "out")) == golden.load(
        layout.with_suffix(".golden.json")
    )


def _digest(registry: FakeRegistry) -> str:
    return next(tag for _, tag in registry.manifests)


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("full", 2, "is not empty"),
        ("full/file", 2, "no directory"),
        ("missing/out", 2, "mkdir -p"),
        ("two  words/out", 2, "two  words'"),
        ("link", 2, "no directory"),
        ("full/file/out", 2, "out"),
        ("/", 2, "/"),
        ("/proc", 2, "mount point"),
        ("/proc/out", 8, "cannot write"),
    ],
)
def test_where_it_cannot_be_written(target: str, code: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "link").symlink_to("full")
    result = failed(tmp_path, f"oci:{LAYOUTS[0]}", tmp_path / target)
    assert (result.code, words in result.line) == (code, True), result.line


def test_not_to_where_one_stands(tmp_path: Path) -> None:
    """The new directory would take the name of the one that the user stays in, which is nowhere then."""
    done = ckptfs("pull", f"oci:{LAYOUTS[0]}", ".", cwd=tmp_path)
    assert (done.code, done.out) == (2, "") and "is where you are" in done.line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("reference", "code"),
    [("oci:{tmp}/nowhere", 3), ("localhost:1/a:b", 5), ("nonsense", 2), ("{registry}/pull/nowhere:1", 3)],
)
def test_what_cannot_be_pulled(reference: str, code: int, registry: DockerRegistry, tmp_path: Path) -> None:
    filled = reference.format(tmp=tmp_path, registry=registry.host)
    assert failed(tmp_path, filled, tmp_path / "out").code == code


def test_a_full_disk(tmp_path: Path) -> None:
    with disk_of(tmp_path / "small", "size=300k") as small:
        result = failed(small, f"oci:{CORPUS}/counter/k8s-zstdchunked.oci", small / "out")
        assert result.code == 8 and "No space left" in result.line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_leaves_nothing(number: signal.Signals, registry: DockerRegistry, tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    assert ckptfs("push", tmp_path / "first.tar", registry.reference("pull/slow:1")).code == 0
    into = tmp_path / "into"
    into.mkdir()
    with ShapedLink(registry.host, rtt=0.02, rate=2e6) as link:
        command = (sys.executable, "-m", "ckptfs", "pull", f"{link.address}/pull/slow:1", into / "out")
        with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
            wait_for("the pull to begin", lambda: link.stats().bytes_down > 300_000)
            assert leftovers(into / "out")
            process.send_signal(number)
            _, said = process.communicate(timeout=10)
    assert (process.returncode, said.strip()) == (130, "ckptfs: interrupted")
    assert os.listdir(into) == []


# For users who are not root.


def test_another_user_gets_what_is_allowed(tree: tuple[bytes, golden.Listing], tmp_path: Path) -> None:
    require("setpriv", "unshare", root=True)
    folder = Path("/var/tmp") / f"pull-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "tree.tar").write_bytes(tree[0])
        script = f"ckptfs pull archive:{folder}/tree.tar out --view raw && find out -printf '%u %y %m\\n'"
        done = as_nobody("sh", "-c", script, fuse=True)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert {user for user, _, _ in lines} == {"nobody"}
        assert not any(int(mode, 8) & 0o6000 for _, _, mode in lines)
        assert {kind for _, kind, _ in lines} == set("dflp")
        assert "left out: the device block: Operation not permitted" in done.stderr
        assert "security.capability of many-holes" in done.stderr
    finally:
        run("rm", "-r", folder)


def test_the_help_has_an_example() -> None:
    assert "ckptfs pull " in ckptfs("pull", "--help").out
