"""From a checkpoint to an image: the same one whatever the source, complete, and never half of it."""

import base64
import gzip
import json
import os
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ckptfs.errors import FormatError, IntegrityError, NotFoundError, UnavailableError
from ckptfs.layers import open_indexed
from ckptfs.model.blob import Blob
from ckptfs.model.index import decode_index
from ckptfs.model.oci import OCI_MANIFEST, Descriptor, Digest
from ckptfs.push import Progress, PushOptions, open_checkpoint, push
from ckptfs.push.layout_target import LayoutTarget
from ckptfs.push.target import Sent
from ckptfs.settings import Settings
from ckptfs.sources.layout import LayoutSource
from tests.support.blobs import TAR, ScannedLayer, blob_of
from tests.support.command import ckptfs
from tests.support.golden import Listing, directory_listing
from tests.support.push import DATA, layer_blob, manifest_of, push_to_layout, tree_images, unpacked
from tests.support.tars import END, header, tar_of
from tests.support.tools import require, run
from tests.support.trees import layout_with

CONFIG = {
    "id": "c1",
    "name": "web",
    "runtime": "crun",
    "rootfsImageName": "docker.io/library/nginx:1",
    "rootfsImage": "nginx",
}


def checkpoint(top: Path) -> Path:
    """A flat checkpoint with a pre-dump parent, made of the corpus's process tree; times are whole seconds."""
    folder = top / "flat"
    images = folder / "checkpoint"
    folder.mkdir()
    tree_images(images)
    shutil.copytree(images, folder / "pre-checkpoint")
    (images / "parent").symlink_to("../pre-checkpoint")
    (images / "ghost-file-1.img").write_bytes(b"ghost")
    (images / "descriptors.json").write_text("[]")
    (folder / "config.dump").write_text(json.dumps(CONFIG))
    (folder / "spec.dump").write_text(json.dumps({"annotations": {"io.container.manager": "cri-o"}}))
    (folder / "rootfs-diff.tar").write_bytes(bytes(10240))
    (folder / "deleted.files").write_text('["/gone"]')
    (folder / "dump.log").write_text("(00.000) hello\n")
    (folder / "artifacts").mkdir()
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (1_700_000_000, 1_700_000_000), follow_symlinks=False)
    return folder


def extracted(layout: Path, tag: str, into: Path) -> Listing:
    into.mkdir()
    for layer in manifest_of(layout, tag).layers:
        tar = unpacked(layer_blob(layout, layer).data)
        subprocess.run(["tar", "-xpf", "-", "-C", into], input=tar, check=True)
    return directory_listing(into)


def notes(layout: Path) -> dict[str, str]:
    return dict(manifest_of(layout).annotations)


def test_the_image_is_the_checkpoint(tmp_path: Path) -> None:
    require("tar")
    folder = checkpoint(tmp_path)
    push_to_layout(folder, tmp_path / "layout")
    assert extracted(tmp_path / "layout", "latest", tmp_path / "out") == directory_listing(folder)


def test_every_source_gives_the_same_image(tmp_path: Path) -> None:
    """Directory, archives in three compressions, an image of ours, an archive named as the kubelet names it."""
    require("tar", "gzip", "zstd")
    folder, layout = checkpoint(tmp_path), tmp_path / "layout"
    names = sorted(path.name for path in folder.iterdir())
    run("tar", "-cf", tmp_path / "a.tar", "-C", folder, *names)
    run("gzip", "-k", tmp_path / "a.tar")
    run("zstd", "-q", tmp_path / "a.tar")
    first = push_to_layout(folder, layout)
    assert first.sent == sum(d.size for d in manifest_of(layout).layers) + manifest_of(layout).config.size
    archives = [tmp_path / f"a.tar{suffix}" for suffix in ("", ".gz", ".zst")]
    for source in (folder, *archives, f"archive:{archives[0]}", f"oci:{layout}:latest"):
        again = push_to_layout(source, layout, "again")
        assert again.manifest == first.manifest
        assert again.sent == 0
        assert again.present == first.sent


def test_foreign_formats_give_the_same_image(tmp_path: Path) -> None:
    """One checkpoint, pushed by buildah in two formats and converted by stargz's tools."""
    corpus = DATA / "corpus/counter"
    found = {
        push_to_layout(f"oci:{corpus}/{name}.oci:latest", tmp_path / "layout", name).manifest.digest
        for name in ("k8s-zstd", "k8s-zstdchunked", "k8s-estargz64k", "k8s-stargz-zstdchunked")
    }
    assert len(found) == 1


