"""`archive:FILE` as a source: an image of one layer, named by the file that it is."""

import tarfile
from pathlib import Path
from random import Random

import pytest

from ckptfs.errors import FormatError, IntegrityError, NotFoundError
from ckptfs.model.oci import Manifest, Reference
from ckptfs.settings import Settings
from ckptfs.sources import Source, open_source
from ckptfs.telemetry import NetworkCounters
from tests.support.command import ckptfs

LAYOUT = Path(__file__).parents[1] / "data" / "corpus" / "counter" / "k8s-zstdchunked.oci"
TAR = "application/vnd.oci.image.layer.v1.tar"


def archive(path: Path) -> Source:
    return open_source(Reference.parse(f"archive:{path}"), settings=Settings(), counters=NetworkCounters())


@pytest.mark.parametrize(
    ("head", "kind"), [(b"\x1f\x8b", TAR + "+gzip"), (b"\x28\xb5\x2f\xfd", TAR + "+zstd"), (bytes(512), TAR)]
)
def test_an_archive_is_an_image_of_one_layer(tmp_path: Path, head: bytes, kind: str) -> None:
    path = tmp_path / "whatever.name"
    data = head + Random(2).randbytes(3 << 20)
    path.write_bytes(data)
    source = archive(path)
    image = source.resolve()
    assert isinstance(image, Manifest)
    (layer,) = image.layers
    assert (layer.media_type, layer.size, layer.synthetic) == (kind, len(data), True)
    assert b"".join(source.blob(layer).stream(5, 2 << 20)) == data[5 : 5 + (2 << 20)]
    assert source.fetch(image.config) == b"{}"
    assert archive(path).resolve() == image, "the same file has the same digest"


def test_an_archive_that_changes_is_another_image(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(2048))
    source = archive(path)
    image = source.resolve()
    assert isinstance(image, Manifest)
    blob = source.blob(image.layers[0])
    assert blob.read_at(0, 4) == bytes(4)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(IntegrityError, match="changed while it was open"):
        blob.read_at(0, 4)
    assert archive(path).resolve().digest != image.digest


def test_archives_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        archive(tmp_path / "missing.tar").resolve()
    for data, match in ((b"", "too short"), (b"x" * 100, "too short"), (b"\xfd7zXZ\0" + bytes(600), "xz")):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(FormatError, match=match):
            archive(tmp_path / "bad").resolve()
    with pytest.raises(FormatError, match="not a regular file"):
        archive(tmp_path).resolve()


def test_an_archive_of_an_ordinary_layout(tmp_path: Path) -> None:
    """`skopeo copy ... oci-archive:`: what is in it can be seen, and what it is is said. It is none of containerd's."""
    with tarfile.open(tmp_path / "layout.tar", "w") as made:
        made.add(LAYOUT, ".")
    common = [f"archive:{tmp_path}/layout.tar", "--cache-dir", tmp_path / "cache"]
    listed = ckptfs("ls", *common)
    assert (listed.code, listed.out) == (0, "blobs/\nindex.json\noci-layout\n"), listed.err
    refused = ckptfs("inspect", *common)
    assert refused.code == 7 and "is not a checkpoint but an OCI layout" in refused.line
