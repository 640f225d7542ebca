"""Arranging an open image as its view shows it: which layers, which tars inside become directories, what is moved.

The decisions are in views.py; this module carries them out on an `OpenImage`, before the image is handed to anybody.
"""

import json
import logging
import stat
from dataclasses import replace

from ckptfs.engine.scan import LayerScan
from ckptfs.errors import CkptfsError, FormatError
from ckptfs.image.indexed import inline_index
from ckptfs.image.inner import InodeBlob, within
from ckptfs.image.opened import OpenImage
from ckptfs.image.views import (
    CONTAINERD_CONFIG,
    CRIU_TAR,
    Layout,
    containers,
    criu_descriptors,
    images_directory,
    inner_tars,
    recognise,
    spec_of,
)
from ckptfs.layers.tar import TarFormat
from ckptfs.model.oci import Descriptor, parse_json
from ckptfs.model.toc import Entry, Inode
from ckptfs.model.tree import Node, Tree

log = logging.getLogger(__name__)

_TAR = "application/vnd.oci.image.layer.v1.tar"
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_DELETED_BYTES = 64 << 20  # a list of a million paths; the real ones have a few hundred


async def arrange(image: OpenImage) -> None:
    """Open the layers and give the tree the shape of the view; returns once a first read works."""
    manifest, limits = image.resolved.manifest, image.options.settings.limits
    index = inline_index(manifest, image.fetcher.next_layer, limits)
    if index is not None:
        image.fetcher.keep(index.contents)
    for rank, descriptor in enumerate(manifest.layers, start=1):
        indexed = index.layers[rank - 1] if index is not None else None
        image.add_layer(image.source.blob(descriptor), rank, indexed=indexed)
    await image.ready()
    if image.options.view != "checkpoint":
        return
    while (layout := recognise(image.tree, complete=image.tree.complete())) is None:
        image.raise_broken()
        image.run_on()
        await image.progress.wait()
    image.layout = layout
    if layout is Layout.NESTED:
        await _unnest(image)
    elif layout is Layout.IMAGES:
        _gather(image.tree, images_directory(image.tree) or b"")
    elif layout is Layout.NONE:
        log.warning("%s is not a checkpoint; its files are shown as they are", image.resolved.reference)
    derived = _DerivedTars(image)
    image.arrived = derived.look
    derived.look()


async def _unnest(image: OpenImage) -> None:
    """containerd's OCI layout inside the image: its blobs become checkpoint/, rootfs-diff/ and spec.dump."""
    while not image.tree.complete():
        image.raise_broken()
        image.run_on()
        await image.progress.wait()
    raw = image.tree
    index = raw.find(b"index.json")
    descriptors = None
    for _ in range(image.options.settings.limits.index_depth):
        if index is None or index.inode is None or index.inode.size > image.options.settings.limits.manifest_bytes:
            break
        document = await image.read(index.inode, 0, index.inode.size)
        descriptors = criu_descriptors(document)
        if descriptors is not None:
            break
        value = parse_json(document, "index.json")
        first = value["manifests"][0] if isinstance(value, dict) and value["manifests"] else None
        index = _blob_node(raw, Descriptor.from_json(first)) if first is not None else None
    if descriptors is None:
        image.layout = Layout.NONE
        log.warning("the OCI layout inside %s holds no checkpoint", image.resolved.reference)
        return
    tree = image.tree = image.new_tree()
    for descriptor in descriptors:
        node = _blob_node(raw, descriptor)
        if node is None or node.inode is None:
            continue
        if descriptor.media_type == CRIU_TAR:
            _fill(image, b"checkpoint", node.inode, dormant=False)
        elif descriptor.media_type == CONTAINERD_CONFIG:
            spec = spec_of(await image.read(node.inode, 0, node.inode.size))
            extent_free = Inode(stat.S_IFREG | 0o600, size=len(spec), mtime_ns=node.inode.mtime_ns)
            tree.add([Entry(b"spec.dump", image.fetcher.keep_file(spec, extent_free))], image.next_rank)
        elif descriptor.media_type.startswith("application/vnd.oci.image.layer.v1.tar"):
            delta = replace(node.inode, ino=0, nlink=1)
            tree.add([Entry(b"rootfs-diff.tar", delta)], image.next_rank)
    await image.ready()


