"""An OCI layout as a source: which of its images is meant, and what of it is not followed or believed."""

from pathlib import Path

import pytest

from ckptfs.errors import FormatError, IntegrityError, NotFoundError
from ckptfs.model.oci import OCI_MANIFEST, Descriptor, Digest, Manifest, Reference
from ckptfs.sources.layout import LayoutSource
from tests.support.blobs import TAR
from tests.support.layouts import Layout

SMALL = b"small layer"


def test_a_layout_may_name_its_images_by_other_digests(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    raw = (layout.top / "blobs" / "sha256" / str(layout.manifest(SMALL)["digest"])[7:]).read_bytes()
    digest = Digest.of(raw, "sha512")
    (layout.top / "blobs" / "sha512").mkdir()
    (layout.top / "blobs" / "sha512" / digest.hex).write_bytes(raw)
    layout.tag({"mediaType": OCI_MANIFEST, "digest": str(digest), "size": len(raw)}, "it")
    for tail in (":it", f"@{digest}"):
        assert LayoutSource(Reference.parse(f"oci:{layout.top}{tail}")).resolve().digest == digest


def test_a_layout_with_one_image_needs_no_tag(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "one")
    layout.tag(layout.manifest(SMALL), "only")
    assert isinstance(LayoutSource(Reference("oci", path=str(layout.top))).resolve(), Manifest)


def test_a_layout_with_several_images_names_them(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "several")
    for tag in ("image", "other"):
        layout.tag(layout.manifest(tag.encode()), tag)
    with pytest.raises(NotFoundError, match="it has image, other"):
        LayoutSource(Reference("oci", path=str(layout.top))).resolve()


@pytest.mark.parametrize("name", ["localhost/app:1", "app:1", "team/app", "1"])
def test_a_layout_with_names_for_tags(name: str, tmp_path: Path) -> None:
    """As `buildah push IMAGE oci:DIR:NAME:TAG` and `skopeo copy ... oci:DIR:NAME` write them."""
    layout = Layout(tmp_path / "with:colon")
    for number, tag in enumerate((name, "other")):
        layout.tag(layout.manifest(SMALL + bytes([number])), tag)
    chosen = LayoutSource(Reference.parse(f"oci:{layout.top}:{name}"))
    assert str(chosen.resolve().digest) == layout.entries[0]["digest"]
    with pytest.raises(NotFoundError, match=f"has no image {name}2; it has"):
        LayoutSource(Reference.parse(f"oci:{layout.top}:{name}2")).resolve()


def test_a_layout_that_is_none(tmp_path: Path) -> None:
    source = LayoutSource(Reference("oci", path=str(tmp_path / "nothing")))
    with pytest.raises(NotFoundError, match="there is no directory"):
        source.resolve()
    with pytest.raises(NotFoundError, match=r"index\.json"):
        LayoutSource(Reference("oci", path=str(tmp_path))).resolve()
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(FormatError):
        LayoutSource(Reference("oci", path=str(tmp_path))).resolve()


@pytest.mark.parametrize("where", ["blob", "algorithm", "blobs"])
def test_a_layout_that_leads_elsewhere(tmp_path: Path, where: str) -> None:
    """Symlinks to the right bytes: they are refused because they are symlinks."""
    layout = Layout(tmp_path / "layout")
    layout.tag(layout.manifest(SMALL), "it")
    digest = Digest.of(SMALL)
    path = layout.top / "blobs"
    path = {"blob": path / "sha256" / digest.hex, "algorithm": path / "sha256", "blobs": path}[where]
    moved = path.rename(tmp_path / "moved")
    path.symlink_to(moved)
    blob = LayoutSource(Reference("oci", path=str(layout.top))).blob(Descriptor(TAR, digest, len(SMALL)))
    with pytest.raises(FormatError, match="cannot be read"):
        blob.read_at(0, 1)


def test_a_blob_that_is_no_file(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    digest = Digest.of(SMALL)
    (layout.top / "blobs" / "sha256" / digest.hex).mkdir()
    blob = LayoutSource(Reference("oci", path=str(layout.top))).blob(Descriptor(TAR, digest, len(SMALL)))
    with pytest.raises(FormatError, match="not a regular file"):
        blob.read_at(0, 1)


def test_a_damaged_layout_is_noticed(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    entry = layout.manifest(SMALL)
    layout.tag(entry, "it")
    path = layout.top / "blobs" / "sha256" / str(entry["digest"]).removeprefix("sha256:")
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    for text in (f"oci:{layout.top}:it", f"oci:{layout.top}@{entry['digest']}"):
        with pytest.raises(IntegrityError):
            LayoutSource(Reference.parse(text)).resolve()
