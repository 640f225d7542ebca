"""What tests of `push` need: a checkpoint in a folder, a layout as a source, the tar that a layer is."""

import io
import os
import tarfile
from pathlib import Path

import zstandard

from ckptfs.model.oci import Descriptor, Manifest, Reference
from ckptfs.push import PushOptions, PushResult, Target, open_base, open_checkpoint, open_parent, push
from ckptfs.push.layout_target import LayoutTarget
from ckptfs.settings import Settings
from ckptfs.sources.layout import LayoutSource
from tests.support.blobs import BytesBlob, layout_layer

DATA = Path(__file__).resolve().parents[1] / "data"


def push_to_layout(
    source: str | Path,
    layout: Path,
    tag: str = "latest",
    *,
    base: str = "",
    parent: str = "",
    target: Target | None = None,
    settings: Settings | None = None,
) -> PushResult:
    """`ckptfs push SOURCE oci:LAYOUT:TAG`, with --rootfs and `base`, with --parent, where that is given."""
    options = PushOptions(settings=settings or Settings())
    with open_checkpoint(str(source), LayoutSource, options) as checkpoint:
        image = open_base(checkpoint, base, LayoutSource, options) if base else None
        before = open_parent(Reference.parse(parent), LayoutSource, options) if parent else None
        return push(checkpoint, target or LayoutTarget(layout), tag, options, base=image, parent=before)


def manifest_of(layout: Path, tag: str = "latest") -> Manifest:
    document = LayoutSource(Reference.parse(f"oci:{layout}:{tag}")).resolve()
    assert isinstance(document, Manifest)
    return document


def layer_blob(layout: Path, descriptor: Descriptor) -> BytesBlob:
    return BytesBlob((layout / "blobs" / str(descriptor.digest).replace(":", "/")).read_bytes(), descriptor)


def unpacked(layer: bytes) -> bytes:
    """What `zstd -d` gives: all frames, skippable ones left out."""
    return zstandard.ZstdDecompressor().stream_reader(layer, read_across_frames=True).read()


def tree_images(into: Path) -> Path:
    """CRIU's images of a process tree, as files."""
    blob = layout_layer(DATA / "corpus/tree/k8s-gzip.oci")
    with tarfile.open(fileobj=io.BytesIO(blob.data)) as archive:
        for member in archive:
            if member.isreg() and member.name.startswith("checkpoint/"):
                into.mkdir(exist_ok=True)
                data = archive.extractfile(member)
                assert data is not None
                (into / member.name.removeprefix("checkpoint/")).write_bytes(data.read())
    return into


def two_checkpoints(folder: Path) -> None:
    """first.tar and second.tar: two checkpoints of one process, 0.7 s apart."""
    first = zstandard.ZstdDecompressor().stream_reader((DATA / "two/first.tar.zst").read_bytes()).read()
    reference = zstandard.ZstdCompressionDict(first, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    patch = (DATA / "two/second.tar.patch.zst").read_bytes()
    decompressor = zstandard.ZstdDecompressor(dict_data=reference, max_window_size=1 << 27)
    (folder / "first.tar").write_bytes(first)
    (folder / "second.tar").write_bytes(decompressor.stream_reader(patch).read())


def odd_tree(top: Path) -> Path:
    """A folder with every kind of file that a tar can hold and a test may make; devices and owners only as root."""
    folder = top / "odd"
    (folder / "sub" / "empty").mkdir(parents=True)
    (folder / "plain").write_bytes(b"plain\n")
    (folder / "nothing").write_bytes(b"")
    (folder / "big").write_bytes(os.urandom(700_001) + bytes(600_000) + b"end")
    (folder / "zeros").write_bytes(bytes(1 << 20))
    (folder / ("long-" * 40)).write_bytes(b"a name of 200 bytes")
    (folder / "sub" / "é ü 漢字").write_bytes(b"not ASCII")
    (folder / "link").symlink_to("plain")
    (folder / "farlink").symlink_to("/" + "x" * 150)
    os.link(folder / "plain", folder / "sub" / "hard")
    os.mkfifo(folder / "fifo", 0o600)
    os.setxattr(folder / "plain", "user.note", b"\0binary\xff=\n")
    (folder / "plain").chmod(0o4751)
    os.utime(folder / "nothing", ns=(-1_500_000_000, -1_500_000_000))
    os.utime(folder / "zeros", ns=(1, 1_700_000_000_123_456_700))
    if os.geteuid() == 0:
        os.mknod(folder / "device", 0o020600, os.makedev(259, 70000))
        os.chown(folder / "nothing", 3_000_000, 3_000_001)
    (folder / "sub").chmod(0o2711)
    return folder
