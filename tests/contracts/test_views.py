"""Every producer's checkpoint, in every format, shows the same tree: what an eager extraction gives, and its delta.

producer (tests/support/producers.py) -> tar -> format -> view  ==  what GNU tar made, arranged by hand
"""

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ckptfs.errors import UsageError, only_error
from tests.support import golden
from tests.support.blobs import TAR, blob_of
from tests.support.command import ckptfs
from tests.support.producers import PRODUCER, PRODUCERS, deltas, nested_blobs, unpack
from tests.support.push import push_to_layout
from tests.support.stargz import estargz_of
from tests.support.tars import tar_of
from tests.support.tools import ROOT, require, run
from tests.support.trees import layout_with
from tests.support.views import Entries, show, under, without

FURNITURE = ("stargz.index.json", "checkpoint/stargz.index.json")  # eStargz adds it, and an extraction shows it
NOT_PUSHED = ("none",)  # `push` refuses what is no checkpoint
WHITEOUT = {"type": "char", "mode": "0000", "uid": 0, "gid": 0, "mtime": 0, "size": 0, "nlink": 1, "rdev": [0, 0]}
SKIPPABLE = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + bytes(4)  # RFC 8878, 3.1.2; pzstd begins with one
IMPLIED = {"type": "dir", "mode": "0755", "uid": 0, "gid": 0, "mtime": 0}


def _layout(media_type: str, compress: Callable[[bytes], bytes]) -> Callable[[Path, Path], str]:
    def make(tar: Path, folder: Path) -> str:
        blob = blob_of(compress(tar.read_bytes()), media_type)
        return f"oci:{layout_with(folder / 'layout', [blob])}"

    return make


def _archive(name: str, compress: Callable[[bytes], bytes]) -> Callable[[Path, Path], str]:
    def make(tar: Path, folder: Path) -> str:
        (folder / name).write_bytes(compress(tar.read_bytes()))
        return f"archive:{folder / name}"

    return make


def _estargz(tar: Path, folder: Path) -> str:
    return f"oci:{layout_with(folder / 'layout', [estargz_of(tar.read_bytes(), 64 * 1024)])}"


def _pushed(tar: Path, folder: Path) -> str:
    push_to_layout(tar, folder / "pushed")
    return f"oci:{folder / 'pushed'}"


ZSTD = zstandard.ZstdCompressor(level=1).compress
FORMATS: dict[str, Callable[[Path, Path], str]] = {
    "archive": _archive("checkpoint.tar", bytes),
    "archive gzip": _archive("checkpoint.tar.gz", gzip.compress),
    "archive zstd": _archive("checkpoint.anything", ZSTD),
    "tar": _layout(TAR, bytes),
    "gzip": _layout(TAR + "+gzip", gzip.compress),
    "zstd": _layout(TAR + "+zstd", ZSTD),
    "eStargz": _estargz,
    "pushed": _pushed,
}


@dataclass(frozen=True)
class Made:
    """A producer's checkpoint: as a folder, as a tar, and what a checkpoint view of it has to show."""

    folder: Path
    tar: Path
    raw: Entries
    checkpoint: Entries
    layout: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Each producer's checkpoint, made once."""
    require("tar", root=True)
    known: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in known:
            top = tmp_path_factory.mktemp("producer")
            folder = top / "content"
            folder.mkdir()
            PRODUCER[name](folder)
            xattrs = ("--format=pax", "--xattrs", "--xattrs-include=*", "--numeric-owner")
            names = sorted(os.listdir(folder))  # as engines do: no entry for the root itself
            run("tar", *xattrs, "--create", "--file", top / "made.tar", "--directory", folder, *names)
            raw = listed(folder)
            layout, checkpoint = EXPECTED.get(name, flat)(folder, top, raw)
            known[name] = Made(folder, top / "made.tar", raw, checkpoint, layout)
        return known[name]

    return make


def listed(folder: Path) -> Entries:
    """With whole seconds; nothing but what a listing of a view says."""
    entries: Entries = golden.directory_listing(folder)["entries"]
    for entry in entries.values():
        del entry["mtime_ns"]
    return entries


# What the checkpoint view adds and moves, worked out from the folders by hand.


