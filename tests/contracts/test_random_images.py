"""Row F1 with images that nobody thought of: any tree, in every format, equals what GNU tar makes of it."""

import gzip
import io
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ckptfs.layers.protocols import SideDocument
from ckptfs.layers.soci import Ztoc
from ckptfs.layers.zstd_chunked_writer import Member, write_layer
from ckptfs.push.directory import read_directory
from ckptfs.settings import KiB
from tests.support import golden, soci
from tests.support.blobs import TAR, BytesBlob, ScannedLayer, blob_of
from tests.support.command import mounted
from tests.support.fake_registry import FakeRegistry
from tests.support.faulty import Record
from tests.support.side import SETTINGS, indexed, scanned
from tests.support.stargz import estargz_of
from tests.support.tools import require
from tests.support.trees import tar_listing

CHUNK = 4 * KiB
ZSTD = zstandard.ZstdCompressor().compress
Made = tuple[BytesBlob, SideDocument | None]
NAMES = st.text("ab.ä漢 -'\"\\\n\t~", min_size=1, max_size=12).filter(lambda name: name not in (".", ".."))
TIMES = st.one_of(st.integers(0, 2**33), st.integers(-(10**6), 10**6))


class Archive:
    """A tar whose repr fits into a report."""

    def __init__(self, tar: bytes) -> None:
        self.tar = tar

    def __repr__(self) -> str:
        with tarfile.open(fileobj=io.BytesIO(self.tar)) as archive:
            return repr([(m.name, m.type, oct(m.mode), m.size, m.linkname, m.pax_headers) for m in archive])[:20_000]


@st.composite
def tars(draw: st.DrawFn) -> Archive:
    """A PAX archive as tar makes them: a directory, then all that is in it; each path once."""
    folders, kinds = [""], {}
    for _ in range(draw(st.integers(1, 14))):
        path = draw(st.sampled_from(folders)) + draw(NAMES)
        kinds.setdefault(path, draw(st.sampled_from((b"0", b"0", b"0", b"5", b"5", b"2", b"1", b"6", b"3", b"4"))))
        if kinds[path] == b"5":
            folders.append(path + "/")
    out, files = io.BytesIO(), []
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(kinds, key=lambda path: path.split("/")):
            info = tarfile.TarInfo(path)
            info.type = b"0" if kinds[path] == b"1" and not files else kinds[path]
            info.mode = draw(st.integers(0, 0o7777))
            info.uid, info.gid = draw(st.sampled_from((0, 1000, 65534, 2_000_000))), draw(st.integers(0, 100))
            fraction = draw(st.sampled_from((0, 1, 500_000_000, 123_456_789)))
            info.pax_headers = {"mtime": f"{draw(TIMES)}.{fraction:09}"}
            data = b""
            if info.type == b"0":
                unit = draw(st.binary(min_size=1, max_size=9))
                data = (unit * 40_000)[: draw(st.sampled_from((0, 1, 511, 512, CHUNK, CHUNK + 1, 40_000)))]
                files.append(path)
                for key in draw(st.sets(st.sampled_from(("user.one", "user.two")), max_size=2)):
                    info.pax_headers[f"SCHILY.xattr.{key}"] = draw(st.text("xyz", min_size=1, max_size=20))
            elif info.type == b"2":
                info.linkname = draw(st.sampled_from(("nowhere", "/etc/passwd", "../" * 9, "t" * 150, "ä")))
                info.mode = 0o777
            elif info.type == b"1":
                info.linkname = draw(st.sampled_from(files))
            elif info.type in (b"3", b"4"):
                info.devmajor, info.devminor = draw(st.integers(0, 255)), draw(st.integers(0, 70_000))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return Archive(out.getvalue())


def zstd_chunked_of(tar: bytes) -> Made:
    """What `push` makes of the tree, with chunks small enough for it to have several."""
    folder = Path(tempfile.mkdtemp())
    try:
        tar_listing(_file(folder, tar), folder / "tree")
        out = io.BytesIO()
        members = [
            Member(file.path, file.inode, file.link, file.open, lambda: repeat((CHUNK,)))
            for file in read_directory(folder / "tree").files
        ]
        written = write_layer(members, out.write)
    finally:
        shutil.rmtree(folder)
    return BytesBlob(out.getvalue(), written.descriptor), None


def _file(folder: Path, tar: bytes) -> Path:
    (folder / "tree.tar").write_bytes(tar)
    return folder / "tree.tar"


def _indexed(tar: bytes) -> Made:
    blob = blob_of(gzip.compress(tar), TAR + "+gzip")
    return blob, indexed(blob)


def _soci(tar: bytes) -> Made:
    blob = blob_of(gzip.compress(tar), TAR + "+gzip")
    return blob, Ztoc.parse(soci.gzip_ztoc(blob, tar), blob.descriptor, SETTINGS)


FORMATS: dict[str, Callable[[bytes], Made]] = {
    "tar": lambda tar: (blob_of(tar), None),
    "gzip": lambda tar: (blob_of(gzip.compress(tar), TAR + "+gzip"), None),
    "zstd": lambda tar: (blob_of(ZSTD(tar), TAR + "+zstd"), None),
    "zstd:chunked": zstd_chunked_of,
    "eStargz": lambda tar: (estargz_of(tar, CHUNK), None),
    "gzip with an index": _indexed,
    "SOCI": _soci,
}


def shown(found: golden.Listing) -> golden.Listing:
    """Without what a format adds."""
    entries = {path: entry for path, entry in found["entries"].items() if path != "stargz.index.json"}
    return {**found, "entries": entries}


@pytest.mark.row("F1")
def test_random_images_in_every_format(record_property: Record) -> None:
    require("tar", root=True)
    a_random_image()
    record_property("figure", f"random trees in {len(FORMATS)} formats equal GNU tar's extraction")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(archive=tars())
def a_random_image(archive: Archive) -> None:
    tar = archive.tar
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = tar_listing(_file(folder, tar), folder / "tree")
    for kind, make in FORMATS.items():
        blob, document = make(tar)
        found = scanned(blob, document) if document is not None else ScannedLayer.of(blob)
        assert shown(golden.listing(found.entries, found.read, exact=True)) == expected, kind


@pytest.mark.fuse
@pytest.mark.row("F1")
@settings(max_examples=1, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(archive=tars().filter(lambda archive: len(archive.tar) > 40_000))
def test_mounts_of_a_random_image(archive: Archive) -> None:
    require("tar", "fusermount3", root=True)
    with tempfile.TemporaryDirectory() as name, FakeRegistry() as registry:
        folder = Path(name)
        expected = tar_listing(_file(folder, archive.tar), folder / "tree")
        for number, (kind, make) in enumerate(FORMATS.items()):
            blob, document = make(archive.tar)
            if document is None:
                notes = [blob.descriptor.annotations]
                tag = f"t{number}"
                registry.add_image("repo", tag, [(blob.descriptor.media_type, blob.data)], layer_annotations=notes)
                with mounted(registry.reference(f"repo:{tag}"), folder / tag, "--view", "raw") as mount:
                    assert shown(golden.directory_listing(mount.path)) == expected, kind
