"""Arranging an open image as its view shows it: which layers, which tars inside become directories, what is moved.

The decisions are in views.py; this module carries them out on an `OpenImage`, before the image is handed to anybody.
"""

import logging
import stat
from dataclasses import replace
from functools import partial
from typing import TypedDict

from ckptfs.engine.threads import in_thread
from ckptfs.errors import FormatError, LimitExceeded, UsageError
from ckptfs.image.delta import DerivedTars, Unpacked
from ckptfs.image.earlier import EarlierImages
from ckptfs.image.indexed import inline_index
from ckptfs.image.opened import OpenImage
from ckptfs.image.rootfs import base_directories, show_rootfs
from ckptfs.image.views import (
    CONTAINERD_CONFIG,
    CRIU_TAR,
    Layout,
    gathering,
    images_directory,
    index_entries,
    is_checkpoint_index,
    recognise,
    spec_of,
)
from ckptfs.layers.protocols import SideDocument
from ckptfs.model.annotations import PARENT
from ckptfs.model.blob import Blob
from ckptfs.model.index import ImageIndex, IndexedLayer
from ckptfs.model.node import Node
from ckptfs.model.oci import INDEX_TYPES, Descriptor, Manifest, Reference
from ckptfs.model.parents import parent_link
from ckptfs.model.toc import Entry, Inode
from ckptfs.model.tree import Tree
from ckptfs.sources import OpenSource

log = logging.getLogger(__name__)


class Known(TypedDict):
    """What OpenImage.add_layer is told of a layer besides its blob."""

    indexed: IndexedLayer | None
    side: SideDocument | None


async def arrange(image: OpenImage, open_source: OpenSource | None, base: Reference | None) -> None:
    """Open the layers and give the tree the shape of the view; returns once a first read works.

    `open_source` and `base` are for the container's base image: see rootfs.py.
    """
    if image.options.view == "layers":
        return  # layer_directories.py shows them
    if image.resolved.loose_blobs:
        _lay_out(image)
    for rank, (blob, known) in enumerate(await known_layers(image), start=1):
        image.add_layer(blob, rank, **known)
    await image.ready()
    if image.options.view == "raw":
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
        _is_none(image, f"{image.resolved.reference} is not a checkpoint")
    if image.options.view == "rootfs":
        if layout is Layout.POD:
            raise UsageError(
                f"{image.resolved.reference} holds several containers, each with a root file system",
                hint="mount the checkpoint view: each has a rootfs-diff/ there",
            )
        if layout is not Layout.NONE:
            await show_rootfs(image, open_source, base)
        return
    if PARENT in image.resolved.manifest.annotations:
        from ckptfs.image.joined import join  # not for images that stand on no other

        await join(image)
    derived = DerivedTars(image, partial(base_directories, image, open_source, base))
    image.arrived = derived.look
    derived.look()


def _is_none(image: OpenImage, message: str) -> None:
    if image.options.only_checkpoints:
        raise FormatError(message, hint="`ckptfs ls REF` shows what is in it")
    log.warning("%s; its files are shown as they are", message)


async def known_layers(image: OpenImage) -> list[tuple[Blob, Known]]:
    """The image's layers from the bottom up, and what is known of each without asking it."""
    manifest, limits = image.resolved.manifest, image.options.settings.limits
    index = inline_index(manifest, image.fetcher.next_layer, limits)
    if index is not None:
        image.fetcher.keep(index.contents)
        if image.options.increments:
            await _find_earlier(image, index)
    side = await image.find_side_documents(image.source, manifest) if index is None else {}
    found: list[tuple[Blob, Known]] = []
    for number, descriptor in enumerate(manifest.layers):
        indexed = index.layers[number] if index is not None else None
        found.append((image.source.blob(descriptor), {"indexed": indexed, "side": side.get(descriptor.digest)}))
    return found


def _lay_out(image: OpenImage) -> None:
    """An index of blobs that are no images (`ctr container checkpoint`), shown as the OCI layout that it is part of."""
    layout: list[Entry] = []
    document = image.resolved.manifest.raw
    for name, data in ((b"index.json", document), (b"oci-layout", b'{"imageLayoutVersion":"1.0.0"}')):
        inode = Inode(stat.S_IFREG | 0o644, size=len(data))
        layout.append(Entry(name, image.fetcher.keep_file(data, inode)))
    for descriptor in image.resolved.loose_blobs:
        path = f"blobs/{descriptor.digest.algorithm}/{descriptor.digest.hex}".encode()
        layout.append(Entry(path, image.raw_file(image.source.blob(descriptor))))
    image.tree.add(layout, image.next_rank)