def flat(folder: Path, top: Path, raw: Entries, prefix: str = "") -> tuple[str, Entries]:
    entries = dict(raw)
    for tar in [*folder.glob("*.tar"), *folder.glob("volumes/*.tar")]:
        name = str(tar.relative_to(folder)).removesuffix(".tar")
        into = top / "inside" / prefix / name
        unpack(tar, into)
        entry = {**IMPLIED, "mtime": raw[f"{name}.tar"]["mtime"]}
        if name != "rootfs-diff":
            own = os.lstat(into)  # the tar describes its own root
            entry = {**entry, "mode": f"{own.st_mode & 0o7777:04o}", "mtime": int(own.st_mtime)}
        entries[name] = entry
        inside = delta(folder, top / "delta" / prefix) if name == "rootfs-diff" else listed(into)
        entries |= {f"{name}/{path}": entry for path, entry in inside.items()}
    return "flat", entries


def delta(folder: Path, into: Path) -> Entries:
    """The delta as overlayfs has it in a lower directory."""
    root, names = deltas(folder, into)
    entries = {}
    for path, entry in listed(root).items():
        directory, name = os.path.split(path)
        if name.startswith(".wh."):
            entries[os.path.join(directory, name.removeprefix(".wh."))] = WHITEOUT
        else:
            entries[path] = entry if path in names else IMPLIED
    list_of = folder / "deleted.files"
    for path in json.loads(list_of.read_text()) if list_of.exists() else ():
        relative = path.lstrip("/")
        if relative in entries:  # deleted, and made again
            entries[relative] = {**entries[relative], "xattrs": {"trusted.overlay.opaque": "eQ=="}}
        else:
            entries[relative] = WHITEOUT
            for above in parents(relative):
                entries.setdefault(above, IMPLIED)
    return entries


def parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


def moved(source: str, **others: str) -> Callable[[Path, Path, Entries], tuple[str, Entries]]:
    """CRIU's images in `source` ("" for the root) are shown in checkpoint/; `others` move as well."""

    def expect(folder: Path, top: Path, raw: Entries) -> tuple[str, Entries]:
        if not source:
            # The root of the image has no entry: a directory as criu's, as old as the dump.
            own = {"checkpoint": {**IMPLIED, "mode": "0700", "mtime": raw["inventory.img"]["mtime"]}}
            return "images", own | {f"checkpoint/{path}": entry for path, entry in raw.items()}
        entries = {}
        for path, entry in raw.items():
            for old, new in {source: "checkpoint", **others}.items():
                if path == old or path.startswith(f"{old}/"):
                    path = new + path[len(old) :]
                    break
            entries[path] = entry
        return "images", entries

    return expect


def nested(folder: Path, top: Path, raw: Entries) -> tuple[str, Entries]:
    """The blobs as the files that they are; the golden listings are of the blobs, extracted."""
    criu, layer, config = nested_blobs(folder)
    flat_folder = top / "flat"
    flat_folder.mkdir()
    shutil.copy2(layer, flat_folder / "rootfs-diff.tar")
    entries = {"rootfs-diff.tar": {**listed(flat_folder)["rootfs-diff.tar"], "mode": "0600"}}
    entries["rootfs-diff"] = {**IMPLIED, "mtime": entries["rootfs-diff.tar"]["mtime"]}
    entries |= {f"rootfs-diff/{path}": entry for path, entry in delta(flat_folder, top / "delta").items()}
    entries["checkpoint"] = {**IMPLIED, "mtime": int(criu.stat().st_mtime)}
    data = config.read_bytes()
    spec = data[data.index(b"{") :]  # out of a protocol buffer
    entries["spec.dump"] = {
        "type": "file",
        "mode": "0600",
        "uid": 0,
        "gid": 0,
        "nlink": 1,
        "mtime": int(config.stat().st_mtime),
        "size": len(spec),
        "sha256": hashlib.sha256(spec).hexdigest(),
    }
    images = golden.load(PRODUCERS / "criu-tar.golden.json")["entries"]
    return "nested", entries | {f"checkpoint/{path}": entry for path, entry in images.items()}


def pod(folder: Path, top: Path, raw: Entries) -> tuple[str, Entries]:
    entries = dict(raw)
    for container in ("aaaa-web", "bbbb-db"):
        _, shown = flat(folder / container, top, under(raw, container), container)
        entries |= {f"{container}/{path}": entry for path, entry in shown.items()}
    return "pod", entries