@pytest.mark.parametrize("size", [0, 2])
def test_an_image_without_a_config_is_a_source(size: int, tmp_path: Path) -> None:
    """Artifacts have none, or the empty one of the image-spec, whose bytes are known and need not be anywhere."""
    layout = tmp_path / "from"
    shutil.copytree(DATA / "corpus/counter/k8s-zstdchunked.oci", layout)
    first = push_to_layout(f"oci:{layout}", tmp_path / "layout", "first")
    found = manifest_of(layout)
    config = Descriptor("application/vnd.oci.empty.v1+json", Digest.of(b"{}"[:size]), size)
    document = {**json.loads(found.raw), "config": config.to_json(), "artifactType": "application/x.checkpoint"}
    raw = json.dumps(document).encode()
    entry = {"mediaType": OCI_MANIFEST, "digest": str(Digest.of(raw)), "size": len(raw)}
    (layout / "blobs" / "sha256" / Digest.of(raw).hex).write_bytes(raw)
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    again = push_to_layout(f"oci:{layout}", tmp_path / "layout", "again")
    assert again.manifest == first.manifest


@pytest.mark.row("N2")
@pytest.mark.parametrize("media_type", [TAR, f"{TAR}+gzip"])
def test_a_wrong_byte_of_the_source_gets_no_right_digest(media_type: str, tmp_path: Path) -> None:
    images = tree_images(tmp_path / "images").iterdir()
    files = {f"checkpoint/{path.name}": path.read_bytes() for path in images}
    tar = tar_of({**files, "checkpoint/pages-9.img": b"A" * 8192})
    pack = bytes if media_type == TAR else partial(gzip.compress, compresslevel=0, mtime=0)
    blob = blob_of(pack(tar), media_type)
    source = layout_with(tmp_path / "source", [blob])
    push_to_layout(f"oci:{source}:latest", tmp_path / "layout")
    wrong = pack(tar.replace(b"A" * 8192, b"A" * 8191 + b"Z"))
    (source / "blobs" / str(blob.descriptor.digest).replace(":", "/")).write_bytes(wrong)
    assert len(wrong) == blob.size
    with pytest.raises(IntegrityError, match="arrived with digest"):
        push_to_layout(f"oci:{source}:latest", tmp_path / "none")
    assert not (tmp_path / "none" / "index.json").exists()