async def _find_earlier(image: OpenImage, index: ImageIndex) -> None:
    """What this node knows of earlier images of the repository; before the layers are added."""
    limits, resolved = image.options.settings.limits, image.resolved
    earlier = EarlierImages(image.source, image.cache, image.cells, limits, image.chunk_digests)

    def index_of(manifest: Manifest) -> ImageIndex | None:
        return inline_index(manifest, 0, limits)

    await in_thread(earlier.find, resolved.reference, resolved.manifest, index, index_of, finish=True)
    image.tables.earlier = earlier


async def _unnest(image: OpenImage) -> None:
    """containerd's OCI layout inside the image: its blobs become checkpoint/, rootfs-diff/ and spec.dump."""
    await image.listing(image.tree.root)  # all names are known
    raw = image.tree
    index = raw.find(b"index.json")
    blobs: list[Descriptor] = []
    for _ in range(image.options.settings.limits.index_depth):
        if index is None or index.inode is None or index.inode.size > image.options.settings.limits.manifest_bytes:
            break
        try:
            entries = index_entries(await image.read(index.inode, 0, index.inode.size))
        except FormatError:  # the manifest of an image, or a file of an application
            break
        if is_checkpoint_index(entries):
            blobs = entries
            break
        index = _blob_node(raw, entries[0]) if entries and entries[0].media_type in INDEX_TYPES else None
    if not blobs:
        image.layout = Layout.NONE
        what = "is not a checkpoint but an OCI layout, whose images are oci:DIR when it is unpacked"
        _is_none(image, f"{image.resolved.reference} {what}")
        return
    tree = image.show_new_tree()
    for descriptor in blobs:
        node = _blob_node(raw, descriptor)
        if node is None or node.inode is None:
            continue
        if descriptor.media_type == CRIU_TAR:
            Unpacked(image, tree, b"checkpoint", node.inode, "plain").now()
        elif descriptor.media_type == CONTAINERD_CONFIG:
            most = image.options.settings.limits.dump_bytes
            if node.inode.size > most:  # real ones have 10 KB; a sparse file of any size costs an image nothing
                raise LimitExceeded(f"containerd's config blob has {node.inode.size} bytes, more than {most}")
            spec = spec_of(await image.read(node.inode, 0, node.inode.size))
            extent_free = Inode(stat.S_IFREG | 0o600, size=len(spec), mtime_ns=node.inode.mtime_ns)
            tree.add([Entry(b"spec.dump", image.fetcher.keep_file(spec, extent_free))], image.next_rank)
        elif descriptor.media_type.startswith("application/vnd.oci.image.layer.v1.tar"):
            delta = replace(node.inode, mode=stat.S_IFREG | 0o600, uid=0, gid=0, ino=0, nlink=1)  # as spec.dump
            tree.add([Entry(b"rootfs-diff.tar", delta)], image.next_rank)
    await image.ready()


def _blob_node(tree: Tree, descriptor: Descriptor) -> Node | None:
    return tree.find(f"blobs/{descriptor.digest.algorithm}/{descriptor.digest.hex}".encode())


def _gather(tree: Tree, path: bytes) -> None:
    """CRIU's images that lie in `path` are shown in checkpoint/; in the root they get a directory, as push makes it."""

    def link(path: bytes) -> bytes | None:
        directory = tree.find(path)
        return parent_link(directory) if directory is not None else None

    for source, target in gathering(path, link, lambda path: tree.find(path) is not None):
        tree.move(source, target)
    images = tree.find(b"checkpoint")
    if images is not None and images.inode is not None and not images.rank:
        inventory = images.children[b"inventory.img"].inode
        if inventory is not None:
            images.inode.mode, images.inode.uid, images.inode.gid = stat.S_IFDIR | 0o700, inventory.uid, inventory.gid
            images.inode.mtime_ns = inventory.mtime_ns