EXPECTED: dict[str, Callable[[Path, Path, Entries], tuple[str, Entries]]] = {
    "containerd nested": nested,
    "criu": moved(""),
    "docker": moved("checkpoints/first"),
    "pod": pod,
    "criu increments": moved("dumps/3", **{"dumps/2": "2", "dumps/1": "1"}),
    "none": lambda folder, top, raw: ("none", raw),
}


def differences(found: Entries, expected: Entries) -> dict[str, Any]:
    """What a failed comparison should say: path -> (found, expected)."""
    paths = sorted(found.keys() | expected.keys())
    return {p: (found.get(p), expected.get(p)) for p in paths if found.get(p) != expected.get(p)}


@pytest.mark.row("F1")
@pytest.mark.parametrize(
    ("producer", "form"),
    [(name, form) for name in PRODUCER for form in FORMATS if form != "pushed" or name not in NOT_PUSHED],
)
def test_views(producer: str, form: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    checkpoint = made(producer)
    reference = FORMATS[form](checkpoint.tar, tmp_path)
    shown = show(reference, tmp_path / "cache")
    if form != "pushed":
        raw = without(show(reference, tmp_path / "cache", "raw").entries, *FURNITURE)
        assert differences(raw, checkpoint.raw) == {}
        assert shown.layout == checkpoint.layout
    found = without(shown.entries, *FURNITURE)
    assert differences(found, checkpoint.checkpoint) == {}
    assert shown.errors == []


def test_an_index_of_raw_blobs(made: Callable[[str], Made], tmp_path: Path) -> None:
    """ctr's layout itself: the index whose manifests are blobs, which no registry takes."""
    checkpoint = made("containerd nested")
    shown = show(f"oci:{checkpoint.folder}", tmp_path / "cache")
    assert shown.layout == "nested"
    times = ("spec.dump", "rootfs-diff.tar", "rootfs-diff", "checkpoint")  # blobs have none
    assert differences(timeless(shown.entries, times), timeless(checkpoint.checkpoint, times)) == {}
    raw = show(f"oci:{checkpoint.folder}", tmp_path / "cache", "raw").entries
    blobs = {path: entry["sha256"] for path, entry in raw.items() if path.startswith("blobs/sha256/")}
    assert blobs and all(path.endswith(digest) for path, digest in blobs.items())
    assert blobs.keys() <= checkpoint.raw.keys()


def timeless(entries: Entries, paths: tuple[str, ...]) -> Entries:
    return {p: {k: v for k, v in e.items() if p not in paths or k != "mtime"} for p, e in entries.items()}


def test_real_images_show_what_they_hold(tmp_path: Path) -> None:
    """As the tools left them, without a tar of ours in between."""
    for source, name in (
        (f"archive:{PRODUCERS}/counter-zstd.tar.zst", "counter-zstd"),
        (f"oci:{PRODUCERS}/created-gzip.oci", "created-gzip"),
        (f"oci:{PRODUCERS}/nested-gzip.oci", "nested-gzip"),
    ):
        expected = golden.load(PRODUCERS / f"{name}.golden.json")
        assert show(source, tmp_path / "cache", "raw").listing == expected
        shown = show(source, tmp_path / "cache")
        if shown.layout == "nested":
            images, delta_of = "criu-tar", "rw-layer"
            assert shown.under("checkpoint") == golden.load(PRODUCERS / f"{images}.golden.json")["entries"]
        else:
            delta_of = "rootfs-diff"
            assert {p: shown.entries[p] for p in expected["entries"]} == expected["entries"]
        names = golden.load(PRODUCERS / f"{delta_of}.golden.json")["entries"].keys()
        assert {name for name in names if "/.wh." not in name} <= shown.under("rootfs-diff").keys()


@pytest.mark.parametrize(
    "pack",
    [bytes, gzip.compress, zstandard.compress, lambda data: SKIPPABLE + zstandard.compress(data)],
    ids=["plain", "gzip", "zstd", "zstd of pzstd"],
)
def test_the_delta_may_be_compressed_by_any_tool(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    delta = pack(tar_of({"etc/new": b"new"}))
    files = {"config.dump": b"{}", "checkpoint/inventory.img": b"x", "rootfs-diff.tar": delta}
    layout = layout_with(tmp_path / "image", [blob_of(tar_of(files))])
    assert show(f"oci:{layout}:latest", tmp_path / "cache").under("rootfs-diff").keys() == {"etc", "etc/new"}


def test_a_file_of_the_container_that_is_called_as_a_tar_of_a_checkpoint_is_a_file(tmp_path: Path) -> None:
    """A directory beside it would be one more in the container that an overlay makes of the delta."""
    inner = tar_of({"x": b"1"})
    kept = dict.fromkeys(("rootfs-diff.tar", "devshm-checkpoint.tar", "volumes/backup.tar"), inner)
    delta = tar_of(kept)
    files = {"config.dump": b"{}", "checkpoint/inventory.img": b"x", "rootfs-diff.tar": delta, "volumes/v.tar": delta}
    for pod in ("", "one/"):
        layers = [blob_of(tar_of({pod + name: data for name, data in files.items()}))]
        if pod:
            layers.append(blob_of(tar_of({"two/checkpoint/inventory.img": b"x"})))
        layout = layout_with(tmp_path / f"image-{pod.rstrip('/')}", layers)
        shown = show(f"oci:{layout}:latest", tmp_path / "cache")
        for folder in ("rootfs-diff", "volumes/v"):
            assert shown.under(pod + folder).keys() == {*kept, "volumes"}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "gzip"])