def test_roles_and_layers(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    result = push_to_layout(checkpoint(tmp_path), layout)
    layers: dict[str, set[str]] = {}
    for layer in result.layers:
        role = layer.descriptor.annotations["dev.ckptfs.role"]
        names = [os.fsdecode(file.path) for file in layer.files]
        old = all(name.startswith("pre-checkpoint/") for name in names)
        assert layers.setdefault(role + (" of the parent" if old else ""), set()) == set()
        layers[role + (" of the parent" if old else "")] = set(names)
    assert set(layers) == {
        "meta",
        "data",
        "pages",
        "rootfs-diff",
        "meta of the parent",
        "pages of the parent",
    }
    assert {"config.dump", "spec.dump", "checkpoint/inventory.img", "checkpoint/descriptors.json"} <= layers["meta"]
    assert layers["data"] == {"dump.log", "checkpoint/ghost-file-1.img"}
    assert layers["rootfs-diff"] == {"rootfs-diff.tar", "deleted.files"}
    assert all("pages-" in name for name in layers["pages"])


def test_each_layer_has_the_directories_above_its_files(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    folder = checkpoint(tmp_path)
    (folder / "checkpoint").chmod(0o711)
    push_to_layout(folder, layout)
    for descriptor in manifest_of(layout).layers:
        entries = ScannedLayer.of(layer_blob(layout, descriptor)).entries
        seen = {}
        for entry in entries:
            above = entry.path.rpartition(b"/")[0]
            assert not above or above in seen
            seen[entry.path] = entry.inode
        if seen.get(b"checkpoint"):
            assert seen[b"checkpoint"].mode == 0o40711


def test_a_large_pages_file_has_a_layer_of_its_own(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "checkpoint" / "pages-77.img").write_bytes(os.urandom(4 << 20))
    result = push_to_layout(folder, tmp_path / "layout")
    alone = [layer for layer in result.layers if [f.path for f in layer.files] == [b"checkpoint/pages-77.img"]]
    assert len(alone) == 1


def test_annotations_say_that_it_is_a_checkpoint(tmp_path: Path) -> None:
    push_to_layout(checkpoint(tmp_path), tmp_path / "layout")
    found = notes(tmp_path / "layout")
    assert found["org.criu.checkpoint.container.name"] == "web"
    assert found["io.kubernetes.cri-o.annotations.checkpoint.name"] == "web"
    assert found["io.podman.annotations.checkpoint.runtime.name"] == "crun"
    assert found["org.criu.checkpoint.engine.name"] == "CRI-O"
    assert found["org.criu.checkpoint.rootfsImageName"] == "docker.io/library/nginx:1"
    assert found["org.opencontainers.image.base.name"] == "docker.io/library/nginx:1"
    assert found["dev.ckptfs.version"]
    assert "io.podman.annotations.checkpoint.name" not in found


def test_annotations_of_podman(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "spec.dump").write_text('{"annotations":{"io.container.manager":"libpod"}}')
    (folder / "config.dump").write_text(json.dumps({**CONFIG, "rootfsImageID": "ab12", "RawImageName": "nginx"}))
    push_to_layout(folder, tmp_path / "layout")
    found = notes(tmp_path / "layout")
    assert found["org.criu.checkpoint.engine.name"] == "Podman"
    assert found["io.podman.annotations.checkpoint.name"] == "web"
    assert found["io.podman.annotations.checkpoint.rawImageName"] == "nginx"
    assert found["io.podman.annotations.checkpoint.rootfsImageID"] == "ab12"


def test_annotations_of_containerd_and_its_base_digest(tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    folder = checkpoint(tmp_path)
    spec = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-name": "pod1"}
    (folder / "spec.dump").write_text(json.dumps({"annotations": spec}))
    (folder / "config.dump").write_text(json.dumps({**CONFIG, "rootfsImageRef": f"nginx@{digest}"}))
    push_to_layout(folder, tmp_path / "layout")
    found = notes(tmp_path / "layout")
    assert found["org.criu.checkpoint.engine.name"] == "containerd"
    assert found["org.criu.checkpoint.pod.name"] == "pod1"
    assert found["org.opencontainers.image.base.digest"] == digest


def test_the_annotations_of_the_source_are_kept(tmp_path: Path) -> None:
    source = DATA / "corpus/counter/k8s-zstd.oci"
    push_to_layout(f"oci:{source}:latest", tmp_path / "layout")
    found = notes(tmp_path / "layout")
    assert found["io.kubernetes.cri-o.annotations.checkpoint.name"] == "counter"
    assert all(found.values())


def test_a_plain_directory_of_images_becomes_checkpoint(tmp_path: Path) -> None:
    folder = tree_images(tmp_path / "images")
    result = push_to_layout(folder, tmp_path / "layout")
    paths = [file.path for layer in result.layers for file in layer.files]
    assert b"checkpoint/inventory.img" in paths
    assert all(path.startswith(b"checkpoint/") for path in paths)
    assert notes(tmp_path / "layout")["org.criu.checkpoint.container.name"] == "checkpoint"


@pytest.mark.parametrize(("first", "second"), [("d/x", "z/y"), ("a/y", "z/x")])
def test_a_hard_link_comes_after_its_file(first: str, second: str, tmp_path: Path) -> None:
    """z/ becomes checkpoint/, so the order of the paths is another one than in the source."""
    require("tar")
    (tmp_path / "images").mkdir()
    tree_images(tmp_path / "images" / "z")
    for path in (tmp_path / "images" / first, tmp_path / "images" / second):
        path.parent.mkdir(exist_ok=True)
    (tmp_path / "images" / first).write_text("hello")
    os.link(tmp_path / "images" / first, tmp_path / "images" / second)
    push_to_layout(tmp_path / "images", tmp_path / "layout")
    extracted(tmp_path / "layout", "latest", tmp_path / "out")
    paths = [tmp_path / "out" / first, tmp_path / "out" / second.replace("z/", "checkpoint/")]
    assert [path.read_text() for path in paths] == ["hello", "hello"] and os.path.samefile(*paths)


def test_times_beyond_the_year_9999(tmp_path: Path) -> None:
    seconds = 1 << 39
    inventory = header(b"checkpoint/inventory.img", 0, mtime=seconds)
    (tmp_path / "a.tar").write_bytes(inventory + header(b"old", 0, mtime=-seconds) + END)
    push_to_layout(tmp_path / "a.tar", tmp_path / "layout")
    for source in (f"archive:{tmp_path}/a.tar", f"oci:{tmp_path}/layout"):
        words = ("-R", source, "--cache-dir", tmp_path / "cache")
        listed = ckptfs("ls", "-l", *words)
        assert (listed.code, listed.err) == (0, "")
        assert " 9999-12-31 23:59 checkpoint/inventory.img\n" in listed.out and " 0001-01-01 00:00 old\n" in listed.out
        times = {entry["name"]: entry["mtime"] for entry in ckptfs("ls", "--json", *words).json}
        assert times["checkpoint/inventory.img"] == seconds and times["old"] == -seconds


def test_the_index_says_what_the_layers_say(tmp_path: Path) -> None:
    """The same entries and extents as each layer's own table of contents, and the content of all metadata."""
    layout = tmp_path / "layout"
    folder = checkpoint(tmp_path)
    push_to_layout(folder, layout)
    manifest = manifest_of(layout)
    index = decode_index(base64.b64decode(manifest.annotations["dev.ckptfs.index"]))
    assert [layer.digest for layer in index.layers] == [layer.digest for layer in manifest.layers]
    for descriptor, layer in zip(manifest.layers, index.layers, strict=True):
        blob = layer_blob(layout, descriptor)
        scanned, opened = ScannedLayer.of(blob), open_indexed(blob, 0, Settings(), layer.chunk_digest)
        told = {entry.path: entry for entry in scanned.entries}
        assert [entry.path for entry in layer.entries] == list(told)
        for file in layer.files:
            inode, other = file.entry.inode, told[file.entry.path].inode
            assert inode is not None
            assert other is not None
            assert (inode.mode, inode.size, inode.mtime_ns) == (other.mode, other.size, other.mtime_ns)
            if inode.is_file:
                data = (folder / os.fsdecode(file.entry.path)).read_bytes()
                assert scanned.read(other) == data
                for start, length, chunk, _ in inode.extents:
                    encoded = memoryview(blob.read_at(chunk.offset, chunk.size))
                    assert opened.decode(chunk, encoded) == data[start : start + length]
    files = {file.entry.path: file for layer in index.layers for file in layer.files}
    for name in ("checkpoint/inventory.img", "checkpoint/pstree.img", "config.dump", "spec.dump"):
        assert files[name.encode()].content == (folder / name).read_bytes()
    assert files[b"checkpoint/pages-1.img"].eager is not None
    assert files[b"checkpoint/pages-1.img"].content is None


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    steps: list[Progress] = []
    options = PushOptions()
    folder = checkpoint(tmp_path)
    with open_checkpoint(str(folder), LayoutSource, options) as found:
        push(found, LayoutTarget(tmp_path / "layout"), "x", options, steps.append)
    last = steps[-1]
    assert (
        last.read
        == last.total
        == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    )
    assert last.sent == last.to_send
    assert [step.read for step in steps] == sorted(step.read for step in steps)


class Refusing(LayoutTarget):
    """A layout whose `allowed` first blobs are taken, the others not."""

    allowed = 2

    def put_blob(self, descriptor: Descriptor, blob: Blob, sent: Sent) -> None:
        self.allowed -= 1
        if self.allowed < 0:
            raise UnavailableError("no")
        super().put_blob(descriptor, blob, sent)


def test_what_a_killed_push_has_left_is_removed(tmp_path: Path) -> None:
    """And not what another one may be writing."""
    folder = tmp_path / "layout" / "blobs" / "sha256"
    folder.mkdir(parents=True)
    for name, age in ((".part-dead", 7200), (".part-alive", 60)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    push_to_layout(checkpoint(tmp_path), tmp_path / "layout")
    assert [path.name for path in folder.glob(".part-*")] == [".part-alive"]


def test_a_push_that_fails_publishes_nothing_and_is_resumed(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    folder = checkpoint(tmp_path)
    with pytest.raises(UnavailableError):
        push_to_layout(folder, layout, target=Refusing(layout))
    assert not (layout / "index.json").exists()
    assert not [path for path in layout.rglob("*") if path.name.startswith(".part-")]
    there = sum(path.stat().st_size for path in (layout / "blobs/sha256").iterdir())
    assert there
    result = push_to_layout(folder, layout)
    assert result.present == there


def test_a_tag_moves_and_the_other_tags_stay(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    folder = checkpoint(tmp_path)
    first = push_to_layout(folder, layout, "a")
    push_to_layout(folder, layout, "b")
    (folder / "dump.log").write_text("another")
    second = push_to_layout(folder, layout, "a")
    assert manifest_of(layout, "a").digest == second.manifest.digest
    assert manifest_of(layout, "b").digest == first.manifest.digest


def test_nothing_is_left_in_the_work_directory(tmp_path: Path) -> None:
    require("tar", "zstd")
    folder = checkpoint(tmp_path)
    run("tar", "--zstd", "-cf", tmp_path / "a.tar.zst", "-C", folder, ".")
    work = tmp_path / "work"
    work.mkdir()
    options = PushOptions(work=work)
    with open_checkpoint(str(tmp_path / "a.tar.zst"), LayoutSource, options) as found:
        push(found, LayoutTarget(tmp_path / "layout"), "x", options)
        assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda top: top / "missing", NotFoundError, "there is no"),
        (lambda top: "nonsense", NotFoundError, "there is no nonsense"),
        (lambda top: _file(top, b""), FormatError, "too short for a tar"),
        (lambda top: _file(top, b"no tar at all" * 100), FormatError, "tar"),
        (lambda top: top / "empty", FormatError, "is empty"),
        (lambda top: _other(top), FormatError, "no checkpoint"),
        (lambda top: _broken_config(top), FormatError, "config.dump is not JSON"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, make: Any, error: type[Exception], message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        push_to_layout(make(tmp_path), tmp_path / "layout")
    assert not (tmp_path / "layout" / "index.json").exists()


def _file(top: Path, data: bytes) -> Path:
    (top / "file.tar").write_bytes(data)
    return top / "file.tar"


def _other(top: Path) -> Path:
    (top / "other").mkdir()
    (top / "other" / "file").write_text("x")
    return top / "other"


def _broken_config(top: Path) -> Path:
    folder = checkpoint(top)
    (folder / "config.dump").write_text("{")
    return folder


def test_a_pagemap_that_does_not_fit_leaves_the_grid(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    pages = folder / "checkpoint" / "pages-1.img"
    pages.write_bytes(os.urandom(600_000))
    result = push_to_layout(folder, tmp_path / "layout")
    (file,) = (f for layer in result.layers for f in layer.files if f.path == b"checkpoint/pages-1.img")
    assert list(file.chunks.lengths) == [262144, 262144, 75712]


def test_a_large_file_has_its_columns_in_the_layer(tmp_path: Path) -> None:
    """More than 2048 chunks: the table is in a skippable frame, and still a tar comes out."""
    from ckptfs.layers.zstd_chunked_writer import Member, write_layer
    from ckptfs.model.index import IndexedFile, load_table
    from ckptfs.model.toc import Entry, Inode

    out = bytearray()
    data = os.urandom(4096) * 8200
    member = Member(b"p", Inode(0o100600, size=len(data)), payload=_payload(data), cuts=lambda: [(4096,)] * 8200)
    layer = write_layer([member], out.extend)
    (file,) = layer.files
    assert file.chunk_table is not None
    inode = Inode(0o100600, size=len(data))
    indexed = IndexedFile(Entry(b"p", inode), file.offset, table=file.chunk_table)
    table = file.chunk_table
    load_table(indexed, bytes(out[table.offset : table.offset + table.size]), 0, len(out))
    assert [e.chunk.offset for e in inode.extents] == [e.chunk.offset for e in file.extents(0)]
    extent = inode.extents[8199]
    frame = bytes(out[extent.chunk.offset : extent.chunk.offset + extent.chunk.size])
    assert zstandard.ZstdDecompressor().decompress(frame) == data[:4096]
    assert unpacked(bytes(out))[512 : 512 + len(data)] == data


def _payload(data: bytes) -> Any:
    import io

    return lambda: io.BytesIO(data)
