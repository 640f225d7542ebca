"""containerd's own checkpoints become the flat layout, wherever the index of raw blobs lies."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ckptfs.errors import CkptfsError, FormatError, IntegrityError
from ckptfs.image.views import spec_of
from tests.support.push import layer_blob, manifest_of, push_to_layout, tree_images, unpacked
from tests.support.tars import tar_of

CRIU_TAR = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
CONFIG = "application/vnd.containerd.container.checkpoint.config.v1+proto"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
INDEX = "application/vnd.oci.image.index.v1+json"
SPEC = b'{"ociVersion":"1.0.2"}'


def ctr_layout(top: Path) -> Path:
    """What `ctr image export` leaves: an index that names an index, whose manifests are raw blobs."""
    layout = top / "ctr"
    (layout / "blobs/sha256").mkdir(parents=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def put(media_type: str, data: bytes, **more: Any) -> dict[str, Any]:
        name = hashlib.sha256(data).hexdigest()
        (layout / "blobs/sha256" / name).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data), **more}

    images = tree_images(top / "images")
    criu = put(CRIU_TAR, tar_of({path.name: path.read_bytes() for path in sorted(images.iterdir())}))
    config = put(CONFIG, b"\x0a\x04type\x12" + bytes([len(SPEC)]) + SPEC)
    delta = put(LAYER, gzip.compress(tar_of({"srv/.wh.gone": b""}), mtime=0))
    notes = {
        "org.opencontainers.image.ref.name": "docker.io/library/base:1",
        "io.containerd.checkpoint.runtime": "runc",
    }
    inner = {"schemaVersion": 2, "manifests": [criu, config, delta], "annotations": notes}
    name = {"org.opencontainers.image.ref.name": "latest"}
    outer = {
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [put(INDEX, json.dumps(inner).encode(), annotations=name)],
    }
    (layout / "index.json").write_text(json.dumps(outer))
    return layout


def check(top: Path, layout: Path) -> None:
    found = {}
    for layer in manifest_of(layout).layers:
        with tarfile.open(fileobj=io.BytesIO(unpacked(layer_blob(layout, layer).data))) as archive:
            for member in archive:
                data = archive.extractfile(member)
                found[member.name] = data.read() if data else None
    images = {f"checkpoint/{path.name}": path.read_bytes() for path in (top / "images").iterdir()}
    assert {name: data for name, data in found.items() if name.startswith("checkpoint/")} == images
    assert found["spec.dump"] == SPEC
    assert gzip.decompress(found["rootfs-diff.tar"] or b"") == tar_of({"srv/.wh.gone": b""})
    notes = manifest_of(layout).annotations
    assert notes["org.opencontainers.image.base.name"] == "docker.io/library/base:1"
    assert notes["io.containerd.checkpoint.runtime"] == "runc"


def test_an_index_of_raw_blobs_in_a_layout(tmp_path: Path) -> None:
    push_to_layout(f"oci:{ctr_layout(tmp_path)}:latest", tmp_path / "out")
    check(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("compress", [False, True])
def test_the_layout_in_an_archive(tmp_path: Path, compress: bool) -> None:
    layout = ctr_layout(tmp_path)
    archive = tmp_path / "ctr.tar"
    with tarfile.open(archive, "w:gz" if compress else "w") as out:
        out.add(layout, ".")
    push_to_layout(archive, tmp_path / "out")
    check(tmp_path, tmp_path / "out")


def blob_of_type(layout: Path, media_type: str) -> Path:
    for path in (layout / "blobs/sha256").iterdir():
        raw = path.read_bytes()
        if raw.startswith(b'{"schemaVersion"'):
            (entry,) = (m for m in json.loads(raw)["manifests"] if m["mediaType"] == media_type)
    return layout / "blobs" / str(entry["digest"]).replace(":", "/")


@pytest.mark.parametrize("data", [None, b"", b"junk" * 500])
def test_a_blob_that_is_missing_or_wrong_is_refused(tmp_path: Path, data: bytes | None) -> None:
    layout = ctr_layout(tmp_path)
    blob = blob_of_type(layout, CRIU_TAR)
    if data is None:
        blob.unlink()
    else:
        blob.write_bytes(data)
    with tarfile.open(tmp_path / "ctr.tar", "w") as out:
        out.add(layout, ".")
    with pytest.raises(CkptfsError):
        push_to_layout(tmp_path / "ctr.tar", tmp_path / "out")


@pytest.mark.row("N2")
@pytest.mark.parametrize("media_type", [CRIU_TAR, CONFIG, LAYER])
def test_a_wrong_byte_of_a_blob_is_found_out(tmp_path: Path, media_type: str) -> None:
    layout = ctr_layout(tmp_path)
    blob = blob_of_type(layout, media_type)
    raw = blob.read_bytes()
    blob.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    with pytest.raises(IntegrityError, match="digest"):
        push_to_layout(f"oci:{layout}:latest", tmp_path / "out")


@pytest.mark.parametrize("document", [b"{}", b"[]", b'{"manifests": [{}]}', b'{"manifests": 3}', b"{"])
def test_a_senseless_index_is_refused(tmp_path: Path, document: bytes) -> None:
    layout = ctr_layout(tmp_path)
    (layout / "index.json").write_bytes(document)
    with tarfile.open(tmp_path / "ctr.tar", "w") as out:
        out.add(layout, ".")
    with pytest.raises(FormatError):
        push_to_layout(tmp_path / "ctr.tar", tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{}",
        b"\x0a\x04type",  # no value
        b"\x12\x00",
        b"\x12\x04spec",
        b"\x12\x7f{}",  # cut off
        b"\x12" + b"\xff" * 11,
        b"\x10\x01",  # a number where the value is
        b"\x12\x02\xff\xfe",
        b"\x12\x8f\xa0\x06" + b"[" * 102415,  # deeper than a parser goes
    ],
)
def test_a_config_blob_that_holds_no_spec_is_refused(config: bytes) -> None:
    with pytest.raises(FormatError, match="containerd's config blob"):
        spec_of(config)


def test_the_spec_of_a_config_blob() -> None:
    assert spec_of(b"\x0a\x04type\x12\x02{}") == b"{}"