def test_a_container_that_has_only_deleted_files(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Engines write deleted.files then, and no rootfs-diff.tar (CRCreateRootFsDiffTar in podman)."""
    files = {"deleted.files": b'["/etc/gone", "/srv"]', "config.dump": b"{}", "checkpoint/inventory.img": b"x"}
    layer = blob_of(pack(tar_of(files)), TAR if pack is bytes else TAR + "+gzip")
    layout = layout_with(tmp_path / "image", [layer])
    base = layout_with(tmp_path / "base", [blob_of(tar_of({"etc/gone": b"1", "etc/kept": b"2", "srv/x": b"3"}))])
    shown = show(f"oci:{layout}:latest", tmp_path / "cache").under("rootfs-diff")
    assert {path for path, entry in shown.items() if entry == {**entry, **WHITEOUT}} == {"etc/gone", "srv"}
    assert shown.keys() == {"etc", "etc/gone", "srv"}
    root = show(f"oci:{layout}:latest", tmp_path / "cache", "rootfs", base=f"oci:{base}:latest")
    assert root.entries.keys() == {"etc", "etc/kept"}


def test_an_image_that_is_no_checkpoint_says_so(
    made: Callable[[str], Made], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = show(FORMATS["gzip"](made("none").tar, tmp_path), tmp_path / "cache")
    assert shown.layout == "none"
    assert "is not a checkpoint; its files are shown as they are" in caplog.text


def test_an_image_in_an_archive_is_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What `podman save --format=oci-archive` writes: a layout whose index names images."""
    layout = ROOT / "tests/data/corpus/counter/k8s-zstdchunked.oci"
    run("tar", "-cf", tmp_path / "image.tar", "-C", layout, ".")
    shown = show(f"archive:{tmp_path}/image.tar", tmp_path / "cache")
    assert shown.layout == "none" and "index.json" in shown.entries
    assert "is not a checkpoint but an OCI layout" in caplog.text
    assert "its files are shown as they are" in caplog.text


def test_the_root_file_system_of_several_containers(made: Callable[[str], Made], tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        show(FORMATS["tar"](made("pod").tar, tmp_path), tmp_path / "cache", "rootfs")
    error = only_error(caught.value)
    assert isinstance(error, UsageError) and "several containers" in error.message


def test_the_root_file_system_of_what_is_no_checkpoint(made: Callable[[str], Made], tmp_path: Path) -> None:
    other = made("none")
    reference = FORMATS["tar"](other.tar, tmp_path)
    assert differences(show(reference, tmp_path / "cache", "rootfs").entries, other.raw) == {}


def test_a_base_image_that_is_named_twice_is_told_once(tmp_path: Path) -> None:
    push_to_layout(f"oci:{ROOT}/tests/data/corpus/counter/k8s-zstdchunked.oci", tmp_path / "pushed")
    options = ("--view", "rootfs", "--cache-dir", tmp_path / "cache")
    done = ckptfs("ls", f"oci:{tmp_path}/pushed", *options)
    assert done.code == 3 and done.line.count("localhost/base:latest") == 1
