"""R: the base image's layers and the delta as one more, with whiteouts."""

import gzip
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ckptfs.errors import FormatError, UsageError
from ckptfs.layers.zstd_chunked_writer import Member, write_layer
from ckptfs.model.blob import MemoryBlob
from ckptfs.model.oci import OCI_MANIFEST, Descriptor, Digest, Manifest, Reference
from ckptfs.model.toc import Inode
from ckptfs.model.tree import Tree
from ckptfs.pull import pull
from ckptfs.push.layout_target import LayoutTarget
from ckptfs.sources.layout import LayoutSource
from ckptfs.telemetry import NetworkCounters
from tests.support.blobs import ScannedLayer
from tests.support.push import layer_blob, manifest_of, push_to_layout, tree_images
from tests.support.tars import END, header, member, tar_of

BASE: dict[bytes, Inode] = {
    b"data": Inode(0o40751, 5, 6),
    b"opt": Inode(0o40755),
    b"opt/app": Inode(0o42750, 7, 8),
    b"opt/app/stale": Inode(0o100644),
    b"srv": Inode(0o40711),
    b"srv/gone.txt": Inode(0o100644),
    b"srv/gonedir": Inode(0o40755),
    b"srv/gonedir/deep": Inode(0o100644),
    b"srv/stays": Inode(0o100600),
    b"tmp": Inode(0o41777),
    b"tmp/replaced": Inode(0o100600),
}


def put_base(layout: Path) -> Manifest:
    """A base image `base` of one layer, by Docker's media type."""
    target = LayoutTarget(layout)
    out = bytearray()
    layer = write_layer((Member(path, inode) for path, inode in BASE.items()), out.extend)
    tar = gzip.compress(_untarred(bytes(out)), mtime=0)
    blob = Descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip", Digest.of(tar), len(tar))
    config_raw = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/app"]},
            "rootfs": {"type": "layers", "diff_ids": [str(layer.diff_id)]},
            "history": [{"created_by": "someone"}],
        }
    ).encode()
    config = Descriptor("application/vnd.oci.image.config.v1+json", Digest.of(config_raw), len(config_raw))
    for descriptor, data in ((blob, tar), (config, config_raw)):
        target.put_blob(descriptor, MemoryBlob(descriptor, data), lambda count: None)
    raw = json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config.to_json(), "layers": [blob.to_json()]}
    ).encode()
    target.put_manifest(raw, OCI_MANIFEST, "base")
    return manifest_of(layout, "base")


def _untarred(layer: bytes) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(layer, read_across_frames=True).read()


def checkpoint(top: Path, delta: bytes | None, deleted: Any = None) -> Path:
    folder = top / "flat"
    folder.mkdir()
    tree_images(folder / "checkpoint")
    if delta is not None:
        (folder / "rootfs-diff.tar").write_bytes(delta)
    if deleted is not None:
        (folder / "deleted.files").write_text(json.dumps(deleted))
    return folder


def merged(layout: Path, manifest: Manifest) -> Tree:
    tree = Tree()
    for rank, descriptor in enumerate(manifest.layers, start=1):
        tree.begin(rank)
        tree.add(ScannedLayer.of(layer_blob(layout, descriptor)).entries, rank)
        tree.finish(rank)
    return tree


def config_of(layout: Path, manifest: Manifest) -> Any:
    return json.loads(layer_blob(layout, manifest.config).data)


DELTA = {"data/new": b"new\n", "opt/app/fresh": b"fresh\n", "tmp/replaced": b"again\n", "etc/x": b"x"}
DELETED = ["/opt/app", "/srv/gone.txt", "/srv/gonedir", "/tmp/replaced"]