def _blob_node(tree: Tree, descriptor: Descriptor) -> Node | None:
    return tree.find(f"blobs/{descriptor.digest.algorithm}/{descriptor.digest.hex}".encode())


def _gather(tree: Tree, path: bytes) -> None:
    """CRIU's images that lie in `path` are shown in checkpoint/, where every other producer has them."""
    if path != b"checkpoint":
        tree.move(path, b"checkpoint")


class _DerivedTars:
    """Directories beside the tars of a checkpoint; each is filled when somebody first looks into it."""

    def __init__(self, image: OpenImage) -> None:
        self._image = image
        self._seen: set[bytes] = set()

    def look(self) -> None:
        """Give the tars that have become visible their directories."""
        image = self._image
        if image.layout is Layout.NONE:
            return
        for path, inode in list(inner_tars(image.tree)):
            directory = path.removesuffix(b".tar")
            if path not in self._seen:
                self._seen.add(path)
                if image.tree.find(directory) is None:
                    _fill(image, directory, inode, dormant=True)


def _fill(image: OpenImage, directory: bytes, inode: Inode, *, dormant: bool) -> None:
    """Show the members of the tar `inode` under `directory`, as an overlay lower directory."""
    rank, tree = image.next_rank, image.tree
    tree.add([Entry(directory, Inode(stat.S_IFDIR | 0o755, mtime_ns=inode.mtime_ns))], rank)
    tree.begin(rank, directory)
    layer = TarFormat().open(InodeBlob(image.reader, inode, _TAR), image.fetcher.next_layer)

    def arrived(batch: list[Entry]) -> None:
        image.add_entries(tree, [within(entry, inode, directory) for entry in batch], rank, "overlay")

    def ended(error: CkptfsError | None) -> None:
        if error is None and directory.endswith(b"rootfs-diff"):
            image.nursery.start_soon(_delete, image, tree, directory, rank)
        else:
            image.finish(tree, rank, error)

    scan = LayerScan(layer, image.fetcher, arrived, ended)
    scan.dormant = dormant
    image.add_scan(rank, scan)

    async def start() -> None:
        try:
            magic = await image.read(inode, 0, 4)
            if magic[:2] == _GZIP or magic == _ZSTD:
                suffix = "+gzip" if magic[:2] == _GZIP else "+zstd"
                image.add_layer(
                    InodeBlob(image.reader, inode, _TAR + suffix), rank, prefix=directory, whiteouts="overlay"
                )
            else:
                scan.dormant = False
                await scan.run()
        except CkptfsError as error:
            image.finish(tree, rank, error)

    if dormant:
        image.dormant[directory] = lambda: image.nursery.start_soon(start)
    else:
        image.nursery.start_soon(start)


async def _delete(image: OpenImage, tree: Tree, directory: bytes, rank: int) -> None:
    """deleted.files beside the delta (podman, CRI-O: a JSON list of absolute paths) becomes whiteouts in it."""
    error: CkptfsError | None = None
    try:
        parent, _, _ = directory.rpartition(b"/")
        node = await image.find(parent + b"/deleted.files" if parent else b"deleted.files")
        if node is not None and node.inode is not None and node.inode.is_file:
            if node.inode.size > _DELETED_BYTES:
                raise FormatError(f"deleted.files has {node.inode.size} bytes")
            paths = parse_json(await image.read(node.inode, 0, node.inode.size), "deleted.files")
            if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
                raise FormatError("deleted.files is not a list of paths")
            for path in paths:
                parts = [
                    part for part in path.encode("utf-8", "surrogateescape").split(b"/") if part not in (b"", b".")
                ]
                if not parts or b".." in parts:
                    raise FormatError(f"deleted.files names {json.dumps(path)[:200]}")
                tree.delete(directory + b"/" + b"/".join(parts), rank)
    except CkptfsError as failure:
        error = failure
    image.finish(tree, rank, error)


__all__ = ["arrange", "containers"]