@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["tar", "gzip"])
def test_base_and_delta_make_the_root(packed: Callable[[bytes], bytes], tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    base = put_base(layout)
    result = push_to_layout(
        checkpoint(tmp_path, packed(tar_of(DELTA)), DELETED), layout, "ck", base=f"oci:{layout}:base"
    )
    root = manifest_of(layout, "ck-rootfs")
    assert result.rootfs is not None
    assert result.rootfs.digest == root.digest
    image = manifest_of(layout, "ck")
    assert image.annotations["dev.ckptfs.rootfs.digest"] == str(root.digest)
    assert image.annotations["org.opencontainers.image.base.digest"] == str(base.digest)
    assert root.annotations["org.opencontainers.image.base.digest"] == str(base.digest)
    assert [layer.digest for layer in root.layers[:-1]] == [layer.digest for layer in base.layers]
    assert root.layers[0].media_type == "application/vnd.oci.image.layer.v1.tar+gzip"

    tree = merged(layout, root)
    found = {node.path: node.inode for node in tree.walk() if node.path and node.inode}
    gone = {b"opt/app/stale", b"srv/gone.txt", b"srv/gonedir", b"srv/gonedir/deep"}
    assert set(found) == (set(BASE) | {os.fsencode(name) for name in DELTA} | {b"etc"}) - gone
    for path in (b"data", b"opt", b"opt/app", b"srv", b"tmp"):  # the delta's tar has no directories: the base's count
        assert (found[path].mode, found[path].uid, found[path].gid) == (
            BASE[path].mode,
            BASE[path].uid,
            BASE[path].gid,
        )
    assert found[b"etc"].mode == 0o40755
    assert found[b"tmp/replaced"].size == 6


def test_the_config_has_one_more_diff_id(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    base = put_base(layout)
    push_to_layout(checkpoint(tmp_path, tar_of(DELTA), DELETED), layout, "ck", base=f"oci:{layout}:base")
    root = manifest_of(layout, "ck-rootfs")
    config, before = config_of(layout, root), config_of(layout, base)
    assert config["rootfs"]["diff_ids"][:1] == before["rootfs"]["diff_ids"]
    tar = _untarred(layer_blob(layout, root.layers[-1]).data)
    assert config["rootfs"]["diff_ids"][1:] == ["sha256:" + hashlib.sha256(tar).hexdigest()]
    assert config["config"] == before["config"]
    assert len(config["history"]) == 2


def test_twice_gives_the_same_and_sends_nothing(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    put_base(layout)
    folder = checkpoint(tmp_path, tar_of(DELTA), DELETED)
    first = push_to_layout(folder, layout, "ck", base=f"oci:{layout}:base")
    again = push_to_layout(folder, layout, "ck", base=f"oci:{layout}:base")
    assert (again.manifest, again.rootfs, again.sent) == (first.manifest, first.rootfs, 0)


def test_a_gzip_layer_of_containerd_is_taken_bit_for_bit(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    put_base(layout)
    tar = tar_of({"srv/.wh.gone.txt": b"", "data/new": b"new\n"})
    delta = gzip.compress(tar)
    push_to_layout(checkpoint(tmp_path, delta), layout, "ck", base=f"oci:{layout}:base")
    root = manifest_of(layout, "ck-rootfs")
    assert root.layers[-1].digest == Digest.of(delta)
    assert root.layers[-1].media_type.endswith("+gzip")
    assert config_of(layout, root)["rootfs"]["diff_ids"][-1] == str(Digest.of(tar))
    tree = merged(layout, root)
    assert tree.find(b"srv/gone.txt") is None
    assert tree.find(b"data/new") is not None


@pytest.mark.parametrize("packed", [bytes, gzip.compress, zstandard.compress], ids=["tar", "gzip", "zstd"])
def test_whiteouts_of_a_delta_stay_whiteouts(packed: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """In whatever the layer is packed: the pushed root and the view of it agree."""
    layout = tmp_path / "layout"
    put_base(layout)
    delta = packed(tar_of({"srv/.wh.gone.txt": b"", "opt/app/.wh..wh..opq": b"", "opt/app/fresh": b"fresh\n"}))
    push_to_layout(checkpoint(tmp_path, delta), layout, "ck", base=f"oci:{layout}:base")
    expected = (set(BASE) | {b"opt/app/fresh"}) - {b"srv/gone.txt", b"opt/app/stale"}
    root = merged(layout, manifest_of(layout, "ck-rootfs"))
    assert {node.path for node in root.walk() if node.path and node.inode} == expected
    source, base = (LayoutSource(Reference.parse(f"oci:{layout}:{tag}")) for tag in ("ck", "base"))
    pull(source, tmp_path / "view", LayoutSource, NetworkCounters(), view="rootfs", base=base.reference)
    assert {os.fsencode(path.relative_to(tmp_path / "view")) for path in (tmp_path / "view").rglob("*")} == expected


def test_only_deletions_make_a_layer_and_no_change_makes_none(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    base = put_base(layout)
    push_to_layout(checkpoint(tmp_path, None, ["/srv/gone.txt"]), layout, "ck", base=f"oci:{layout}:base")
    assert merged(layout, manifest_of(layout, "ck-rootfs")).find(b"srv/gone.txt") is None
    (tmp_path / "flat" / "deleted.files").write_text("[]")
    push_to_layout(tmp_path / "flat", layout, "ck", base=f"oci:{layout}:base")
    assert [layer.digest for layer in manifest_of(layout, "ck-rootfs").layers] == [d.digest for d in base.layers]


_SRV = frozenset((b"srv", b"srv/gone.txt", b"srv/gonedir", b"srv/gonedir/deep", b"srv/stays"))


@pytest.mark.parametrize(
    ("added", "deleted", "gone", "new"),
    [
        (b"", ["/srv", "/srv/gonedir", "/srv/gonedir/deep"], _SRV, ()),
        (member(b"srv/a/b", b"x"), ["/srv", "/srv/gonedir/deep"], _SRV - {b"srv"}, (b"srv/a", b"srv/a/b")),
        (member(b"srv", b"x"), ["/srv/gonedir/deep", "/srv/stays"], _SRV - {b"srv"}, ()),
        (header(b"srv", flag=b"5", mode=0o711), ["/srv"], _SRV - {b"srv"}, ()),
        (header(b"srv", flag=b"2", link=b"opt"), ["/srv"], _SRV - {b"srv"}, ()),
    ],
    ids=["below another", "below one made again", "below a new file", "made again and empty", "now a link"],
)
def test_what_engines_list_as_deleted(
    added: bytes, deleted: list[str], gone: frozenset[bytes], new: tuple[bytes, ...], tmp_path: Path
) -> None:
    """The pushed root and the view of it agree."""
    layout = tmp_path / "layout"
    put_base(layout)
    push_to_layout(checkpoint(tmp_path, added + END, deleted), layout, "ck", base=f"oci:{layout}:base")
    expected = (set(BASE) | set(new)) - gone
    root = merged(layout, manifest_of(layout, "ck-rootfs"))
    assert {node.path for node in root.walk() if node.path and node.inode} == expected
    source, base = (LayoutSource(Reference.parse(f"oci:{layout}:{tag}")) for tag in ("ck", "base"))
    pull(source, tmp_path / "view", LayoutSource, NetworkCounters(), view="rootfs", base=base.reference)
    assert {os.fsencode(path.relative_to(tmp_path / "view")) for path in (tmp_path / "view").rglob("*")} == expected


def test_many_deletions_take_no_time_squared(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    put_base(layout)
    deleted = [f"/data/{number}" for number in range(15_000)]
    folder = checkpoint(tmp_path, tar_of(DELTA), deleted)
    began = time.process_time()
    push_to_layout(folder, layout, "ck", base=f"oci:{layout}:base")
    assert time.process_time() - began < 10


def test_gnu_tar_sees_opaque_markers_before_what_is_new(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    put_base(layout)
    push_to_layout(checkpoint(tmp_path, tar_of(DELTA), DELETED), layout, "ck", base=f"oci:{layout}:base")
    tar = _untarred(layer_blob(layout, manifest_of(layout, "ck-rootfs").layers[-1]).data)
    names = subprocess.run(["tar", "-tf", "-"], input=tar, capture_output=True, check=True).stdout.decode().split()
    assert names == [
        "data/",
        "data/new",
        "etc/",
        "etc/x",
        "opt/",
        "opt/app/",
        "opt/app/.wh..wh..opq",
        "opt/app/fresh",
        "srv/",
        "srv/.wh.gone.txt",
        "srv/.wh.gonedir",
        "tmp/",
        "tmp/replaced",
    ]


@pytest.mark.parametrize("deleted", [{"a": 1}, [1], ["/../x"], ["/"], "x", ["/a\ud800"]])
def test_a_senseless_list_of_deletions_is_refused(tmp_path: Path, deleted: Any) -> None:
    layout = tmp_path / "layout"
    put_base(layout)
    with pytest.raises(FormatError):
        push_to_layout(checkpoint(tmp_path, tar_of(DELTA), deleted), layout, "ck", base=f"oci:{layout}:base")
    assert not any(m.get("annotations") != {"org.opencontainers.image.ref.name": "base"} for m in _manifests(layout))


def _manifests(layout: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((layout / "index.json").read_bytes())["manifests"]
    return found


def test_a_checkpoint_without_a_base_says_so(tmp_path: Path) -> None:
    from ckptfs.push import PushOptions, open_base, open_checkpoint
    from ckptfs.sources.layout import LayoutSource

    options = PushOptions()
    with (
        open_checkpoint(str(checkpoint(tmp_path, None)), LayoutSource, options) as found,
        pytest.raises(UsageError, match="--base"),
    ):
        open_base(found, "", LayoutSource, options)
